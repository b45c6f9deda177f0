"""Small mixture-of-experts models, the plans that are tried on them, and one process in plain torch that trains the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from reference.bounds import Noisy, no_noise
from reference.oracle import BATCH, DECAY, LR
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BLOCKS, EXPERTS, VOCABULARY, LENGTH = 4, 4, 48, 10
HUGGING_FACE = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "DeepseekV2", "DeepseekV3")

BANKS = ("auto", "model.layers.*.mlp.experts")
ALONE = ("auto", "model.layers.*.mlp.experts.*")


def banks(*blocks: int) -> list[str]:
    return [f"model.layers.{i}.mlp.experts" for i in blocks]


def blocks(*numbers: int) -> list[str]:
    return [f"model.layers.{i}" for i in numbers]


def alone(*pairs: tuple[int, int]) -> list[str]:
    return [f"model.layers.{i}.mlp.experts.{k}" for i, k in pairs]


#: name -> the setting `layers`, and what is frozen and thawed before which step
PLANS: dict[str, tuple[tuple[str, ...] | None, dict[int, tuple[str, list[str]]]]] = {
    "none": (None, {}),
    "judged": (ALONE, {}),
    # a prefix grows, one behind an active layer, a thaw in the prefix and one in the middle
    "blocks": (
        None,
        {
            2: ("freeze", ["embeddings"]),
            3: ("freeze", blocks(0, 1)),
            4: ("freeze", blocks(3)),
            6: ("thaw", blocks(1)),
            7: ("thaw", blocks(3)),
        },
    ),
    # all experts rest, then two banks train again
    "experts rest": (BANKS, {2: ("freeze", banks(1, 2, 3)), 5: ("thaw", banks(1, 3))}),
    # only experts train, then a whole block too; the first active layer is a part of a leaf module
    "only experts": (
        BANKS,
        {2: ("freeze", ["embeddings", *blocks(0, 1, 2, 3)]), 5: ("thaw", blocks(2)), 7: ("freeze", banks(1))},
    ),
    # the same of single experts
    "some experts": (ALONE, {2: ("freeze", alone((1, 0), (1, 2), (2, 1), (3, 3))), 5: ("thaw", alone((1, 2), (3, 3)))}),
    "only some experts": (
        ALONE,
        {
            2: ("freeze", ["embeddings", *blocks(0, 1, 2, 3), *alone(*((0, k) for k in range(EXPERTS)), (1, 0), (1, 1), (2, 3))]),
            5: ("thaw", alone((2, 3))),
        },
    ),
}


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        kind: One of HUGGING_FACE, or "Listed".
        checkpointing: "", "reentrant" or "not reentrant".
        auxiliary: Whether the loss has the routers' balance in it.
        saves: Steps after which a checkpoint is saved, from each of which a new engine goes on to the end.
        zero: Of zero_optimization.
    """

    name: str
    kind: str
    stage: int
    plan: str = "blocks"
    dtype: str = "fp32"
    clip: float = 0.0
    accumulation: int = 1
    keep_state: int = 0
    checkpointing: str = ""
    auxiliary: bool = False
    saves: tuple[int, ...] = ()
    zero: dict[str, Any] = field(default_factory=dict)
    steps: int = 9

    def at(self, step: int) -> tuple[str, list[str]] | None:
        return PLANS[self.plan][1].get(step)

    @property
    def layers(self) -> str | list[str]:
        found = PLANS[self.plan][0]
        return "auto" if found is None else list(found)


class ListedSparseBlock(nn.Module):
    """One expert a token, as modules in a list: DBRX, and transformers before 5. An expert without a token does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, EXPERTS)
        with torch.no_grad():
            self.gate.bias.copy_(torch.linspace(0.8, -0.8, EXPERTS))  # uneven: in many steps an expert has no token
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 8, bias=False), nn.SiLU(), nn.Linear(8, 16)) for _ in range(EXPERTS))
        self.idle = 0  # how many times an expert had no token

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape, x.view(-1, 16)
        weights = (4 * self.gate(x)).float().softmax(-1).to(x.dtype)
        chosen = weights.argmax(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            (rows,) = (chosen == number).nonzero(as_tuple=True)
            if rows.numel():
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, number, None])
            else:
                self.idle += 1
        return out.view(shape)


class ListedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mix = nn.Linear(LENGTH, LENGTH)
        self.mlp = ListedSparseBlock()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(x)


class ListedTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleList(ListedBlock() for _ in range(BLOCKS))
        self.checkpointing = ""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.checkpointing == "reentrant") if self.checkpointing else layer(x)
        return x


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = ListedTower()
        self.lm_head = nn.Linear(16, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.model(input_ids))


def build(kind: str, *, seed: int = 0, checkpointing: str = "") -> nn.Module:
    torch.manual_seed(seed)
    if kind == "Listed":
        listed = Listed()
        listed.model.checkpointing = checkpointing
        return listed.train()
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "use_cache": False,
        "attn_implementation": "eager",
        "pad_token_id": None,
        "eos_token_id": None,
    }
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    shared = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "moe_intermediate_size": 8, "first_k_dense_replace": 1}
    sizes |= {
        "Mixtral": {"num_local_experts": EXPERTS, "router_aux_loss_coef": 0.1},
        "Qwen2Moe": {"num_experts": EXPERTS, "moe_intermediate_size": 8, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 8},
        "Qwen3Moe": {"num_experts": EXPERTS, "moe_intermediate_size": 8, "decoder_sparse_step": 1, "head_dim": 8},
        "Olmoe": {"num_experts": EXPERTS},
        "DeepseekV2": latent | shared | {"n_group": None, "topk_group": None, "topk_method": "greedy"},
        "DeepseekV3": latent | shared | {"n_group": 2, "topk_group": 1},
    }[kind]
    model: Any = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    return model.train()


def tokens(step: int, micro: int, rank: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1000 * step + 10 * micro + rank))


def loss_of(model: Any, case: Case, step: int, micro: int, rank: int) -> Tensor:
    ids = tokens(step, micro, rank)
    if case.auxiliary:
        loss: Tensor = model(input_ids=ids, labels=ids, output_router_logits=True).loss
        return loss
    out = model(input_ids=ids)
    logits = out if isinstance(out, Tensor) else out.logits
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def layer_of(name: str, patterns: str | list[str]) -> str:
    """The layer of a parameter: its expert bank or its expert, if those are layers, else its block."""
    parts = name.split(".")
    if parts[1] == "embed_tokens":
        return "embeddings"
    if parts[1] != "layers":
        return "head"
    inside = parts[3:5] == ["mlp", "experts"] and patterns != "auto"
    depth = (5 if patterns[-1].endswith("experts") else 6) if inside else 3
    return ".".join(parts[:depth])


def reference(case: Case, *, freezes: bool, noise: Noisy = no_noise) -> list[Tensor]:
    """One process in plain torch, both ranks' batches: all weights after each step.

    A gradient that no rank has is 0, as DeepSpeed has it, also if an expert had no token.
    """
    model = build(case.kind, checkpointing="")
    if case.dtype == "bf16":
        model = model.bfloat16()
    named = dict(model.named_parameters())
    masters = {n: p.detach().float().clone().requires_grad_() for n, p in named.items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=LR, weight_decay=DECAY)
    kept: dict[str, Any] = {}
    history = []
    for step in range(case.steps):
        if freezes and (event := case.at(step)):
            for n, p in named.items():
                if layer_of(n, case.layers) in event[1]:
                    _switch(event[0], n, p, masters[n], optimizer, kept if case.keep_state else None)
        live = {n: p for n, p in named.items() if p.requires_grad}
        total = {n: torch.zeros_like(p) for n, p in live.items()}
        for micro in range(case.accumulation):
            per_rank = []
            for rank in (0, 1):
                loss = loss_of(model, case, step, micro, rank) / case.accumulation
                found = torch.autograd.grad(loss, list(live.values()), allow_unused=True)
                per_rank.append([torch.zeros_like(p) if g is None else g for p, g in zip(live.values(), found, strict=True)])
            for n, *pair in zip(live, *per_rank, strict=True):
                total[n] += pair[0] / 2 + pair[1] / 2
        for n in live:
            masters[n].grad = noise(step, total[n].float())
        if case.clip:
            factor = (torch.stack([masters[n].grad.norm() for n in live]).norm() + 1e-6) / case.clip  # type: ignore[union-attr]
            if factor > 1:
                for n in live:
                    masters[n].grad.mul_(1.0 / factor)  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        for n, p in live.items():
            p.data.copy_(masters[n].data)
        history.append(torch.cat([p.detach().float().flatten() for p in named.values()]))
    return history


def _switch(action: str, name: str, p: nn.Parameter, master: Tensor, optimizer: Any, kept: dict[str, Any] | None) -> None:
    if action == "freeze":
        p.requires_grad_(False)
        state = optimizer.state.pop(master, {})
        if kept is not None:
            kept[name] = state
        return
    p.requires_grad_(True)
    if kept is not None and name in kept:
        optimizer.state[master] = kept.pop(name)
    else:
        master.data.copy_(p.data)
