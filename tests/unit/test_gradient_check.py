"""The gradient check lets healthy runs go on, and ends those whose graph is cut: one process in plain torch, bit for bit.

Background: "no gradient in the first step after a freeze" was taken for a cut graph. A batch that uses another head, a text-only batch of a
vision-language model or an expert that no token reached ended the run. The ranks' side is in test_other_code.py.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import smartfrz_ds
from smartfrz_ds.errors import MissingGradients

WIDTH, STEPS, FREEZE_AT = 6, 9, 4
PREFIX = ["embeddings", "blocks.0"]


class Tasks(nn.Module):
    """A trunk of blocks with what the scenarios need around it. `how` says what a forward does; it is set before each step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)])
        self.a, self.b = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)
        self.how: dict[str, Any] = {}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.how.get("backbone without gradients")):
            x = self.inp(x)
            for i, block in enumerate(self.blocks[: self.how.get("depth", 4)]):
                if i == self.how.get("drop"):
                    continue
                if self.how.get("reentrant"):
                    x = x + checkpoint(block, x, use_reentrant=True)
                elif self.how.get("cut") == i:
                    x = x.detach() + block(x).detach()
                else:
                    x = x + block(x)
        if "expert" in self.how:
            x = x + self.experts[self.how["expert"]](x)
        return {name: getattr(self, name)(x) for name in self.how.get("heads", "a")}


def data(step: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(step))


def loss_of(out: dict[str, Tensor], heads: str) -> Tensor:
    return torch.stack([out[name].square().mean() for name in heads]).sum()


def evaluate(model: Any) -> None:
    """Somebody forgot model.eval()."""
    with torch.no_grad():
        model(data(99))


class Scenario:
    """how(step): what the forward does, and with "loss" the heads that count. before, between: called before the forward and before
    backward. freeze: what is frozen before step FREEZE_AT. doubts: warnings that come."""

    def __init__(
        self,
        how: Callable[[int], dict[str, Any]] = lambda step: {},
        *,
        before: Callable[[Any, int], Any] = lambda model, step: None,
        between: Callable[[Any, int], Any] = lambda model, step: None,
        freeze: list[str] = PREFIX,
        doubts: int = 0,
    ) -> None:
        self.how, self.before, self.between, self.freeze, self.doubts = how, before, between, freeze, doubts


def late(step: int, after: Any, before: Any) -> Any:
    return after if step >= FREEZE_AT else before


def switch_off(model: Any, step: int) -> None:
    """As LISA does: other layers train from now on."""
    if step >= FREEZE_AT:
        model.blocks[1].requires_grad_(False)


SCENARIOS = {
    "heads take turns": Scenario(lambda step: {"heads": late(step, "b", "a") if step != 1 else "ab"}),
    "heads take turns from the start": Scenario(lambda step: {"heads": "ab"[step % 2]}),
    "one head until the freeze": Scenario(lambda step: {"heads": late(step, "b", "a")}),
    "both heads run, one loss counts": Scenario(lambda step: {"heads": "ab", "loss": late(step, "b", "ab")}, doubts=1),
    "both heads run on a trunk that is frozen whole": Scenario(
        lambda step: {"heads": "ba", "loss": late(step, "a", "ab")},
        freeze=["embeddings", "blocks.0", "blocks.1", "blocks.2", "blocks.3"],
        doubts=1,
    ),
    "an auxiliary loss ends": Scenario(lambda step: {"heads": late(step, "a", "ab")}),
    "an expert gets no token": Scenario(lambda step: {"expert": late(step, 1, 0)}),
    "a layer is dropped": Scenario(lambda step: {"drop": late(step, 2, None)}),
    "a curriculum goes deeper": Scenario(lambda step: {"depth": late(step, 4, 3)}),
    "an early exit": Scenario(lambda step: {"depth": late(step, 2, 4)}),
    "evaluation in train mode before backward": Scenario(between=lambda model, step: evaluate(model)),
    "evaluation in train mode before the forward": Scenario(before=lambda model, step: evaluate(model)),
    "reentrant regions and evaluation before": Scenario(lambda step: {"reentrant": True}, before=lambda model, step: evaluate(model)),
    "reentrant regions and evaluation between": Scenario(lambda step: {"reentrant": True}, between=lambda model, step: evaluate(model)),
    "a forward whose output is not used": Scenario(between=lambda model, step: model(data(99))),
    "a feature extractor for a while": Scenario(lambda step: {"backbone without gradients": FREEZE_AT <= step < FREEZE_AT + 2}),
    "the user switches a layer off": Scenario(before=switch_off),
}


def train(scenario: Scenario, *, ours: bool, steps: int = STEPS, **settings: Any) -> tuple[dict[str, Tensor], list[str]]:
    """All weights at the end, and the warnings. Not ours: plain torch that freezes with requires_grad_(False)."""
    model = Tasks()
    if scenario.how(0).get("reentrant"):
        model.inp.register_forward_hook(lambda m, a, out: out if out.requires_grad else out.requires_grad_())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    controller = smartfrz_ds.attach_torch(model, optimizer, {"policy": "manual", **settings}) if ours else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            if step == FREEZE_AT and controller is not None:
                controller.freeze(scenario.freeze)
            elif step == FREEZE_AT:
                front = [model.inp, *model.blocks[: len(scenario.freeze) - 1]]
                for p in (p for module in front for p in module.parameters()):
                    p.requires_grad_(False)
                    p.grad = None
            optimizer.zero_grad()
            model.how = scenario.how(step)
            scenario.before(model, step)
            out = model(data(step))
            scenario.between(model, step)
            loss_of(out, model.how.get("loss", model.how.get("heads", "a"))).backward()
            optimizer.step()
    texts = [str(w.message) for w in caught if "smartfrz" in str(w.message)]
    return {n: p.detach().clone() for n, p in model.named_parameters()}, texts


@pytest.mark.parametrize("name", SCENARIOS)
def test_healthy_runs_go_on_and_are_exact(name: str) -> None:
    scenario = SCENARIOS[name]
    weights, warned = train(scenario, ours=True)
    expected, _ = train(scenario, ours=False)
    assert {n: (weights[n] - w).abs().max().item() for n, w in expected.items()} == dict.fromkeys(expected, 0.0)
    assert len(warned) == scenario.doubts, warned
    assert all("were used in a forward but got no gradient" in text for text in warned)


def test_raise_and_off() -> None:
    doubt = SCENARIOS["both heads run, one loss counts"]
    with pytest.raises(MissingGradients, match=r"a\.weight, a\.bias.*gradient_check"):
        train(doubt, ours=True, gradient_check="raise")
    assert train(doubt, ours=True, gradient_check="off")[1] == []
    train(SCENARIOS["heads take turns"], ours=True, gradient_check="raise")  # what does not run is no doubt
    with pytest.raises(ValueError, match=r"smartfrz\.gradient_check: got .loud.; allowed: 'raise', 'warn' or 'off'"):
        train(doubt, ours=True, gradient_check="loud")


CUTS = {
    "detached": Scenario(lambda step: {"cut": late(step, 2, None)}),
    "regions that begin after the freeze": Scenario(lambda step: {"reentrant": step > FREEZE_AT}),
}


@pytest.mark.parametrize("setting", ["warn", "raise"])
@pytest.mark.parametrize("name", CUTS)
def test_a_cut_graph_ends_the_run_before_the_step(name: str, setting: str) -> None:
    with pytest.raises(MissingGradients) as caught:
        train(CUTS[name], ours=True, gradient_check=setting)
    named = str(caught.value).split("before: ")[1]
    assert "blocks.1.0.weight" in named and "blocks.2.0.weight" in named and "a.weight" not in named
    assert ("blocks.3" in named) == (name != "detached")
    train(CUTS[name], ours=True, gradient_check="off")


def test_a_parameter_that_comes_back_cut_is_found() -> None:
    """A batch without its images just after the freeze, and in the next one with images the way to the projector is cut."""

    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.tower = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
            self.projector = nn.Linear(4, 4)
            self.text = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4)) for _ in range(2))
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor, images: Tensor | None, cut: bool) -> Tensor:
            if images is not None:
                for block in self.tower:
                    images = block(images)
                images = self.projector(images)
                x = x + (images.detach() if cut else images)
            for block in self.text:
                x = block(x)
            return self.head(x)

    def run(cut_at: int) -> dict[str, Tensor]:
        model = Images()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        layers = ["tower.*", "projector", "text.*", "head"]
        controller = smartfrz_ds.attach_torch(model, optimizer, {"policy": "manual", "layers": layers})
        for step in range(8):
            if step == 4:
                controller.freeze(["tower.0", "tower.1"])
            optimizer.zero_grad()
            x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
            model(x, None if step in (4, 5) else x, step >= cut_at).square().mean().backward()
            optimizer.step()
        return {n: p.detach() for n, p in model.named_parameters()}

    run(99)  # text alone in two steps: nothing is wrong
    with pytest.raises(MissingGradients, match=r"projector\.weight"):
        run(6)


@pytest.mark.parametrize(("head_runs", "doubts"), [(False, 0), (True, 1)])
def test_a_loss_without_the_tied_head(head_runs: bool, doubts: int) -> None:
    """Background: the frozen embedding's use of the shared weight is cut on purpose. A batch whose loss is on hidden states, so that the
    head doesn't use the weight either, was taken for a cut graph."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.emb = nn.Embedding(9, WIDTH)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))
            self.head = nn.Linear(WIDTH, 9, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, x: Tensor, head: bool) -> tuple[Tensor, Tensor | None]:
            x = self.emb(x)
            for block in self.blocks:
                x = x + block(x)
            return x, self.head(x) if head else None

    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    controller = smartfrz_ds.attach_torch(model, optimizer, {"policy": "manual"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            if step == FREEZE_AT:
                controller.freeze(PREFIX)
            optimizer.zero_grad()
            hidden, logits = model(torch.arange(4 + step % 3), head_runs or step != FREEZE_AT)
            loss = hidden.square().mean()
            if step != FREEZE_AT:
                assert logits is not None
                loss = loss + logits.square().mean()
            loss.backward()
            optimizer.step()
    assert len([w for w in caught if "got no gradient" in str(w.message)]) == doubts


@pytest.fixture
def peft() -> Iterator[Any]:
    yield pytest.importorskip("peft")


@pytest.mark.parametrize("order", ["policy first", "reference first"])
@pytest.mark.parametrize("regions", [False, True])
def test_a_lora_reference_pass_without_gradients(peft: Any, order: str, regions: bool) -> None:
    """As DPO, KTO and GRPO do with one model: the reference is the model without its adapters, in train mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=30, n_positions=8, n_embd=8, n_layer=3, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False
    )

    def run(ours: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        base = GPT2LMHeadModel(config)
        if regions:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
                base.enable_input_require_grads()
        lora = peft.LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.0, init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(base, lora)
        model.train()
        live = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(live, lr=1e-2, weight_decay=0.1)
        controller = smartfrz_ds.attach_torch(model, optimizer, {"policy": "manual"}) if ours else None
        frozen: list[nn.Parameter] = []
        for step in range(7):
            if step == 3:
                frozen = [p for n, p in model.named_parameters() if "h.0." in n and "lora" in n]
                if controller is not None:
                    controller.freeze([n for n in controller.layers if n.endswith(("h.0", "embeddings"))])
                for p in frozen:
                    p.requires_grad_(False)
                    p.grad = None
            optimizer.zero_grad()
            tokens = torch.randint(0, 30, (2, 8), generator=torch.Generator().manual_seed(step))

            def reference(tokens: Tensor = tokens) -> Tensor:
                with torch.no_grad(), model.disable_adapter():
                    return model(input_ids=tokens).logits

            if order == "reference first":
                base_logits = reference()
                logits = model(input_ids=tokens).logits
            else:
                logits = model(input_ids=tokens).logits
                base_logits = reference()
            (logits - base_logits).square().mean().backward()
            if not ours:
                for p in frozen:  # PEFT has switched them on again
                    p.grad = None
            optimizer.step()
        return {n: p.detach().clone() for n, p in model.named_parameters()}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights = run(True)
    expected = run(False)
    assert {n: (weights[n] - w).abs().max().item() for n, w in expected.items()} == dict.fromkeys(expected, 0.0)
    texts = [str(w.message) for w in caught if "smartfrz" in str(w.message)]
    assert all("requires_grad" in text for text in texts) and len(texts) <= 1, texts


def test_a_copy_of_the_model_takes_no_part() -> None:
    model = Tasks()
    smartfrz_ds.attach_torch(model, torch.optim.SGD(model.parameters(), lr=0.1), {"policy": "manual"})
    copied = copy.deepcopy(model)
    loss_of(copied(data(0)), "a").backward()
    loss_of(model(data(0)), "a").backward()
