"""The guard: its logic, and on real 2-rank engines that a freeze is taken back exactly. And fp16 with a loss scale that overflows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_worker
from reference import oracle
from reference.oracle import Cell, reference
from safetensors.torch import load_file
from torch import Tensor

from smartfrz_ds.runtime.observers.guard import Guard
from smartfrz_ds.telemetry.metric_feed import MetricFeed

FRONT = ["embeddings", "blocks.0", "blocks.1"]


def guard(**settings: Any) -> Guard:
    return Guard(**{"tolerance": 0.1, "window": 3, "smoothing": 0.0, "wait": 1, **settings})


# --- the logic -------------------------------------------------------------------------------------------------------------------


def run(watcher: Guard, values: list[float], start: int) -> list[tuple[str, ...] | None]:
    """Verdicts of the steps start + 1, start + 2, …"""
    out = []
    for step, value in enumerate(values, start=start + 1):
        watcher.add(value)
        verdict = watcher.judge(step)
        out.append(verdict.layers if verdict else None)
    return out


def test_better_or_within_tolerance_is_left_alone() -> None:
    watcher = guard()
    watcher.add(1.0)
    watcher.froze(["a"], 5, 1.0)
    assert run(watcher, [0.9, 1.1, 1.05], 5) == [None] * 3
    assert not watcher.watching  # the window of three steps is over
    assert run(watcher, [9.0], 8) == [None]


@pytest.mark.parametrize("bad", [1.11, math.nan, math.inf])
def test_worse_within_the_window_is_taken_back_once(bad: float) -> None:
    watcher = guard()
    watcher.add(1.0)
    watcher.froze(["a", "b"], 5, 1.0)
    assert run(watcher, [1.0, 1.0, bad, bad], 5) == [None, None, ("a", "b"), None]
    assert watcher.level is not None and math.isfinite(watcher.level)  # a NaN would be there forever


def test_negative_metric_gets_worse_upwards() -> None:
    watcher = guard()
    watcher.froze(["a"], 0, -2.0)
    assert run(watcher, [-1.81, -1.79], 0) == [None, ("a",)]


def test_smoothing_is_an_exponential_mean_that_starts_at_the_first_value() -> None:
    watcher = guard(smoothing=0.5)
    for value in (4.0, 2.0, math.nan, 1.0):  # a NaN before the freeze is left out
        watcher.add(value)
    assert watcher.level == 2.0
    watcher.froze(["a"], 4, 2.0)
    assert run(watcher, [2.4, 2.4], 4) == [None, ("a",)]  # 2.2 is not above 2.2; 2.3 is


def test_smoothing_of_means_is_the_mean_of_smoothings() -> None:
    """Why the ranks' own levels may be averaged at the freeze."""
    ranks = [[1.0, 3.0, 2.0, 5.0], [2.0, 2.5, 7.0, 1.0]]
    levels = []
    for values in [*ranks, [sum(pair) / 2 for pair in zip(*ranks, strict=True)]]:
        watcher = guard(smoothing=0.8)
        for value in values:
            watcher.add(value)
        assert watcher.level is not None
        levels.append(watcher.level)
    assert (levels[0] + levels[1]) / 2 == pytest.approx(levels[2], rel=1e-12)


def test_an_older_mistake_takes_later_freezes_back_too() -> None:
    watcher = guard(window=10)
    watcher.froze(["a"], 0, 1.0)
    watcher.froze(["b"], 2, 1.09)
    assert run(watcher, [1.15], 2) == [("a", "b")]
    watcher = guard(window=10)
    watcher.froze(["a"], 0, 2.0)
    watcher.froze(["b"], 2, 1.0)
    assert run(watcher, [1.2], 2) == [("b",)]
    assert watcher.watching  # the first one still is


def test_waits_double_by_layer_and_end() -> None:
    watcher = guard(wait=1, window=10)
    seen = []
    for round_ in range(3):
        watcher.froze(["a"], 10 * round_, 1.0)
        assert run(watcher, [5.0], 10 * round_) == [("a",)]
        stages = 0
        while "a" in watcher.waiting:
            watcher.stage_passed()
            stages += 1
        seen.append(stages)
    assert seen == [2, 4, 8]
    watcher.froze(["b"], 90, 1.0)
    run(watcher, [5.0], 90)
    watcher.stage_passed()
    assert watcher.waiting == {"b"}
    watcher.stage_passed()
    assert watcher.waiting == frozenset()


def test_state_goes_through_json() -> None:
    first, second = guard(smoothing=0.7, window=5), guard(smoothing=0.7, window=5)
    first.froze(["x"], 0, 1.0)
    run(first, [9.0], 0)
    first.froze(["a"], 4, 1.0)
    run(first, [1.1], 4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert run(first, [1.2, 1.3, 1.4], 5) == run(second, [1.2, 1.3, 1.4], 5)
    assert first.state_dict() == second.state_dict()


def test_layers_that_somebody_thaws_are_no_longer_watched() -> None:
    watcher = guard()
    watcher.froze(["a", "b"], 0, 1.0)
    watcher.thawed({"b"})
    assert run(watcher, [5.0], 0) == [("a",)]


def test_feed_takes_the_mean_of_a_step_and_drops_skipped_ones() -> None:
    feed = MetricFeed("loss")
    feed.loss(torch.tensor(1.0))
    feed.loss(torch.tensor(2.0))
    feed.end_step(applied=True)
    feed.loss(torch.tensor(float("inf")))
    feed.end_step(applied=False)
    feed.end_step(applied=True)  # a step without a value
    feed.loss(torch.tensor(1.0))
    feed.tell({"loss": 7.0, "other": 3.0})
    feed.end_step(applied=True)
    assert feed.take() == [1.5, 7.0] and feed.take() == []
    other = MetricFeed("accuracy")
    other.loss(torch.tensor(1.0))
    other.end_step(applied=True)
    assert other.take() == []


# --- on engines ------------------------------------------------------------------------------------------------------------------

QUIET = [1.0, 1.1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
# rank 1 sees nothing bad; the mean of both is 1.1 in step 5 and 2.0 in step 6
RISE = [[*QUIET[:5], 1.2, 3.0, *QUIET[7:]], QUIET]
TOLD = {"metric": "loss", "tolerance": 0.2, "window": 6, "smoothing": 0.0}
LOSS = {"tolerance": 0.01, "window": 8, "smoothing": 0.5}
FP16_PLAN = {"3": ["freeze", FRONT], "6": ["freeze", ["blocks.2"]], "9": ["thaw", ["blocks.1", "blocks.2"]]}
CASES: list[dict[str, Any]] = [
    *({"name": f"told-z{stage}", "stage": stage, "guard": TOLD, "told": RISE} for stage in (0, 2, 3)),
    {"name": "nan", "stage": 2, "guard": TOLD, "told": [QUIET, QUIET], "nan_at": 4},
    {"name": "window-over", "stage": 2, "guard": TOLD | {"window": 3}, "told": RISE},
    *({"name": f"loss-z{stage}", "stage": stage, "guard": LOSS, "accumulation": 2, "freezes": {"6": FRONT}} for stage in (2, 3)),
    {"name": "blind", "stage": 2, "guard": {"metric": "accuracy"}},
    {
        "name": "policy",
        "stage": 2,
        "guard": TOLD | {"window": 2},
        "told": [[1.0, 1.0, 1.0, 9.0, *[1.0] * 8]] * 2,
        "freezes": {},
        "policy": "linear",
        "linear": {"start_step": 2, "end_step": 8},
        "warmup_steps": 0,
        "snapshot_interval": 1,
        "freeze_interval": 1,
        "cooldown": 0,
    },
    *({"name": f"fp16-z{s}", "function": "fp16", "stage": s, "plan": FP16_PLAN} for s in (0, 1, 2, 3)),
    *({"name": f"fp16-kept-z{s}", "function": "fp16", "stage": s, "plan": FP16_PLAN, "keep_state": 100} for s in (2, 3)),
]
Saw = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases in one launch of two ranks."""
    return run_worker("guard", CASES, tmp_path_factory.mktemp("guard"), timeout=300)


@pytest.fixture(scope="module")
def saw(folder: Path) -> Saw:
    return lambda name, rank=0: json.loads((folder / f"{name}.{rank}.json").read_text())


def compare(folder: Path, name: str, cell: Cell) -> None:
    """Weights after each step, masters and moments at the end: bit for bit the single process that freezes and thaws at the same steps."""
    expected = reference(cell)
    for rank in (0, 1):
        got: dict[str, Tensor] = load_file(folder / f"{name}.{rank}.safetensors")
        assert torch.equal(got["weights"], expected.weights), (got["weights"] - expected.weights).abs().amax(1)
        for key, value in got.items():
            kind, _, rest = key.partition(".")
            if kind in ("master", "moment"):
                assert torch.equal(value, (expected.masters if kind == "master" else expected.moments)[rest]), key


def plan_of(events: list[Any]) -> dict[str, list[Any]]:
    return {str(step): [kind, layers] for kind, step, layers, *_ in events if kind in ("freeze", "thaw")}


@pytest.mark.distributed(2)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_mistake_is_taken_back_exactly(folder: Path, saw: Saw, stage: int) -> None:
    """Frozen before step 3, taken back after step 6, of which the ranks' mean is the worse one; moments and counts are the kept ones."""
    name = f"told-z{stage}"
    for rank in (0, 1):
        events = saw(name, rank)["events"]
        assert plan_of(events) == {"3": ["freeze", FRONT], "7": ["thaw", FRONT]}
        assert "guard: the smoothed metric is 2, 4 steps after the freeze of step 3" in events[-1][3]["blocks.1"]
    compare(folder, name, Cell(name, stage, keep_state=100, plan=plan_of(saw(name)["events"])))


@pytest.mark.distributed(2)
def test_nan_after_a_freeze_is_worse(folder: Path, saw: Saw) -> None:
    assert plan_of(saw("nan")["events"]) == {"3": ["freeze", FRONT], "5": ["thaw", FRONT]}
    compare(folder, "nan", Cell("nan", 2, keep_state=100, plan=plan_of(saw("nan")["events"])))


@pytest.mark.distributed(2)
def test_after_the_window_nothing_is_taken_back(saw: Saw) -> None:
    assert plan_of(saw("window-over")["events"]) == {"3": ["freeze", FRONT]}


@pytest.mark.distributed(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_the_loss_of_backward_is_the_metric(folder: Path, saw: Saw, stage: int) -> None:
    """The step at which the guard acts follows from the recorded losses: mean over micro-batches and ranks, then smoothed."""
    name = f"loss-z{stage}"
    losses = torch.tensor([saw(name, rank)["losses"] for rank in (0, 1)], dtype=torch.float64).view(2, 12, 2).mean(dim=(0, 2)).tolist()
    watcher = guard(**LOSS)
    acted: int | None = None
    for step, loss in enumerate(losses):
        if step == 6:
            assert watcher.level is not None
            watcher.froze(FRONT, 6, watcher.level)
        watcher.add(loss)
        if watcher.judge(step + 1) is not None:
            acted = step + 1
    assert acted is not None, f"these losses make no case: {losses}"
    assert plan_of(saw(name)["events"]) == {"6": ["freeze", FRONT], str(acted): ["thaw", FRONT]}
    compare(folder, name, Cell(name, stage, accumulation=2, keep_state=100, plan=plan_of(saw(name)["events"])))


@pytest.mark.distributed(2)
def test_a_guard_that_sees_nothing_says_so_once(saw: Saw) -> None:
    seen, other = saw("blind"), saw("blind", 1)
    assert len(seen["warnings"]) == 1 and "'accuracy'" in seen["warnings"][0] and "observe(accuracy=" in seen["warnings"][0]
    assert other["warnings"] == [] and [e[0] for e in other["events"]].count("warning") == 1
    assert plan_of(seen["events"]) == {"3": ["freeze", FRONT]}


@pytest.mark.distributed(2)
def test_a_policy_waits_for_the_guard_and_for_layers_taken_back(saw: Saw) -> None:
    """linear would freeze the embeddings at step 2 and more at each of the next steps. Step 3 is the bad one: they come back after it
    (step count 4) and wait two stages; while a freeze is watched (two steps) nothing more freezes."""
    for rank in (0, 1):
        changes = [e[:3] for e in saw("policy", rank)["events"] if e[0] in ("freeze", "thaw")]
        steps = {kind: [step for k, step, _ in changes if k == kind] for kind in ("freeze", "thaw")}
        assert len(steps["thaw"]) == 1
        mistake = next(c for c in reversed(changes) if c[0] == "freeze" and c[1] < steps["thaw"][0])
        back = steps["thaw"][0]
        assert back == 4 and "embeddings" in mistake[2]
        later = [c for c in changes if c[0] == "freeze" and c[1] > back]
        # the stages of steps 4 (right after it was taken back) and 5 are waited for
        assert later and later[0][1] == back + 2
        assert all(b - a >= 2 for a, b in zip(steps["freeze"][1:], steps["freeze"][2:], strict=False))
    assert saw("policy")["guard"]["taken_back"] == saw("policy", 1)["guard"]["taken_back"] != {}


def fp16_reference(stage: int, plan: dict[str, list[Any]], keep: bool, scales: list[float]) -> Tensor:
    """(12, numel) fp32: the weights after each step of one process: fp16 gradients of the scaled loss of each rank, averaged in fp16,
    unscaled in fp32, stepped by torch's AdamW on fp32 masters. scales: of the steps that were taken.

    In stage 0 DeepSpeed 0.19.8 unscales gradients of a loss that it had not scaled: engine.backward scales it for ZeRO only.
    """
    torch.set_num_threads(oracle.THREADS)
    model = oracle.Net().half()
    names, params = [n for n, _ in model.named_parameters()], list(model.parameters())
    master = {p: p.detach().float().clone().requires_grad_() for p in params}
    optimizer = torch.optim.AdamW([{"params": [master[p] for p in params]}], lr=oracle.LR, weight_decay=oracle.DECAY)
    scheduler = oracle.schedule(optimizer)
    if stage == 0:
        oracle._construction_step(optimizer, master)
    kept: dict[Any, Any] = {}
    history = []
    for step, scale in enumerate(scales):
        if event := plan.get(str(step)):
            for name, p in zip(names, params, strict=True):
                if oracle.layer_of(name) in event[1]:
                    oracle._freeze_or_thaw(event[0], p, master[p], optimizer, kept if keep else None)
        live = [p for p in params if p.requires_grad]
        total = [torch.zeros_like(p) for p in live]
        for rank in (0, 1):
            x, y = oracle.data(step, 0, rank)
            loss = torch.nn.functional.cross_entropy(model(x.half()).float(), y)
            for t, g in zip(total, torch.autograd.grad(loss * (scale if stage else 1), live), strict=True):
                t += g / 2
        for p, t in zip(live, total, strict=True):
            master[p].grad = t.float() / scale
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        for p in live:
            p.data.copy_(master[p].data)
        history.append(torch.cat([p.detach().float().view(-1) for p in params]))
    return torch.stack(history)


FP16_CASES = [case["name"] for case in CASES if case.get("function") == "fp16"]


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", FP16_CASES)
def test_fp16_skipped_steps_are_no_steps(saw: Saw, name: str) -> None:
    for rank in (0, 1):
        seen = saw(name, rank)
        rows, applied = seen["rows"], 0
        for row in rows:
            applied += row["applied"]
            assert row["counted"] == applied
            assert row["moved"] == row["applied"]
        assert applied == 12 and seen["frozen"] == ["embeddings", "blocks.0"]
        skipped = [i for i, row in enumerate(rows) if not row["applied"]]
        # the first scale overflows on its own where DeepSpeed applies it (see fp16_reference); the loss of attempt 10 on one rank does
        assert 10 in skipped and (len(skipped) >= 2 or seen["wrapper"] == "FP16_UnfusedOptimizer")
        assert rows[11]["scale"] == rows[10]["scale"] / 2


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", FP16_CASES)
def test_fp16_equals_single_process(folder: Path, saw: Saw, name: str) -> None:
    case = next(case for case in CASES if case["name"] == name)
    scales = [row["scale"] for row in saw(name)["rows"] if row["applied"]]
    expected = fp16_reference(case["stage"], case["plan"], bool(case.get("keep_state")), scales)
    for rank in (0, 1):
        got = load_file(folder / f"{name}.{rank}.safetensors")["weights"]
        assert torch.equal(got, expected), (got - expected).abs().amax(1)
