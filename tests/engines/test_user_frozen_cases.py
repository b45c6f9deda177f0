"""Siblings of gradual unfreezing, in one process: what the user froze is a part of a layer, tied, has statistics, can't train at all."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from deepspeed.utils import logger
from reference import oracle
from torch import Tensor, nn
from torch.nn import Parameter

import smartfrz_ds
from smartfrz_ds.backends.param_order import insert_in_order
from smartfrz_ds.model.layers import find_layers
from smartfrz_ds.signals.lr_scale import layer_groups

MANUAL = {"policy": "manual"}


def adamw(params: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=oracle.LR, weight_decay=oracle.DECAY)


def trainable(model: nn.Module) -> list[Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def attached(model: nn.Module, config: Any = MANUAL, params: Any = None, **more: Any) -> tuple[Any, Any]:
    optimizer = adamw(trainable(model) if params is None else params)
    return smartfrz_ds.attach_torch(model, optimizer, config, **more), optimizer


def step(model: nn.Module, optimizer: Any, number: int) -> None:
    optimizer.zero_grad()
    oracle.loss_of(model, *oracle.data(number, 0, 0), "fp32").backward()
    optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}


@contextmanager
def lines() -> Iterator[list[str]]:
    """What is logged meanwhile."""
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    levels = {heard: heard.level for heard in (logger, logging.getLogger("smartfrz_ds"))}
    for heard in levels:
        heard.addHandler(handler)
        heard.setLevel(logging.INFO)
    try:
        yield seen
    finally:
        for heard, level in levels.items():
            heard.removeHandler(handler)
            heard.setLevel(level)


def same_as_torch(
    make: Callable[[], nn.Module], plan: dict[int, tuple[str, list[str]]], users: Callable[[str], bool], prefix: dict[str, str]
) -> Any:
    """Train with `plan` and in plain torch, and compare all tensors after each step.

    users: whether the user froze a parameter, by name. prefix: of the names of each layer's tensors.
    """
    ours, plain = make(), make()
    for net in (ours, plain):
        for name, p in net.named_parameters():
            p.requires_grad_(not users(name))
    controller, optimizer = attached(ours, {"policy": "manual", "order": "any"})
    reference = adamw(plain.parameters())
    for number in range(max(plan) + 3):
        action, layers = plan.get(number, ("", []))
        if layers:
            getattr(controller, action)(layers)
            starts = tuple(prefix[x] for x in layers)
            for name, p in plain.named_parameters():
                if name.startswith(starts):
                    p.requires_grad_(action == "thaw")
                    reference.state.pop(p, None)
            for name, module in plain.named_modules():
                if f"{name}.".startswith(starts):
                    module.train(action == "thaw")
        step(ours, optimizer, number)
        step(plain, reference, number)
        assert not moved(weights(plain), ours), number
    return controller


# --- what the user froze a part of --------------------------------------------------------------------------------------------------


def test_lora_base_weights_stay_frozen() -> None:
    """freeze and thaw of a layer with adapters touch the adapters alone, as do thaw(frozen) and thaw of a layer that is active."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(oracle.Net(), peft.LoraConfig(target_modules=["up", "down"], r=2, init_lora_weights=False))
    controller, optimizer = attached(model)
    blocks = [name for name in controller.layers if ".blocks." in name]
    bases = {n for n, p in model.named_parameters() if not p.requires_grad}
    users = [n for n in controller.layers if n not in blocks]
    assert len(blocks) == 5 and list(controller.report().user_frozen) == users  # the embeddings and the head have no adapters
    start = weights(model)
    controller.freeze(blocks[:2])
    step(model, optimizer, 0)
    controller.thaw(controller.frozen)
    with lines() as said:
        controller.thaw(blocks)
    assert any(f"{blocks[3]} is active; a part of it was frozen by the user and stays so" in line for line in said)
    step(model, optimizer, 1)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == bases
    assert not moved(start, model) & bases and list(controller.report().user_frozen) == users


def test_a_bias_of_an_active_layer_stays_the_users() -> None:
    net = oracle.Net()
    net.blocks[2].up.bias.requires_grad_(False)
    controller, optimizer = attached(net, {"policy": "manual", "order": "any"})
    start = weights(net)
    for number, action in enumerate(("thaw", "freeze", "thaw")):
        getattr(controller, action)(["blocks.2"])
        step(net, optimizer, number)
    assert "blocks.2.up.bias" not in moved(start, net) and "blocks.2.up.weight" in moved(start, net)
    assert not net.blocks[2].up.bias.requires_grad and controller.report().user_frozen == ()


def test_all_of_a_layer_that_only_the_user_froze_trains() -> None:
    """Once it was thawed by name, the layer is an ordinary one: its bias too freezes and thaws with it."""
    prefix = {f"blocks.{i}": f"blocks.{i}." for i in range(5)}
    plan = {1: ("thaw", ["blocks.2"]), 3: ("freeze", ["blocks.2"]), 4: ("thaw", ["blocks.2"])}
    controller = same_as_torch(oracle.Net, plan, lambda name: name.startswith("blocks.2."), prefix)
    assert controller.report().user_frozen == () and [e.kind for e in controller.report().events] == ["thaw", "freeze", "thaw"]


# --- statistics, tied weights -------------------------------------------------------------------------------------------------------


class Normed(oracle.Net):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.norm = nn.BatchNorm1d(oracle.WIDTH)


def test_running_statistics() -> None:
    """A layer of the user's keeps its mode and goes on counting; frozen by us it stands still, and counts again after a thaw."""
    plan = {2: ("thaw", ["blocks.1"]), 4: ("freeze", ["blocks.1"]), 6: ("thaw", ["blocks.1"])}
    same_as_torch(Normed, plan, lambda name: name.startswith(("blocks.0.", "blocks.1.")), {"blocks.1": "blocks.1."})


class Tied(nn.Module):
    """Numbers in, as `oracle.data` has them; the head's weight is the embeddings'."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.wpe = nn.Embedding(oracle.CLASSES, oracle.WIDTH), nn.Embedding(oracle.INPUTS, oracle.WIDTH)
        self.blocks = nn.ModuleList(oracle.Block(oracle.WIDTH) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(oracle.WIDTH), nn.Linear(oracle.WIDTH, oracle.CLASSES, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.wte(x.gt(0).long()) + self.wpe(torch.arange(oracle.INPUTS))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def test_tied_embeddings_that_the_user_froze() -> None:
    """Thawed by name, both ends train the weight."""
    controller = same_as_torch(Tied, {2: ("thaw", ["embeddings"])}, lambda name: name.startswith(("wte", "wpe")), {"embeddings": "w"})
    assert controller.report().user_frozen == ()


def test_everything_but_a_tied_head() -> None:
    """The head's weight is the embeddings': it trains from the start. Thawing the embeddings lets the rest of them train."""
    plan = {1: ("thaw", ["blocks.2"]), 2: ("thaw", ["blocks.1", "blocks.0"]), 4: ("thaw", ["embeddings"])}
    prefix = {f"blocks.{i}": f"blocks.{i}." for i in range(3)} | {"embeddings": "wpe"}
    same_as_torch(Tied, plan, lambda name: name.startswith(("wpe", "blocks")), prefix)


def test_a_head_that_only_borrows() -> None:
    """All that the head uses belongs to the embeddings, which the user froze: said, with what to thaw."""
    net = Tied()
    net.norm = nn.Identity()
    net.wte.requires_grad_(False)
    net.wpe.requires_grad_(False)
    controller, _ = attached(net)
    with pytest.raises(ValueError, match=r"all weights of 'head' are shared with \['embeddings'\], which own them; allowed: thaw"):
        controller.thaw(["head"])
    assert controller.report().user_frozen == ("embeddings", "head") and not net.wte.weight.requires_grad
    controller.thaw(["head", "embeddings"])
    assert controller.report().user_frozen == () and net.wte.weight.requires_grad


# --- bookkeeping ----------------------------------------------------------------------------------------------------------------------


def frozen_front(count: int) -> oracle.Net:
    net = oracle.Net()
    for module in (net.inp, *net.blocks[: count - 1]):
        module.requires_grad_(False)
    return net


def test_freeze_leaves_it_to_the_user() -> None:
    """No error, a line in the log, not among `frozen`; a prefix of the user's counts as frozen for front_to_back."""
    net = frozen_front(3)
    controller, optimizer = attached(net)
    with lines() as said:
        controller.freeze(["embeddings", "blocks.1", "blocks.2"])
    assert any("freeze: already frozen by the user: blocks.1, embeddings" in line for line in said)
    assert controller.frozen == ("blocks.2",) and controller.report().events[-1].layers == ("blocks.2",)
    with lines() as said:
        controller.freeze("blocks.0")
    assert "already frozen by the user: blocks.0" in said[-1] and len(controller.report().events) == 1
    step(net, optimizer, 0)
    controller.thaw(controller.frozen)
    assert controller.report().user_frozen == ("embeddings", "blocks.0", "blocks.1")
    with pytest.raises(ValueError, match=r"'blocks.4' can't be frozen while 'blocks.2' in front of it is active"):
        controller.freeze(["blocks.4"])
    controller.thaw(["blocks.1"])
    with pytest.raises(ValueError, match=r"'blocks.2' can't be frozen while 'blocks.1' in front of it is active"):
        controller.freeze(["blocks.2"])


def test_nothing_changes_where_it_is_refused() -> None:
    """Not at a step boundary; a later call works."""
    net = frozen_front(3)
    controller, optimizer = attached(net)
    step(net, optimizer, 0)
    oracle.loss_of(net, *oracle.data(1, 0, 0), "fp32").backward()
    groups = [list(g["params"]) for g in optimizer.param_groups]
    with pytest.raises(RuntimeError, match="step boundary"):
        controller.thaw(["blocks.1"])
    assert controller.frozen == () and controller.report().user_frozen == ("embeddings", "blocks.0", "blocks.1")
    assert [list(g["params"]) for g in optimizer.param_groups] == groups and not net.blocks[1].up.weight.requires_grad
    optimizer.step()
    start = weights(net)
    controller.thaw(["blocks.1"])
    step(net, optimizer, 1)
    assert {n for n in moved(start, net) if n.startswith("blocks.1.")} == {n for n in start if n.startswith("blocks.1.")}


def test_quantized_weights_are_refused() -> None:
    net = oracle.Net()
    net.blocks[1].requires_grad_(False)
    net.blocks[1].up.weight = Parameter(torch.zeros(3 * oracle.WIDTH, oracle.WIDTH, dtype=torch.uint8), requires_grad=False)
    controller, _ = attached(net)
    with pytest.raises(ValueError, match=r"'blocks.1.up.weight' has dtype torch.uint8.* allowed: floating-point weights"):
        controller.thaw(["blocks.1"])
    assert controller.report().user_frozen == ("blocks.1",) and not net.blocks[1].norm.weight.requires_grad


def test_learning_rates_of_single_layers() -> None:
    """A policy that sets them: refused where the layer would share a group, its own rate where the user gave it a group of its own."""
    section = {"policy": "freezeout", "total_steps": 30}
    net = frozen_front(2)
    controller, _ = attached(net, section, layer_groups(find_layers(net)))
    with pytest.raises(ValueError, match=r"'freezeout' scales learning rates per layer.*blocks.0.*allowed: leave it trainable"):
        controller.thaw(["blocks.0"])
    assert controller.report().user_frozen == ("embeddings", "blocks.0")
    net = oracle.Net()
    own = layer_groups(find_layers(net))  # one for each layer, before the user freezes
    for module in (net.inp, net.blocks[0]):
        module.requires_grad_(False)
    controller, optimizer = attached(net, section, own)
    step(net, optimizer, 0)
    controller.thaw(["embeddings", "blocks.0"])
    step(net, optimizer, 1)
    rates = controller._policy_stage.inputs._scale.rates
    assert set(rates) == set(controller.layers) and len({rates[n] for n in ("embeddings", "blocks.0", "blocks.4")}) == 3


def test_a_policy_sees_the_layer() -> None:
    """Gradients and weights of a layer that came later are sampled like those of the others, and its work is counted."""
    net = frozen_front(2)
    section = {"policy": "autofreeze", "freeze_interval": 50, "warmup_steps": 1000, "snapshot_interval": 1}
    controller, optimizer = attached(net, section)
    step(net, optimizer, 0)
    before = controller._tally.profile
    controller.thaw(["blocks.0"])
    for number in range(1, 4):
        step(net, optimizer, number)
    rows = controller._policy_stage.inputs._sums._total.view(len(controller.layers), -1).abs().sum(1)
    seen = dict(zip(controller.layers, rows.gt(0).tolist(), strict=True))
    assert seen == {name: name != "embeddings" for name in controller.layers}
    assert "blocks.0" in controller._recording.history.windows() and "embeddings" not in controller._recording.history.windows()
    layers = {i for g in controller._tally.profile.gradients for i in g.layers}
    assert layers - {i for g in before.gradients for i in g.layers} == {1}


# --- which group ----------------------------------------------------------------------------------------------------------------------


def test_without_a_parameter_of_the_same_name() -> None:
    """The embeddings have no other layer like them: matrices join matrices, vectors vectors."""
    net = frozen_front(1)
    params = trainable(net)
    controller, optimizer = attached(net, MANUAL, oracle.groups_of(params, params, 2))
    controller.thaw(["embeddings"])
    matrices, vectors = (set(g["params"]) for g in optimizer.param_groups)
    assert net.inp.weight in matrices and net.inp.bias in vectors


def test_of_two_as_near_the_one_behind() -> None:
    net = oracle.Net()
    net.blocks[2].requires_grad_(False)
    groups = [{"params": [p for n, p in net.named_parameters() if p.requires_grad and n.startswith(f"blocks.{i}.")]} for i in (1, 3)]
    rest = {"params": [p for n, p in net.named_parameters() if p.requires_grad and not n.startswith(("blocks.1.", "blocks.3."))]}
    controller, optimizer = attached(net, MANUAL, [*groups, rest])
    controller.thaw(["blocks.2"])
    assert set(net.blocks[2].parameters()) <= set(optimizer.param_groups[1]["params"])


def test_the_order_in_which_layers_come_does_not_matter() -> None:
    """A resumed run takes layers in all at once, the original one by one: their groups must be alike."""
    params = [Parameter(torch.zeros(1)) for _ in range(7)]
    order = {p: k for k, p in enumerate(params)}
    chance = random.Random(0)
    for _ in range(40):
        start = chance.sample(params, 3)
        coming = [p for p in params if not any(p is q for q in start)]
        results = []
        for sequence in itertools.permutations(coming):
            group = list(start)
            for p in sequence:
                insert_in_order(group, p, order)
            results.append([order[p] for p in group])
        assert all(r == results[0] for r in results)


def test_a_layer_of_another_optimizer_is_not_the_users() -> None:
    """Its weights train elsewhere: neither frozen by the user, nor taken in, whatever the user froze of it."""
    net = oracle.Net()
    net.blocks[1].up.bias.requires_grad_(False)
    mine = [p for n, p in net.named_parameters() if p.requires_grad and not n.startswith("blocks.1.")]
    with pytest.warns(RuntimeWarning, match="does not hold all trainable parameters"):
        controller, _ = attached(net, MANUAL, mine)
    assert controller.report().user_frozen == ()
    controller.thaw(["blocks.1"])
    assert not net.blocks[1].up.bias.requires_grad


def test_the_pause_is_predicted() -> None:
    """As for a layer that this package froze, without taking it in."""
    net = frozen_front(2)
    controller, _ = attached(net)
    own, users = controller.predict_pause(["blocks.2"], action="freeze"), controller.predict_pause(["blocks.0"], action="thaw")
    assert users.cost.copied_bytes == 2 * sum(p.nbytes for p in net.blocks[0].parameters()) and own.cost.copied_bytes == 0
    assert controller.report().user_frozen == ("embeddings", "blocks.0") and not net.blocks[0].up.weight.requires_grad
