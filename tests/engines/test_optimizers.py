"""Optimizers whose state is not laid out like the weights: per-parameter state goes and comes back whole, flat partitions refuse before
anything changes. And several optimizers in a container or a list."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_worker
from reference import optimizers, oracle
from reference.optimizers import MAKERS, Container
from reference.oracle import layer_of
from safetensors.torch import load_file
from torch import nn

import smartfrz_ds
from smartfrz_ds.backends.state_layout import pack_state, to_device, to_host, unpack_state

STEPS = 8
FIRST = ["embeddings", "blocks.0"]
PLAN = {3: ("freeze", FIRST), 6: ("thaw", FIRST)}
needs_bitsandbytes = pytest.mark.skipif(optimizers.bitsandbytes is None, reason="bitsandbytes (125 MB) is not installed")
NAMES = [pytest.param(name, marks=needs_bitsandbytes if name == "8 bit" else ()) for name in MAKERS if name != "adamw"]
SETTINGS = {"policy": "manual", "order": "any"}


def net() -> oracle.Net:
    return oracle.Net(blocks=2)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


def gradients(model: nn.Module, step: int) -> None:
    oracle.loss_of(model, *oracle.data(step, 0, 0), "fp32").backward()


def expected(name: str, *, keep: bool, steps: int = STEPS) -> nn.Module:
    model = net()
    plan = {step: (what, lambda n, layers=layers: layer_of(n) in layers) for step, (what, layers) in PLAN.items()}
    optimizers.reference(name, model, gradients, plan, steps, keep)
    return model


def train(model: nn.Module, optimizer: Any, controller: Any, steps: range) -> None:
    for step in steps:
        if step in PLAN:
            getattr(controller, PLAN[step][0])(PLAN[step][1])
        optimizer.zero_grad()
        gradients(model, step)
        optimizer.step()


@pytest.mark.parametrize("keep", [0, 100])
@pytest.mark.parametrize("name", NAMES)
def test_one_process(name: str, keep: int, tmp_path: Path) -> None:
    """Exact against plain torch through a freeze and a thaw; kept state goes through a file where it is kept."""
    model = net()
    optimizer = MAKERS[name](list(model.parameters()), lr=1e-2, weight_decay=0.1)
    controller = smartfrz_ds.attach_torch(model, optimizer, SETTINGS | {"keep_state": keep})
    train(model, optimizer, controller, range(3))
    before, full = weights(model), controller.report().optimizer_bytes
    train(model, optimizer, controller, range(3, 5))
    frozen = [p for n, p in model.named_parameters() if layer_of(n) in FIRST]
    assert controller.report().optimizer_bytes < full and not any(p in optimizer.state for p in frozen)
    assert torch.equal(weights(model)[: sum(p.numel() for p in frozen)], before[: sum(p.numel() for p in frozen)])
    controller.save(tmp_path)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer, controller, range(5, STEPS))
    assert torch.equal(weights(model), weights(expected(name, keep=bool(keep))))
    # The same from the files, in a new process's objects.
    again = net()
    optimizer = MAKERS[name](list(again.parameters()), lr=1e-2, weight_decay=0.1)
    controller = smartfrz_ds.attach_torch(again, optimizer, SETTINGS | {"keep_state": keep})
    controller.restore(tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=False)
    again.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    train(again, optimizer, controller, range(5, STEPS))
    assert torch.equal(weights(again), weights(expected(name, keep=bool(keep))))


@needs_bitsandbytes
def test_settings_of_single_parameters_follow_them() -> None:
    """bitsandbytes finds its overrides by position, which a freeze changes: the head keeps its own rate."""

    def run(freeze: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model = net()
        manager = optimizers.bitsandbytes.optim.GlobalOptimManager.get_instance()
        manager.initialize()
        manager.register_parameters(list(model.parameters()))
        optimizer = optimizers.adamw_8bit(list(model.parameters()))
        manager.override_config(model.head.weight, "lr", 1e-4)
        manager.register_parameters(list(model.parameters()))
        controller = smartfrz_ds.attach_torch(model, optimizer, SETTINGS)
        for step in range(4):
            if step == 2:
                if freeze:
                    controller.freeze(FIRST)
                else:
                    for n, p in model.named_parameters():
                        p.requires_grad_(layer_of(n) not in FIRST)
            optimizer.zero_grad()
            gradients(model, step)
            optimizer.step()
        manager.initialize()
        return weights(model), model.head.weight.detach()

    (own, head), (plain, _) = run(True), run(False)
    assert torch.equal(own, plain)
    assert (head - net().head.weight).abs().max() < 1e-3, "the override holds"


def test_state_survives_host_and_file() -> None:
    """Lists, tuples, dictionaries, None, numbers and shared tables; scalars go where the optimizer counts."""
    table, param = torch.arange(3.0), nn.Parameter(torch.zeros(2))
    state = {
        "step": torch.tensor(3.0),
        "q": [torch.ones(2, 2), None, (1, torch.zeros(1))],
        "more": {"a": torch.ones(1), "b": "name"},
        "t1": table,
        "t2": table,
        "rms": 0.5,
    }
    packed = pack_state(to_host(state))
    assert packed is not None
    back = to_device(unpack_state(json.loads(json.dumps(packed[0])), packed[1], param), param, scalars_beside=False)
    assert repr(back) == repr({k: back[k] for k in back}) and {k: repr(v) for k, v in back.items()} == {
        k: repr(v) for k, v in state.items()
    }
    beside = to_device({"step": torch.tensor(3.0)}, nn.Parameter(torch.zeros(2, device="meta")), scalars_beside=True)
    assert beside["step"].device.type == "meta", "a fused optimizer counts on the device"
    kept = to_device({"step": torch.tensor(3.0)}, nn.Parameter(torch.zeros(2, device="meta")), scalars_beside=False)
    assert kept["step"].device.type == "cpu"


# ---- DeepSpeed and FSDP2, two ranks --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [name for name in ("imitated 8 bit", "8 bit") if name != "8 bit" or optimizers.bitsandbytes is not None]
    return run_worker("optimizers", {"names": names}, tmp_path_factory.mktemp("optimizers"), timeout=400)


def facts(folder: Path, name: str, rank: int = 0) -> Any:
    return json.loads((folder / f"{name}.{rank}.json").read_text())


EIGHT_BIT = [pytest.param("imitated 8 bit"), pytest.param("8 bit", marks=needs_bitsandbytes)]


@pytest.mark.distributed(2)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_zero_0(folder: Path, name: str, dtype: str) -> None:
    for rank in (0, 1):
        found = facts(folder, f"z0-{dtype}-{name}", rank)
        assert found["frozen moved"] == 0.0 and found["difference"] == 0.0
        assert found["bytes"][1] < found["bytes"][0] and found["trained"] > 1e-3


@pytest.mark.distributed(2)
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_flat_partitions_refuse_and_go_on(folder: Path, name: str, stage: int) -> None:
    """Refused by name before anything changes: the run equals the one in which nothing was asked for, bit for bit."""
    run, control = (load_file(folder / f"z{stage}-{name}-{how}.safetensors")["weights"] for how in ("asked", "not"))
    assert torch.equal(run, control)
    for rank in (0, 1):
        found = facts(folder, f"z{stage}-{name}-asked", rank)
        assert found["frozen"] == [] and found["warned at start"] == 1
        assert "no layer can leave or join a flat partition" in found["said"] and "ZeRO stage 0" in found["said"]
        assert found["policy"] == {"frozen": [], "steps": 8, "warnings": 1}


@pytest.mark.distributed(2)
def test_fsdp2(folder: Path) -> None:
    """State that is partly a DTensor of the weight's layout, partly plain tensors of a shard, through a freeze, a thaw and files."""
    for rank in (0, 1):
        found = facts(folder, "fsdp2", rank)
        assert found["difference"] == 0.0 and found["frozen moved"] == 0.0 and found["trained"] > 1e-3
        assert found["bytes"][1] < found["bytes"][0] and found["resumed"] == 0.0


# ---- several optimizers --------------------------------------------------------------------------------------------------------------


def halves(model: nn.Module) -> list[list[Any]]:
    params = list(model.parameters())
    return [params[:5], params[5:]]


def listed(model: nn.Module) -> tuple[Any, Any]:
    """A list of optimizers, and what steps them."""
    inner = [torch.optim.AdamW(part, lr=1e-2, weight_decay=0.1) for part in halves(model)]

    class All:
        def step(self) -> None:
            for optimizer in inner:
                optimizer.step()

        def zero_grad(self) -> None:
            for optimizer in inner:
                optimizer.zero_grad()

    return inner, All()


def contained(model: nn.Module, parts: list[list[Any]]) -> tuple[Any, Any]:
    container = Container(parts, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    return container, container


CONTAINERS: dict[str, Callable[[nn.Module], tuple[Any, Any]]] = {
    "torchtitan": lambda model: contained(model, halves(model)),
    "of one": lambda model: contained(model, [list(model.parameters())]),
    "list": listed,
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers(kind: str) -> None:
    """What froze is released inside of the real optimizers, exactly as in plain torch with one."""
    model = net()
    held, stepped = CONTAINERS[kind](model)
    controller = smartfrz_ds.attach_torch(model, held, SETTINGS | {"keep_state": 100})
    inner = list(getattr(held, "optimizers", held))
    train(model, stepped, controller, range(3))
    full = controller.report().optimizer_bytes
    assert full == sum(v.nbytes for x in inner for s in x.state.values() for v in s.values() if v.ndim)
    train(model, stepped, controller, range(3, 5))
    frozen = {p for n, p in model.named_parameters() if layer_of(n) in FIRST}
    assert controller.report().optimizer_bytes == full - 2 * sum(p.nbytes for p in frozen)
    assert not any(p in frozen for x in inner for group in x.param_groups for p in group["params"])
    assert not any(p in x.state for x in inner for p in frozen)
    train(model, stepped, controller, range(5, STEPS))
    plain = net()
    plan = {step: (what, lambda n, layers=layers: layer_of(n) in layers) for step, (what, layers) in PLAN.items()}
    optimizers.reference("adamw", plain, gradients, plan, STEPS, keep=True)
    assert torch.equal(weights(model), weights(plain))
    assert controller.step == STEPS and smartfrz_ds.attach_torch(model, held, SETTINGS) is controller
    controller.release()
    assert sum(len(group["params"]) for x in inner for group in x.param_groups) == len(list(model.parameters()))
    assert not any(hasattr(x, name) for x in inner for name in ("smartfrz", "smartfrz_several"))
    assert not any(x._optimizer_step_pre_hooks or x._optimizer_step_post_hooks for x in inner)


def test_different_optimizers_together_with_rates_by_layer() -> None:
    """Of two kinds, and a policy that hooks the step for the rates of single layers."""
    model = net()
    front = [{"params": list(layer.parameters())} for layer in (model.inp, *model.blocks)]
    inner = [torch.optim.SGD(front, lr=1e-2, momentum=0.9), torch.optim.AdamW(model.head.parameters(), lr=1e-2)]
    controller = smartfrz_ds.attach_torch(model, tuple(inner), {"policy": "freezeout", "freeze_interval": 5, "snapshot_interval": 5,
                                                                   "warmup_steps": 0, "total_steps": 20})  # fmt: skip
    for step in range(20):
        for optimizer in inner:
            optimizer.zero_grad()
        gradients(model, step)
        for optimizer in inner:
            optimizer.step()
        assert [group["lr"] for x in inner for group in x.param_groups] == [1e-2] * 4
    assert controller.step == 20 and controller.frozen


def test_optimizers_that_step_unequally_are_counted_by_common_steps() -> None:
    model = net()
    first, second = (torch.optim.AdamW(part) for part in halves(model))
    controller = smartfrz_ds.attach_torch(model, [first, second], SETTINGS)
    with pytest.warns(RuntimeWarning, match="do not all step equally often"):
        for step in range(4):
            first.zero_grad()
            second.zero_grad()
            gradients(model, step)
            first.step()
            if step % 2:
                second.step()
    assert controller.step == 2


class OptimizersInBackwardContainer(Container):
    """By its name one of torchtitan's that steps in hooks."""


def in_backward(model: nn.Module) -> Any:
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    return torch.optim.SGD(model.parameters(), lr=0.1)


def named(model: nn.Module) -> Any:
    from torch.distributed.optim import _NamedOptimizer

    return _NamedOptimizer(model.named_parameters(), torch.optim.SGD, lr=0.1)


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "in backward": (in_backward, "runs in backward"),
    "in backward container": (lambda m: OptimizersInBackwardContainer(halves(m), torch.optim.SGD, lr=0.1), "during backward"),
    "named": (named, "_NamedOptimizer"),
    "empty": (lambda m: [], "empty list"),
    "no optimizer in it": (lambda m: [torch.optim.SGD(m.parameters()), "adam"], "got str"),
    "twice": (lambda m: [torch.optim.SGD(m.parameters()), torch.optim.AdamW(m.parameters())], "hold the same parameter"),
    "nested": (lambda m: [Container(halves(m), torch.optim.SGD, lr=0.1)] * 2, "containers of optimizers in it"),
    "lbfgs in a list": (lambda m: [torch.optim.LBFGS(m.parameters())], "LBFGS"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind: str) -> None:
    model = net()
    make, words = REFUSED[kind]
    with pytest.raises(ValueError, match=words):
        smartfrz_ds.attach_torch(model, make(model), SETTINGS)


def test_a_step_within_backward_is_refused() -> None:
    """However it was made: hooks of gradients that step."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    smartfrz_ds.attach_torch(model, optimizer, SETTINGS)
    next(iter(model.parameters())).register_post_accumulate_grad_hook(lambda p: optimizer.step())
    with pytest.raises(ValueError, match="within backward"):
        gradients(model, 0)
