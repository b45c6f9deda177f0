"""In one process: learning rates of layers, and sums of their sampled gradients."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from reference.bounds import rounding
from torch import Tensor, nn

from smartfrz_ds.backends.base import SampleRequest
from smartfrz_ds.model.layers import find_layers
from smartfrz_ds.signals.gradients import GradientSums
from smartfrz_ds.signals.lr_scale import LrScale, layer_groups

CPU = torch.device("cpu")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)), nn.Linear(4, 1))


# --- learning rates -------------------------------------------------------------------------------------------------------------


def groups_of(model: nn.Module, decay: bool) -> list[dict[str, Any]]:
    """One group a layer, or two: matrices with decay and at twice the rate, vectors without."""
    groups = layer_groups(find_layers(model))
    if not decay:
        return groups
    split = [[p for p in group["params"] if (p.ndim > 1) == matrix] for group in groups for matrix in (True, False)]
    return [{"params": params, "lr": (2 if params[0].ndim > 1 else 1) * 0.1, "weight_decay": 0.1 * params[0].ndim} for params in split]


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("scheduler", ["ExponentialLR", "CosineAnnealingLR"])
def test_a_scaled_step_is_a_step_at_the_scaled_rate_and_the_scheduler_never_knows(decay: bool, scheduler: str) -> None:
    """Beside it, a copy whose rates are written by hand from the closed form of the schedule."""
    model, other = net(), net()
    optimizer = torch.optim.AdamW(groups_of(model, decay), lr=0.1)
    by_hand = torch.optim.AdamW(groups_of(other, decay), lr=0.1)
    layers = find_layers(model)
    scale = LrScale(optimizer, [group["params"] for group in optimizer.param_groups], layers)
    scale.start()
    kind: Any = getattr(torch.optim.lr_scheduler, scheduler)
    argument = 0.9 if scheduler == "ExponentialLR" else 20
    schedule, alone = kind(optimizer, argument), kind(torch.optim.SGD([torch.zeros(1)], lr=0.1), argument)
    per_layer = 2 if decay else 1
    for step in range(8):
        factors = {layers[0].name: 1 / (1 + step), layers[1].name: 0.5}
        scale.set(factors)
        for m, o in ((model, optimizer), (other, by_hand)):
            o.zero_grad()
            m(torch.randn(3, 4, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        now = alone.optimizer.param_groups[0]["lr"]
        for i, group in enumerate(by_hand.param_groups):
            base = (2.0 if decay and i % 2 == 0 else 1.0) * now
            group["lr"] = base * factors.get(layers[i // per_layer].name, 1.0)
        rates = {layer.name: (2.0 if decay else 1.0) * now * factors.get(layer.name, 1.0) for layer in layers}
        assert scale.rates == pytest.approx(rates, rel=1e-12)
        optimizer.step()
        by_hand.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx((2.0 if decay else 1.0) * now, rel=1e-12)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-12, atol=0)
        schedule.step()
        alone.optimizer.step()
        alone.step()


def test_a_step_that_broke_off_leaves_no_factor_behind() -> None:
    model = net()
    optimizer = torch.optim.SGD(groups_of(model, False), lr=0.1)
    scale = LrScale(optimizer, [group["params"] for group in optimizer.param_groups], find_layers(model))
    scale.start()
    scale.set({find_layers(model)[0].name: 0.5})

    def broken() -> float:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step(broken)
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * 3


def test_factors_hold_after_the_groups_were_loaded_from_a_checkpoint() -> None:
    model = net()
    optimizer = torch.optim.SGD(groups_of(model, False), lr=0.1)
    layers = find_layers(model)
    scale = LrScale(optimizer, [group["params"] for group in optimizer.param_groups], layers)
    scale.start()
    optimizer.load_state_dict(optimizer.state_dict())  # makes new dictionaries
    scale.set({layers[0].name: 0.0})
    model(torch.ones(3, 4)).sum().backward()
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)]
    assert moved == [False, False, True, True, True, True]


def test_a_group_of_several_layers_is_refused_by_name() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"parameter groups that contain one layer each.*group 0 contains weights of 0, 1, head\. smartfrz_ds\.initialize"
    ):
        LrScale(optimizer, [list(model.parameters())], find_layers(model))


# --- gradients ------------------------------------------------------------------------------------------------------------------


def sums_of(model: nn.Sequential, scale: list[float]) -> GradientSums:
    """Of each layer its weight's first four entries; columns 4 to 7 stay empty."""
    layers = find_layers(model)
    weights = [next(p for p in layer.params if p.ndim > 1) for layer in layers]
    requests = [[SampleRequest(w, torch.arange(4), 8 * row + torch.arange(4))] for row, w in enumerate(weights)]
    return GradientSums([layer.name for layer in layers], requests, 8, CPU, lambda: scale[0])


def backward(model: nn.Sequential, seed: int, factor: float = 1.0) -> Tensor:
    """Its own contribution to the first layer's weight, computed without hooks on the side."""
    loss = model(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))).square().sum()
    (own,) = torch.autograd.grad(loss, [model[0][0].weight], retain_graph=True)  # type: ignore[index,list-item]
    (factor * loss).backward()
    return own.flatten()[:4]


def test_sums_run_over_steps_and_micro_batches_and_leave_out_skipped_steps() -> None:
    model, scale = net(), [1.0]
    sums = sums_of(model, scale)
    names = [layer.name for layer in find_layers(model)]
    hooked = 2.0  # autograd.grad in `backward` passes the hook too
    expected = hooked * (backward(model, 0) + backward(model, 1))  # two micro-batches, p.grad holds their running sum
    sums.end_step(applied=True)
    backward(model, 2)
    sums.end_step(applied=False)
    taken = sums.take(names[:2])
    assert (
        list(taken) == names[:2]
        and (taken[names[0]][:4] - expected).abs().max() <= rounding(4, float(expected.abs().max()))
        and taken[names[0]][4:].count_nonzero() == 0
    )
    assert torch.equal(sums.take(names)[names[0]], taken[names[0]]), "taking changes nothing"
    sums.restart()
    assert sums.take(names)[names[0]].count_nonzero() == 0


def test_the_loss_scale_is_read_once_a_step() -> None:
    """Background: a GradScaler's scale is on the device; it was read for each sampled parameter of each micro-batch."""
    model, reads = net(), []

    def scale() -> float:
        reads.append(1)
        return 1.0

    sums = sums_of(model, [1.0])
    sums._loss_scale = scale
    for step in range(3):
        for micro in range(2):
            backward(model, 2 * step + micro)
        sums.end_step(applied=step != 1)
    assert len(reads) == 3


def test_sums_are_of_the_unscaled_loss() -> None:
    model, scale = net(), [1.0]
    sums, names = sums_of(model, scale), [layer.name for layer in find_layers(model)]
    plain = model(torch.ones(3, 4)).square().sum()
    plain.backward()
    sums.end_step(applied=True)
    expected = sums.take(names)[names[0]]
    sums.restart()
    scale[0] = 2.0**12
    (2.0**12 * model(torch.ones(3, 4)).square().sum()).backward()
    sums.end_step(applied=True)
    assert torch.equal(sums.take(names)[names[0]], expected) and expected.count_nonzero() > 0


def test_a_state_goes_on_and_a_foreign_one_leaves_the_interval_unknown() -> None:
    model = net()
    sums, names = sums_of(model, [1.0]), [layer.name for layer in find_layers(model)]
    backward(model, 0)
    sums.end_step(applied=True)
    sums.forget([names[1]])
    sums.sync_for_checkpoint()
    state = json.loads(json.dumps(sums.state_dict()))
    expected = sums.take(names)
    assert list(expected) == [names[0], names[2]], "a layer that trained in a part of the interval has no number"
    sums.remove()
    again = sums_of(model, [1.0])
    again.load_state_dict(state)
    assert all(torch.equal(again.take(names)[n], expected[n]) for n in expected) and again.take(names).keys() == expected.keys()
    for unknown in (None, {"sums": {**state["sums"], "shape": [12, 2]}, "stale": []}):
        again.load_state_dict(unknown)
        assert again.take(names) == {}
        again.restart()
        assert list(again.take(names)) == names
