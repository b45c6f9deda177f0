"""Parts of layers that are layers of their own: a pattern that matches inside what another one matches, and "auto" in a list."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import smartfrz_ds
from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.model.finding.facts import numel_of
from smartfrz_ds.model.flops import FlopMeter, step_flops
from smartfrz_ds.model.flops.kinds import module_flops
from smartfrz_ds.model.freeze_modules import freeze_modules, thaw_modules
from smartfrz_ds.model.keep_active import keep_active, names_inside
from smartfrz_ds.model.layers import Layer, find_layers
from smartfrz_ds.model.order_check import OrderCheck

WIDTH, TOKENS, EXPERTS = 8, 6, 3


class Mixture(nn.Module):
    """One expert a token, as modules in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        chosen = weights.argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if (at := (chosen == i).nonzero(as_tuple=True))[0].numel():
                out = out.index_put(at, expert(x[at]) * weights[at][:, i, None])
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(WIDTH, WIDTH, bias=False)
        self.drop = nn.Dropout(0.5)
        self.mlp = Mixture()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(x * self.scale))
        return x + self.mlp(x)


class Net(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, 10, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.out(self.norm(x))


BANKS = ["auto", "layers.*.mlp.experts"]


def names(net: nn.Module, patterns: Any) -> list[str]:
    layers = find_layers(net, patterns)
    owned = [p for layer in layers for p in layer.params]
    assert len(owned) == len(set(owned)) == len(list(net.parameters())), "each weight is in one layer"
    assert sum(layer.numel for layer in layers) == sum(numel_of(p) for p in net.parameters())
    assert [layer.kind for layer in layers].count("head") == 1 and layers[-1].kind == "head"
    return [layer.name for layer in layers]


def by_name(layers: tuple[Layer, ...]) -> dict[str, Layer]:
    return {layer.name: layer for layer in layers}


def test_a_bank_stands_behind_the_rest_of_its_block() -> None:
    net = Net()
    assert names(net, BANKS) == ["embeddings", "layers.0", "layers.0.mlp.experts", "layers.1", "layers.1.mlp.experts", "head"]
    layers = by_name(find_layers(net, BANKS))
    assert layers["layers.0.mlp.experts"].params == tuple(net.layers[0].mlp.experts.parameters())
    rest = layers["layers.0"]
    assert rest.params == (net.layers[0].scale, net.layers[0].attention.weight, net.layers[0].mlp.router.weight)
    assert net.layers[0].drop in rest.modules, "what has no weights freezes with the rest"
    assert rest.whole is net.layers[0] and all(x.whole is None for x in layers.values() if "experts" in x.name or x.kind != "block")
    assert all(x.whole is None for x in find_layers(net))
    assert net.layers[0].mlp.router in rest.modules and net.layers[0].mlp not in rest.modules
    assert names(net, ["auto"]) == names(net, "auto") == ["embeddings", "layers.0", "layers.1", "head"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["auto", "*.*.mlp.router", "*.*.mlp.experts"], ["embeddings", *(f"layers.0{x}" for x in ("", ".mlp.router", ".mlp.experts"))]),
        (["*.*.attention", "auto", "*.*.mlp.experts"], ["embeddings", *(f"layers.0{x}" for x in (".attention", "", ".mlp.experts"))]),
        (["auto", "*.*.mlp.experts.1"], ["embeddings", "layers.0", "layers.0.mlp.experts.1"]),
        (
            ["auto", "*.*.mlp.experts", "*.*.mlp.experts.1"],
            ["embeddings", *(f"layers.0{x}" for x in ("", ".mlp.experts", ".mlp.experts.1"))],
        ),
        (["auto", "*.*.scale"], ["embeddings", "layers.0", "layers.0.scale"]),
        (["embed", "layers.*", "*.*.mlp.experts.?"], ["embed", "layers.0", *(f"layers.0.mlp.experts.{i}" for i in range(EXPERTS))]),
        (["embed", "*.*.mlp", "layers.*"], ["embed", "layers.0.mlp", "layers.0"]),
    ],
)
def test_the_order_of_parts(patterns: list[str], expected: list[str]) -> None:
    found = names(Net(), patterns)
    assert found[: len(expected)] == expected and found[-1] == "head"
    second = [name.replace("layers.0", "layers.1") for name in expected[1:]]
    assert found[len(expected) : -1] == second


def test_parts_of_the_head_stand_in_front_of_it() -> None:
    assert names(Net(), ["auto", "norm"]) == ["embeddings", "layers.0", "layers.1", "norm", "head"]
    layers = by_name(find_layers(Net(), ["auto", "norm"]))
    assert layers["norm"].kind == "block" and len(layers["head"].params) == 1


def test_parts_that_leave_nothing_or_are_taken_twice_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'auto' makes 'embeddings' a layer, but all its weights are taken by 'embed'"):
        find_layers(Net(), ["auto", "embed"])
    with pytest.raises(ValueError, match=r"'\*\.\*\.mlp\.experts' matches 'layers\.0\.mlp\.experts', but 'layers\.\*\.mlp\.experts' has"):
        find_layers(Net(), [*BANKS, "*.*.mlp.experts"])
    with pytest.raises(ValueError, match=r"got 'auto' 2 times; allowed: once"):
        find_layers(Net(), ["auto", "auto"])
    with pytest.raises(ValueError, match=r"'layers\.\*\.moe' matches no module"):
        find_layers(Net(), ["auto", "layers.*.moe"])


def test_the_settings_take_it() -> None:
    assert FreezeConfig.load({"layers": BANKS}).layers == tuple(BANKS)


def test_the_forward_runs_parts_in_this_order() -> None:
    net, ids = Net(), torch.arange(TOKENS)
    OrderCheck(net, find_layers(net, BANKS))
    net(ids)
    check = OrderCheck(net, find_layers(net, ["*.*.mlp.experts", "auto"]))  # experts in front of what routes to them
    with pytest.raises(ValueError, match="different order"):
        net(ids)
    assert check.done


def test_the_rest_of_a_block_is_frozen_without_the_bank() -> None:
    net = Net().train()
    layers = by_name(find_layers(net, BANKS))
    freeze_modules(layers["layers.0"])
    block = net.layers[0]
    assert not block.drop.training and not block.attention.training and block.mlp.experts.training
    net.train()
    assert not block.drop.training and block.mlp.experts[0].training
    thaw_modules(layers["layers.0"])
    assert block.drop.training


def test_keep_active_names_banks() -> None:
    net = Net()
    layers = find_layers(net, BANKS)
    kept = keep_active(["*.experts"], layers, names_inside(net, layers), "smartfrz.keep_active")
    assert kept.names == {"layers.0.mlp.experts", "layers.1.mlp.experts"} and not kept.inside


def test_flops_of_banks_apart() -> None:
    """Two FLOPs for each weight that a token meets; a bank's gradients cost what its forward costs, each."""
    net, ids = Net(), torch.arange(TOKENS)
    layers = find_layers(net, BANKS)
    meter = FlopMeter(net, layers)
    net(ids)
    assert meter.profile is not None and not meter.estimated
    square, router = 2.0 * TOKENS * WIDTH * WIDTH, 2.0 * TOKENS * WIDTH * EXPERTS
    assert list(meter.profile.forward) == [0, square + router, square, square + router, square, 2.0 * TOKENS * WIDTH * 10]
    everything = step_flops(meter.profile, ()).total
    only_banks = step_flops(meter.profile, [i for i, x in enumerate(layers) if not x.name.endswith("experts")]).total
    # saved: the gradients of the weights of router, attention and head; and those of inputs in front of the first bank
    forward = sum(meter.profile.forward)
    inputs_behind = square + router + square + 2.0 * TOKENS * WIDTH * 10  # attention, router and bank of block 1, and the head
    assert only_banks == forward + 2 * square + inputs_behind
    assert everything > only_banks


@pytest.mark.parametrize("kernel", ["eager", "grouped_mm", "batched_mm"])
def test_flops_of_transformers_experts(kernel: str) -> None:
    """Background: transformers' default, torch's grouped product, was missing from the formulas, and experts counted as nothing."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=2, num_experts_per_tok=2, num_local_experts=4, use_cache=False)
    model = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation(kernel)
    layers = find_layers(model, ["auto", "model.layers.*.mlp.experts"])
    meter = FlopMeter(model, layers)
    model(input_ids=torch.arange(12).view(2, 6))
    assert meter.profile is not None and not meter.estimated
    routed = 12 * 2  # tokens times experts per token
    assert meter.profile.forward[layers.index(next(x for x in layers if x.name.endswith("experts")))] == routed * 2.0 * (16 * 48 + 24 * 16)
    bank = model.model.layers[0].mlp.experts
    assert module_flops(bank, torch.zeros(12, 16), 2) == routed * 2.0 * (16 * 48 + 24 * 16), (
        "the estimate for kernels that cannot be counted"
    )
    banks = [i for i, x in enumerate(layers) if x.name.endswith("experts")]
    saved = step_flops(meter.profile, ()).total - step_flops(meter.profile, banks).total
    assert saved == 2 * routed * 2.0 * (16 * 48 + 24 * 16), "the gradients of the weights of two banks"


class Recomputed(nn.Module):
    """Blocks whose rest runs in front of the experts and behind them, each a region of reentrant checkpointing if `on`."""

    def __init__(self, *, on: bool) -> None:
        super().__init__()
        self.net, self.on = Net(3), on
        self.behind = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        for block, norm in zip(self.net.layers, self.behind, strict=True):
            block.behind = norm
            block.drop.p = 0.0
            with torch.no_grad():
                block.mlp.router.weight[2] = 0.0  # the third expert seldom has a token
        del self.behind

    def forward(self, ids: Tensor) -> Tensor:
        x = self.net.embed(ids)
        for block in self.net.layers:
            x = checkpoint(self.run, block, x, use_reentrant=True) if self.on else self.run(block, x)
        return self.net.out(self.net.norm(x))

    @staticmethod
    def run(block: Any, x: Tensor) -> Tensor:
        return block.behind(block(x))


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        (["auto", "net.layers.*.mlp.experts"], ["embeddings", "net.layers.0", "net.layers.0.mlp.experts", "net.layers.1"]),
        (["auto", "net.layers.*.mlp.experts"], ["embeddings", "net.layers.0", "net.layers.0.mlp.experts", "net.layers.1", "net.layers.2"]),
        (
            ["auto", "net.layers.*.mlp.experts.*"],
            ["embeddings", "net.layers.0", "net.layers.0.mlp.experts.0", "net.layers.0.mlp.experts.1"],
        ),
    ],
)
def test_parts_under_reentrant_checkpointing(patterns: list[str], frozen: list[str]) -> None:
    """Background: an expert without a token in the first forward was not known to be in a region, and its block got no gradients; and
    what runs behind the experts of a frozen rest was cut off."""
    ends = []
    for on in (False, True):
        torch.manual_seed(1)
        model = Recomputed(on=on).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        settings = {"policy": "manual", "order": "any", "layers": patterns, "gradient_check": "raise"}
        if on:
            controller = smartfrz_ds.attach_torch(model, optimizer, settings)
        for step in range(6):
            if step == 2:
                if on:
                    controller.freeze(frozen)
                for p in (p for x in find_layers(model, patterns) if x.name in frozen for p in x.params):
                    p.requires_grad_(False)
                    p.grad = None
            ids = torch.randint(0, 10, (TOKENS,), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(ids).square().mean().backward()
            for p in model.parameters():
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p)  # an expert without a token, in both runs alike
            optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
        if on:
            controller.detach()
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
