"""Freezing without DeepSpeed (attach_torch): one process here, DDP, FSDP2 and FSDP1 on two ranks, each against the oracle, bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, environment, run_worker
from reference import oracle
from reference.bounds import rounding
from reference.oracle import Cell, Outcome, reference
from safetensors.torch import load_file
from torch import nn

import smartfrz_ds
from smartfrz_ds.model.hooks import ModuleHook
from smartfrz_ds.model.layers import find_layers
from smartfrz_ds.signals.lr_scale import layer_groups

PREFIX = {
    "3": ["freeze", ["embeddings", "blocks.0", "blocks.1"]],
    "6": ["freeze", ["blocks.2"]],
    "9": ["thaw", ["blocks.1", "blocks.2"]],
}
MIDDLE = {"3": ["freeze", ["blocks.1", "blocks.2"]], "6": ["freeze", ["blocks.3"]], "9": ["thaw", ["blocks.1"]]}

# name -> (kind, settings of the cell, how the worker runs it)
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddp-groups3": ("ddp", {"groups": 3}, {}),  # the prefix plan empties two groups
    "ddp-kept": ("ddp", {"keep_state": 100, "groups": 2}, {}),
    "ddp-unused": ("ddp", {}, {"options": {"find_unused_parameters": True}}),
    "ddp-static": ("ddp", {}, {"options": {"static_graph": True}}),
    "ddp-views": ("ddp", {}, {"options": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.005}}),
    "ddp-hook": ("ddp", {}, {"hook": True}),
    "ddp-gas2": ("ddp", {"accumulation": 2}, {}),
    "fsdp2-groups3": ("fsdp2", {"groups": 3}, {}),
    "fsdp2-kept": ("fsdp2", {"keep_state": 100, "groups": 2}, {}),
    "fsdp2-evaluates": ("fsdp2", {}, {"evaluates": True}),
    "fsdp2-unsharded": ("fsdp2", {}, {"settings": {"fsdp": {"frozen": "unsharded"}}}),
    "fsdp2-unsharded-kept": ("fsdp2", {"keep_state": 100}, {"evaluates": True, "settings": {"fsdp": {"frozen": "unsharded"}}}),
    "fsdp2-prefetch": ("fsdp2", {}, {"prefetch": True}),
    "fsdp2-offload": ("fsdp2", {"keep_state": 100}, {"offload": True}),
    "fsdp2-gas2": ("fsdp2", {"accumulation": 2}, {}),
    "fsdp1-groups3": ("fsdp1", {"groups": 3}, {}),
    "fsdp1-kept": ("fsdp1", {"keep_state": 100, "groups": 2}, {"evaluates": True}),
    "fsdp1-gas2": ("fsdp1", {"accumulation": 2}, {}),
}
CELLS = {
    f"{name}-{plan_name}": (kind, Cell(f"{name}-{plan_name}", plan=plan, **more), how)
    for name, (kind, more, how) in VARIANTS.items()
    for plan_name, plan in (("prefix", PREFIX), ("middle", MIDDLE))
}
# Which launch trains what: the plan without a frozen prefix, and what is a matter of options, are a matter for the slow tests too.
FAST = [n for n in CELLS if n.endswith("prefix") and not any(x in n for x in ("unused", "views", "fsdp2-kept", "evaluates", "fsdp1-gas2"))]
FAST += ["ddp-groups3-middle", "fsdp2-groups3-middle"]
NAMES = [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in CELLS]
CASES = ["snapshots", "policies", "probes", "tied", "resume", "mixed_precision", "recomputed", "refusals", "released", "thawed", "sent"]
CASES += ["built"]


def launched(names: list[str], cases: list[str], folder: Path) -> Path:
    cells = [{"kind": CELLS[n][0], "cell": dataclasses.asdict(CELLS[n][1]), "how": CELLS[n][2]} for n in names]
    return run_worker("torch", {"cells": cells, "cases": cases}, folder, timeout=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one launch of two ranks wrote: the fast cells and all single questions."""
    return launched(FAST, CASES, tmp_path_factory.mktemp("torch"))


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """The folder that has a cell: of `folder`'s launch, or of one more, which is made when its first cell is asked for."""
    more: list[Path] = []

    def find(name: str) -> Path:
        if name in FAST:
            return request.getfixturevalue("folder")
        if not more:
            more.append(launched([n for n in CELLS if n not in FAST], [], tmp_path_factory.mktemp("slow")))
        return more[0]

    return find


@functools.cache
def expected_of(name: str, freezes: bool = True) -> Outcome:
    return reference(CELLS[name][1], freezes=freezes)


def facts(folder: Path, name: str, rank: int = 0) -> Any:
    return json.loads((folder / f"{name}.{rank}.json").read_text())


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", NAMES)
def test_equals_single_process(of: Callable[[str], Path], name: str) -> None:
    folder = of(name)
    cell, expected, control = CELLS[name][1], expected_of(name), expected_of(name, freezes=False)
    for rank in (0, 1):
        got, fact = load_file(folder / f"{name}.{rank}.safetensors"), facts(folder, name, rank)
        assert (got["weights"] - expected.weights).abs().max() == 0.0
        assert (got["weights"][-1] - control.weights[-1]).abs().max() > 1e-3, "the negative control"
        moments = {key: value for key, value in got.items() if key.startswith("moment.")}
        assert len(moments) == len(expected.moments) > 0
        for key, value in moments.items():
            assert torch.equal(value, expected.moments[key.removeprefix("moment.")]), key
        assert fact["drift"] == 0.0 and fact["step"] == cell.steps and fact["lr"] == expected.lr
        assert sum(fact["groups"]) == len(expected.masters) and len(fact["groups"]) == cell.groups
        assert 0.05 < fact["saved"] < 0.5


def active_bytes(cell: Cell, step: int, kinds: Callable[[str], bool] = lambda layer: True) -> int:
    """Bytes of fp32 weights that train in this step, in the layers that `kinds` says."""
    frozen: set[str] = set()
    for at, (action, names) in sorted(cell.plan.items(), key=lambda item: int(item[0])):
        if int(at) <= step:
            frozen = frozen | set(names) if action == "freeze" else frozen - set(names)
    layers = {n: oracle.layer_of(n) for n, _ in cell.net().named_parameters()}
    return sum(4 * p.numel() for n, p in cell.net().named_parameters() if layers[n] not in frozen and kinds(layers[n]))


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_reduced_and_held(of: Callable[[str], Path], name: str) -> None:
    """Gradients on the wire and optimizer bytes are those of the active layers, step by step."""
    folder = of(name)
    kind, cell, _ = CELLS[name]
    fact = facts(folder, name)
    for step, moved in enumerate(fact["moved"]):
        active = active_bytes(cell, step)
        if kind == "ddp":
            assert moved["buckets"] == active
        elif kind == "fsdp2":
            assert active <= moved["backward"]["reduce_scatter_single"] <= 1.02 * active + 16  # rows are padded to a whole number a rank
        else:
            names = [n for n in moved["backward"] if n.startswith("reduce_scatter")]
            assert active <= sum(moved["backward"][n] for n in names) <= 1.02 * active + 64
    for at, held in zip(sorted(int(x) for x in cell.plan), fact["optimizer_bytes"], strict=True):
        if cell.plan[str(at)][0] == "freeze":
            wanted = 2 * active_bytes(cell, at) / (1 if kind == "ddp" else 2)
            assert abs(held - wanted) <= 0.02 * wanted


@pytest.mark.distributed(2)
def test_fsdp2_gathers_no_frozen_prefix(folder: Path) -> None:
    """In backward nothing in front of the first active layer is gathered; unsharded frozen units are not gathered at all."""
    whole = active_bytes(Cell("", plan={}), 0)
    for name in [n for n in FAST if n.startswith("fsdp2") and n.endswith("prefix")]:
        cell, moved = CELLS[name][1], facts(folder, name)["moved"]
        for step in (4, 8, 11):
            # the head is in the root unit, which is not cut between forward and backward
            needed = active_bytes(cell, step, lambda layer: layer != "head")
            gathered = moved[step]["backward"]["all_gather_single"]
            assert needed - 200 <= gathered <= needed, (name, step)
    stays, cut = (facts(folder, f"fsdp2-{name}-prefix")["moved"] for name in ("unsharded", "groups3"))
    for step in (4, 5, 7, 8):  # the first step after a freeze gathers once more
        assert abs(cut[step]["forward"] - whole) < 0.02 * whole
        assert abs(stays[step]["forward"] - active_bytes(Cell("", plan=PREFIX), step)) < 0.02 * whole


@pytest.mark.distributed(2)
def test_snapshots_out_of_shards(folder: Path) -> None:
    equal = facts(folder, "snapshots")
    assert set(equal) == {"ddp", "fsdp2", "fsdp1"}
    assert all(len(rows) == 12 and all(rows) for rows in equal.values())  # matrices: one a linear layer


@pytest.mark.distributed(2)
def test_the_same_decisions_everywhere(folder: Path) -> None:
    """The attention policy sees the same weights whichever way they are held, so its probabilities agree to the last bit."""
    rows = facts(folder, "policies")
    freezes = [event for event in rows["alone"]["events"] if event[0] == "freeze"]
    assert freezes and freezes[0][3]
    for kind in ("ddp", "fsdp2", "fsdp1"):
        assert rows[kind]["events"] == rows["alone"]["events"]
        assert rows[kind]["frozen"] == facts(folder, "policies", 1)[kind]["frozen"]
        assert rows[kind]["saved"] == rows["alone"]["saved"] > 0
        assert rows[kind]["logged"] >= len(rows[kind]["events"])
    assert facts(folder, "policies", 1)["fsdp2"]["logged"] is None  # rank 0 alone writes


@pytest.mark.distributed(2)
def test_the_same_probe_everywhere(folder: Path) -> None:
    rows = facts(folder, "probes")
    assert any(event[0] == "freeze" for event in rows["alone"])
    for kind in ("ddp", "fsdp2", "fsdp1"):
        assert rows[kind] == rows["alone"], kind


@pytest.mark.distributed(2)
def test_tied_weights(folder: Path) -> None:
    """`tied`: train: the head goes on training the weight that the frozen front shares with it; freeze: it stands still."""
    ends = facts(folder, "tied")
    for mode in ("train", "freeze"):
        moved, weights = ends[f"{mode}-alone"]
        assert moved > 1e-3 if mode == "train" else moved == 0.0
        for kind in ("ddp", "fsdp2"):
            assert ends[f"{mode}-{kind}"] == [moved, weights], (mode, kind)


@pytest.mark.distributed(2)
def test_resume(folder: Path) -> None:
    for name, found in facts(folder, "resume").items():
        assert found["difference"] == 0.0, name
        assert found["counted"] == 6, name
        assert "controller.restore" in found["forgot"], name
        assert "smartfrz.safetensors is missing" in found["nothing there"], name


@pytest.mark.distributed(2)
def test_thaw_of_what_never_trained_in_mixed_precision(folder: Path) -> None:
    """FSDP2 learns a unit's dtypes in the first forward, from its trainable parameters: a unit that was frozen then had none."""
    for moved in facts(folder, "mixed_precision").values():
        assert moved["embeddings"] == [0.0, 0.0]
        assert moved["thawed"][0] == 0.0 and moved["thawed"][1] > 1e-3
        assert min(moved["active"]) > 1e-3


@pytest.mark.distributed(2)
def test_reentrant_checkpointing_behind_a_prefix(folder: Path) -> None:
    for kind, moved in facts(folder, "recomputed").items():
        assert moved["blocks.0.up.weight"] == 0.0, kind
        assert moved["blocks.1.up.weight"] > 1e-3, kind


@pytest.mark.distributed(2)
def test_what_is_refused(folder: Path) -> None:
    said = facts(folder, "refusals")
    words = {
        "shared unit": "share one FSDP unit",
        "no orig params": "use_orig_params=False",
        "made before": "create it over model.parameters() after the model has been wrapped",
        "static and no_sync": "static_graph=True) under no_sync",
        "join": "DistributedDataParallel.join()",
        "builtin hook": "built-in communication hook",
        "in the middle": "RuntimeError: freeze and thaw only at a step boundary",
        "gradients": "FSDP brings to a rank in pieces",
        "another torch": "torch 2.99.0 is not among the tested versions",
        "one group": "parameter groups that contain one layer each",
    }
    assert said.keys() == words.keys()
    for name, text in words.items():
        assert text in said[name], name
    assert said == facts(folder, "refusals", 1)


@pytest.mark.distributed(2)
def test_release_leaves_a_wrapper_that_trains(folder: Path) -> None:
    for rank in (0, 1):
        for kind, found in facts(folder, "released", rank).items():
            assert found["difference"] == 0.0 and found["moved"] > 1e-3, kind


@pytest.mark.distributed(2)
def test_resume_from_right_after_a_thaw(folder: Path) -> None:
    assert facts(folder, "thawed") == 0.0


@pytest.mark.distributed(2)
def test_gradient_bytes_in_mixed_precision(folder: Path) -> None:
    found, whole = facts(folder, "sent"), active_bytes(Cell("", plan={}), 0)
    assert found == {"fp32": whole, "bf16": whole / 2, "bf16 in fp32": whole}


@pytest.mark.distributed(2)
def test_a_model_built_on_the_meta_device_has_the_weights_of_a_whole_one(folder: Path) -> None:
    for rank in (0, 1):
        found = facts(folder, "built", rank)
        assert found["another seed"]["difference"] > 1e-3, "the negative control"
        assert found["fsdp2"]["difference"] == found["bf16"]["difference"] == found["ddp"]["difference"] == 0.0
        assert found["fsdp2"]["share"] < 0.6 and found["ddp"]["share"] == 1.0


@pytest.mark.slow
@pytest.mark.distributed(4)
def test_hybrid_sharding(tmp_path: Path) -> None:
    """Two replicas of two shards: each weight is sampled once, frozen ones stay, and all four ranks hold the same."""
    found = [facts(run_worker("torch", {"cells": [], "cases": ["hybrid"]}, tmp_path, ranks=4, timeout=200), "hybrid")]
    found += [facts(tmp_path, "hybrid", rank) for rank in (1, 2, 3)]
    assert len(found[0]["equal"]) == 12 and all(found[0]["equal"])
    for one in found:
        assert one["moved"]["blocks.0.up.weight"] == 0.0 and one["moved"]["blocks.1.up.weight"] > 1e-3
        assert one["weights"] == found[0]["weights"]


def pretrain(out: Path, *options: str, env: dict[str, str] | None = None, launcher: tuple[str, ...] = ()) -> Any:
    """results.json of launch/examples/pretrain_fsdp.py under torchrun, on two ranks."""
    small = ["--blocks", "3", "--width", "16", "--length", "16", "--batch-size", "2", "--steps", "40", "--policy", "linear"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        *launcher,
        "launch/examples/pretrain_fsdp.py",
    ]
    command += [*small, "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, env=environment() | (env or {}), capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.distributed(2)
@pytest.mark.parametrize("way", ["--ddp", "--fsdp1", "--bf16", ""])
def test_pretrain_script_stops_and_resumes(tmp_path: Path, way: str) -> None:
    """torchrun, a policy, a checkpoint in the middle of freezing: the resumed run ends where the straight one does."""
    more = [way] if way else []
    straight = pretrain(tmp_path / "straight", *more)
    halted = pretrain(tmp_path / "halted", *more, "--stop-after", "20")
    resumed = pretrain(tmp_path / "halted", *more, "--resume")
    assert 0 < len(halted["frozen"]) < len(straight["frozen"])
    assert resumed["scores"] == straight["scores"] != halted["scores"]
    assert resumed["frozen"] == straight["frozen"] and resumed["first_step"] == 21
    assert resumed["series"]["loss"] == straight["series"]["loss"][20:] and len(straight["series"]["loss"]) == 40
    before, after = straight["optimizer_bytes"]
    assert 0 < after < 0.7 * before and resumed["optimizer_bytes"][1] == after


def kill_a_rank(out: Path) -> None:
    """SIGKILL for one of the ranks that write to `out`, once they have a second checkpoint."""
    end = time.monotonic() + 100
    while time.monotonic() < end and len(list(out.glob("step-*/.metadata"))) < 2:
        time.sleep(0.005)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if str(out).encode() in words and b"torch.distributed.run" not in words:
                os.kill(int(path.parent.name), signal.SIGKILL)
                return


@pytest.mark.slow
@pytest.mark.distributed(2)
@pytest.mark.parametrize("way", ["", "--ddp"])
def test_pretrain_script_goes_on_by_itself(tmp_path: Path, way: str) -> None:
    """A rank is killed in mid-run under --max-restarts: its held-out loss at the end is that of a run to which nothing happened."""
    more = [way] if way else []
    straight = pretrain(tmp_path / "straight", *more, "--save-every", "10")
    killer = threading.Thread(target=kill_a_rank, args=(tmp_path / "killed",))
    killer.start()
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    killed = pretrain(tmp_path / "killed", *more, "--save-every", "10", env=env, launcher=("--max-restarts", "1"))
    killer.join()
    assert killed["scores"] == straight["scores"] and killed["frozen"] == straight["frozen"]
    assert 0 < len(killed["series"]["seconds"]) < len(straight["series"]["seconds"]) == 40, "it went on from a checkpoint"


# ---- one process -----------------------------------------------------------------------------------------------------------------


def alone(cell: Cell, model: nn.Module, how: type = torch.optim.AdamW, **settings: Any) -> tuple[Any, Any, Any]:
    params = list(model.parameters())
    optimizer = how(oracle.groups_of(params, params, cell.groups), lr=oracle.LR, weight_decay=oracle.DECAY)
    scheduler = oracle.schedule(optimizer)
    section = {"policy": "manual", "order": "any", "keep_state": cell.keep_state} | settings
    return optimizer, scheduler, smartfrz_ds.attach_torch(model, optimizer, section, scheduler=scheduler)


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


@pytest.mark.parametrize("plan", [PREFIX, MIDDLE], ids=["prefix", "middle"])
@pytest.mark.parametrize("more", [{"groups": 3}, {"keep_state": 100, "groups": 2}, {"accumulation": 2}], ids=str)
@pytest.mark.parametrize("clears_late", [False, True])
def test_one_process(plan: dict[str, Any], more: dict[str, Any], clears_late: bool) -> None:
    """clears_late: zero_grad right before the forward, so that used gradients are still there when layers freeze."""
    cell = Cell("alone", plan=plan, **more)
    expected, control = reference(cell, world=1), reference(cell, world=1, freezes=False)
    model = cell.net()
    optimizer, scheduler, controller = alone(cell, model)
    for step in range(cell.steps):
        if event := cell.at(step):
            getattr(controller, event[0])(event[1])
            assert all(p.grad is None for n, p in model.named_parameters() if oracle.layer_of(n) in controller.frozen)
        if clears_late:
            optimizer.zero_grad()
        for micro in range(cell.accumulation):
            (oracle.loss_of(model, *oracle.data(step, micro, 0), "fp32") / cell.accumulation).backward()
            with pytest.raises(RuntimeError, match="step boundary"):
                controller.freeze(["blocks.4"])
        optimizer.step()
        scheduler.step()
        if not clears_late:
            optimizer.zero_grad()
        assert (weights_of(model) - expected.weights[step]).abs().max() == 0.0
    assert (weights_of(model) - control.weights[-1]).abs().max() > 1e-3
    assert controller.step == cell.steps
    assert len(optimizer.param_groups) == cell.groups


def test_one_process_resumes_with_torch_save(tmp_path: Path) -> None:
    """`restore`, then load_state_dict of model, optimizer and scheduler; a thaw after it takes up the state that was kept."""
    cell = Cell("alone", plan=PREFIX, groups=3, keep_state=100)
    expected = reference(cell, world=1)

    def go(model: nn.Module, optimizer: Any, scheduler: Any, controller: Any, steps: range) -> None:
        for step in steps:
            if event := cell.at(step):
                getattr(controller, event[0])(event[1])
            optimizer.zero_grad()
            oracle.loss_of(model, *oracle.data(step, 0, 0), "fp32").backward()
            optimizer.step()
            scheduler.step()

    model = cell.net()
    optimizer, scheduler, controller = alone(cell, model)
    go(model, optimizer, scheduler, controller, range(8))
    controller.save(tmp_path)
    torch.save([x.state_dict() for x in (model, optimizer, scheduler)], tmp_path / "own.pt")

    model = cell.net()
    optimizer, scheduler, controller = alone(cell, model)
    states = torch.load(tmp_path / "own.pt")
    with pytest.raises(ValueError, match=r"controller\.restore"):
        optimizer.load_state_dict(states[1])
    controller.restore(tmp_path)
    for x, state in zip((model, optimizer, scheduler), states, strict=True):
        x.load_state_dict(state)
    go(model, optimizer, scheduler, controller, range(8, 12))
    assert torch.equal(weights_of(model), expected.weights[-1])
    assert controller.step == 12 and controller.frozen == ("embeddings", "blocks.0")

    (tmp_path / "smartfrz_kept_0.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="damaged"):
        alone(cell, cell.net())[2].restore(tmp_path)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_no_step(fused: bool) -> None:
    """GradScaler does not call optimizer.step() on an overflow, or (fused) calls it and the kernel skips. Its gradients don't count."""

    def summed(steps: tuple[int, ...], infinite: int) -> torch.Tensor:
        model = Cell("").net()
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        section = {"policy": "autofreeze", "freeze_interval": 100, "warmup_steps": 0, "total_steps": 1000}
        controller = smartfrz_ds.attach_torch(model, optimizer, section, scaler=scaler)
        for step in steps:
            loss = oracle.loss_of(model, *oracle.data(step, 0, 0), "fp32")
            scaler.scale(loss * (float("inf") if step == infinite else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert controller.step == 3
        assert controller.backend.loss_scale() == scaler.get_scale() == (512.0 if infinite in steps else 1024.0)
        sums = controller._policy_stage.inputs._sums
        assert sums is not None
        return sums._total

    total = summed((0, 1, 2, 3), infinite=1)
    assert total.any()
    assert (total - summed((0, 2, 3), infinite=1)).abs().max() <= rounding(3, float(total.abs().max())), "three steps' gradients"


def test_compiled_model() -> None:
    """torch.compile follows a freeze: dropout of frozen layers is off and their weights stay, exactly as without compiling."""

    class Dropping(oracle.Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    def train(compiled: bool) -> torch.Tensor:
        net = oracle.Net(blocks=3)
        torch.manual_seed(0)
        net.blocks = nn.ModuleList(Dropping(oracle.WIDTH) for _ in range(3))
        model = torch.compile(net, backend="aot_eager") if compiled else net
        optimizer, _, controller = alone(Cell(""), model)
        for step in range(7):
            model.train()
            if step in (2, 5):
                getattr(controller, "freeze" if step == 2 else "thaw")(["blocks.0"] if step == 5 else ["embeddings", "blocks.0"])
            torch.manual_seed(step)
            oracle.loss_of(model, *oracle.data(step, 0, 0), "fp32").backward()
            optimizer.step()
            optimizer.zero_grad()
        assert controller.report().saved_flops_fraction > 0.05
        return weights_of(net)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo does not trace the mode that counts FLOPs, and says so
        assert torch.equal(train(True), train(False))


def test_learning_rates_of_single_layers() -> None:
    """FreezeOut scales each layer's rate for the length of the step; the scheduler never sees it."""
    model = Cell("").net()
    optimizer = torch.optim.SGD(layer_groups(find_layers(model)), lr=0.1)
    controller = smartfrz_ds.attach_torch(model, optimizer, {"policy": "freezeout", "freeze_interval": 5, "snapshot_interval": 5,
                                                             "warmup_steps": 0, "total_steps": 20, "max_frozen_fraction": 1.0})  # fmt: skip
    moved, rates = [], []
    for step in range(20):
        before = model.inp.weight.detach().clone()
        oracle.loss_of(model, *oracle.data(step, 0, 0), "fp32").backward()
        gradient = None if model.inp.weight.grad is None else model.inp.weight.grad.abs().max()
        optimizer.step()
        optimizer.zero_grad()
        moved.append(0.0 if gradient is None else ((model.inp.weight - before).abs().max() / gradient).item())
        rates.append({group["lr"] for group in optimizer.param_groups})
    assert rates == [{0.1}] * 20
    assert moved[0] > moved[2] > moved[4] > 0.0  # step by gradient: the rate that the layer really had
    assert "embeddings" in controller.frozen and moved[-1] == 0.0
    assert [len(group["params"]) for group in optimizer.param_groups][:2] == [0, 0] and len(optimizer.param_groups) == 7


def test_release_gives_all_back() -> None:
    model = Cell("").net()
    optimizer, _, controller = alone(Cell(""), model)
    controller.freeze(["embeddings"])
    controller.release()
    controller.release()
    assert [p for group in optimizer.param_groups for p in group["params"]] == list(model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert not any(type(hook) is ModuleHook for hook in hooks)
    optimizer.step()
    assert controller.step == 0


def test_channels_last() -> None:
    """Weights that aren't contiguous: the samples are those of contiguous ones."""
    seen = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 3)).to(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        smartfrz_ds.attach_torch(model, optimizer, {"snapshot_interval": 1, "freeze_interval": 1, "warmup_steps": 0, "window": 10})
        for _ in range(3):
            model(torch.ones(1, 3, 8, 8)).mean().backward()
            optimizer.step()
        seen.append(optimizer.smartfrz.state_dict()["history"])
    assert seen[0].keys() == seen[1].keys() and seen[0]
    for name, item in seen[0].items():
        assert item.keys() == seen[1][name].keys() and all(torch.equal(t, seen[1][name][key]) for key, t in item.items())


def test_release_gives_learning_rates_back() -> None:
    model = Cell("").net()
    optimizer = torch.optim.SGD(layer_groups(find_layers(model)), lr=0.1)
    controller = smartfrz_ds.attach_torch(model, optimizer, {"policy": "freezeout", "warmup_steps": 0, "total_steps": 20})
    rates: list[set[float]] = []
    for step in range(2):
        oracle.loss_of(model, *oracle.data(step, 0, 0), "fp32").backward()
        if step == 1:
            controller.release()
            optimizer.register_step_pre_hook(lambda *_: rates.append({group["lr"] for group in optimizer.param_groups}))
        optimizer.step()
    assert rates == [{0.1}]


@pytest.mark.parametrize("forwards", [0, 2])
def test_copies_of_the_model_are_free(forwards: int) -> None:
    """A copied or pickled model has nothing of ours in it, before the first forward and later."""
    model = Cell("").net()
    optimizer, _, controller = alone(Cell(""), model)
    x, y = oracle.data(0, 0, 0)
    for step in range(forwards):
        oracle.loss_of(model, x, y, "fp32").backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            controller.freeze(["embeddings"])
    averaged, data = torch.optim.swa_utils.AveragedModel(model), pickle.dumps(model)
    assert b"TorchBackend" not in data and b"AdamW" not in data
    hooks = [hook for m in averaged.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert any(type(hook) is ModuleHook for hook in hooks)
    assert all(hook._function is None for hook in hooks if type(hook) is ModuleHook)
    assert torch.equal(averaged(x), model(x)) and torch.equal(pickle.loads(data)(x), model(x))


def test_groups_added_after_attach_are_refused() -> None:
    model = Cell("").net()
    optimizer, _, controller = alone(Cell(""), model)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(ValueError, match="add_param_group before attach_torch"):
        controller.freeze(["embeddings"])
    assert controller.frozen == () and all(p.requires_grad for p in model.parameters())
    controller.release()
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(list(model.parameters())), 1]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # where this is the first test to import torch's optimizers
def test_parameters_of_another_optimizer_are_named() -> None:
    model = Cell("").net()
    with pytest.warns(RuntimeWarning, match=r"does not hold all trainable parameters: inp\.bias, "):
        alone(Cell(""), model, how=lambda groups, **more: torch.optim.SGD([p for p in model.parameters() if p.ndim > 1], **more))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS"),
        (lambda p: torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]), "none of the model's trainable parameters"),
        (lambda p: "adam", "takes a torch optimizer, got str"),
    ],
)
def test_optimizers_that_are_refused(make: Callable[[Any], Any], words: str) -> None:
    model = Cell("").net()
    with pytest.raises(ValueError, match=words):
        smartfrz_ds.attach_torch(model, make(list(model.parameters())), {"policy": "manual"})


def test_closures_are_refused() -> None:
    model = Cell("").net()
    optimizer, _, _ = alone(Cell(""), model)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: oracle.loss_of(model, *oracle.data(0, 0, 0), "fp32"))
