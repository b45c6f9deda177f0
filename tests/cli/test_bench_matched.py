"""The matched run as the judge of `smartfrz bench policies`: which run it is, and the statistics of the comparison."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_runs import command, jobs
from scipy import stats
from test_bench_policies import row

from smartfrz_ds.bench.policies.command import bench_policies, read_result
from smartfrz_ds.bench.policies.curves import Row
from smartfrz_ds.bench.policies.files import find_tasks, read_policies
from smartfrz_ds.bench.policies.judge import holm, interval, over_groups, p_value, pairs, verdicts
from smartfrz_ds.bench.policies.pool import result_file
from smartfrz_ds.bench.policies.report import Effort, report
from smartfrz_ds.bench.policies.runs import matched_run, matched_steps, plan_runs
from smartfrz_ds.bench.policies.side_by_side import Engine, time_share

EFFORT = Effort(done=1, planned=1, run_seconds=1, wall_seconds=1, calls=1, workers=1, machine="test")


# --- which run -------------------------------------------------------------------------------------------------------------------


def test_the_matched_run_is_what_the_task_would_be_with_fewer_steps(files: tuple[Path, Path]) -> None:
    """The same job as full training of a task file that asks for 13 steps: warm-up, decay and intervals are shares of them."""
    full = jobs(files)["full", "one", 1]
    follower = matched_run(full, read_policies(files[1]).common, 13, "matched")
    files[0].write_text(files[0].read_text().replace("steps: 20", "steps: 13"))
    assert follower.job == jobs(files)["full", "one", 1]
    assert (follower.full_steps, follower.label) == (20, "13")


@pytest.mark.parametrize(
    ("steps", "share", "length"), [(300, 0.8, 240), (300, 1.0, 300), (300, 1.2, 300), (300, 0.01, 10), (80, 0.631, 50)]
)
def test_the_length_is_the_share_of_the_steps(steps: int, share: float, length: int) -> None:
    assert matched_steps(steps, share) == length


def test_a_run_that_froze_nothing_is_judged_by_full_training() -> None:
    rows = [
        row("full", "one", 0, 0.0, 0.9),
        judged(row("ours", "one", 0, 0.0, 0.9), 100),
        judged(row("ours", "x", 0, 0.2, 0.85, loss=1.5), 80),
        judged(row("ours", "x", 1, 0.2, 0.85), 80),  # neither full training nor a matched run with this seed
        matched(0, 80, 0.8, loss=1.25),
        matched(0, 90, 0.7),
    ]
    assert [(p.metric, p.loss) for p in pairs(rows, "ours", "one")["t"]] == [(0.0, 0.0)]
    (pair,) = pairs(rows, "ours", "x")["t"]
    assert pair.matched.steps == 80 and pair.metric == pytest.approx(0.05) and pair.loss == pytest.approx(0.25)
    assert pairs(rows, "ours", "x", "matched-time") == {}


def judged(of: Row, steps: int) -> Row:
    return Row(**{**vars(of), "matched_steps": steps})


def matched(seed: int, steps: int, metric: float, *, task: str = "t", loss: float = 1.0) -> Row:
    return Row(**{**vars(row("matched", str(steps), seed, 1 - steps / 100, metric, task=task, loss=loss)), "steps": steps})


def test_without_matched_only_planned_runs_are_left(
    made: tuple[Path, Any],
    files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    """`--plan` counts what has no result: a freezing run counts twice, since the length of its matched run is not known yet."""
    options: dict[str, Any] = {"tasks": [str(files[0])], "policies_file": files[1], "workers": 2, "plan": True}
    assert "| tiny | design | 0 | 0 | 0 |" in bench_policies(made[0], **options)
    assert "| tiny | design | 5 | 100 | unknown |" in bench_policies(tmp_path, matched=False, **options)
    assert "| tiny | design | 8 | 160 | unknown |" in bench_policies(tmp_path, **options)
    shutil.copytree(made[0], tmp_path / "out")
    late = jobs(files)["late", "0.5", 0]
    result_file(tmp_path / "out", late).unlink()
    text = bench_policies(tmp_path / "out", **options)
    seconds = [json.loads(f.read_text()) for f in (tmp_path / "out" / "runs" / "tiny").glob("*.json")]
    step = float(np.median([s["result"]["total_seconds"] / s["job"]["settings"]["steps"] for s in seconds]))
    assert f"| tiny | design | 2 | 40 | {40 * step / 60:.0f} |" in text
    assert read_result(tmp_path / "out", late) is None, "--plan runs nothing"


def test_a_result_names_the_versions_that_made_it(made: tuple[Path, Any], files: tuple[Path, Path]) -> None:
    import torch

    data = json.loads(result_file(made[0], jobs(files)["late", "0.5", 0]).read_text())
    assert {"python", "smartfrz_ds", "torch", "deepspeed"} <= set(data["versions"]) and data["versions"]["torch"] == torch.__version__


# --- wall time -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("zero4x2", "--engine: got ZeRO stage 4; allowed: 0, 1, 2, 3"),
        ("zero2x0", "--engine: got 0 ranks; allowed: an integer >= 1"),
        ("fast", "--engine: got 'fast'; allowed: a ZeRO stage and a number of ranks, like zero2x2"),
        ("zero2x3", "--engine: got 3 ranks; allowed for task 'tiny': a divisor of its batch of 8"),
    ],
)
def test_a_wrong_engine_is_named(files: tuple[Path, Path], tmp_path: Path, text: str, words: str) -> None:
    run = command(files, tmp_path / "out", "--matched-time", "--engine", text)
    assert run.exit_code == 2 and words in run.stderr, run.stderr


def test_an_engine_is_a_stage_and_ranks() -> None:
    assert Engine.parse("zero2x2") == Engine.parse("2") == Engine()
    assert Engine.parse("zero3x4") == Engine(zero_stage=3, ranks=4)


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_wall_time_is_measured_on_two_ranks_side_by_side(
    made: tuple[Path, Any],
    files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(made[0], out)
    run = command(files, out, "--seeds", "1", "--policy", "late", "--matched-time")
    assert run.exit_code == 0, run.output
    late = jobs(files)["late", "0.5", 0]
    data = json.loads((out / "times" / f"{late.name}.json").read_text())
    # `late` looks at the step alone, so that it freezes on two ranks as in one process
    result = read_result(out, late)
    assert result is not None and data["frozen"] == result["frozen"] and data["saved"] == pytest.approx(result["saved"], rel=1e-9)
    share = time_share(out, late, Engine())
    assert share == data["seconds"] / data["full_seconds"] and time_share(out, late, Engine(zero_stage=3)) is None
    text = (out / "policies.md").read_text()
    assert "## Compared with the matched run (wall time)" in text
    tasks = find_tasks([str(files[0])])
    full = next(p.job for p in plan_runs(tasks, read_policies(files[1])) if p.entry == "full" and p.job.seed == 0)
    steps = matched_steps(20, share)
    assert steps == 20 or read_result(out, matched_run(full, read_policies(files[1]).common, steps, "matched-time").job) is not None


# --- statistics ------------------------------------------------------------------------------------------------------------------


def test_interval_and_p_value_are_those_of_the_paired_t_test() -> None:
    a, b = np.random.default_rng(1).normal(size=(2, 5))
    test = stats.ttest_rel(a, b)
    low, high = test.confidence_interval(0.95)
    found = interval(list(a - b))
    assert (found.low, found.high, found.n) == (pytest.approx(low), pytest.approx(high), 5)
    assert p_value(list(a - b)) == pytest.approx(test.pvalue)


def test_two_groups_have_the_interval_of_welch() -> None:
    """The mean of two groups' means is half the difference of one and the negated other, which Welch's test has."""
    a, b = np.random.default_rng(2).normal(size=5), 3 * np.random.default_rng(3).normal(size=3)
    low, high = stats.ttest_ind(a, -b, equal_var=False).confidence_interval(0.95)
    found = over_groups([list(a), list(b), []])
    assert (found.low, found.high, found.n) == (pytest.approx(low / 2), pytest.approx(high / 2), 2)
    assert over_groups([[1.0], [2.0, 3.0]])[0] == 1.75 and math.isnan(over_groups([[1.0], [2.0, 3.0]]).low)
    assert over_groups([[0.0, 0.0], [0.0, 0.0]])[:4] == (0.0, 0.0, 0.0, 0.0) and over_groups([]).n == 0
    assert interval([1.0, 1.0]).mean == 1 and math.isnan(interval([1.0, 1.0]).low), "two equal values are no certainty"


def test_holm() -> None:
    # Holm's own step-down: .01 × 4, .02 × 3, then .03 × 2 and .5, none below the one before
    assert holm({"a": 0.5, "b": 0.01, "c": 0.03, "d": 0.02, "e": math.nan}) == pytest.approx(
        {"a": 0.5, "b": 0.04, "c": 0.06, "d": 0.06, "e": math.nan}, nan_ok=True
    )
    assert p_value([0.0, 0.0]) == 1 and p_value([1.0, 1.0]) == 0.5 and math.isnan(p_value([1.0]))


def test_a_task_alone_may_be_clear_and_among_others_not() -> None:
    middling = [1.0, 2.0, 3.0, 4.0, 0.5]
    assert p_value(middling) == pytest.approx(stats.ttest_1samp(middling, 0).pvalue)
    assert 0.025 < p_value(middling) < 0.05
    assert verdicts({"t": middling}) == (["t"], [])
    assert verdicts({"t": middling, "u": [1.0, -1.0]}) == ([], [])
    assert verdicts({"t": [-x for x in middling]}) == ([], ["t"])


def test_report_has_the_matched_runs_beside_every_policy() -> None:
    rows = [row("full", "one", s, 0.0, 0.9) for s in range(3)] + [matched(s, 80, 0.8 + s / 100, loss=1.5) for s in range(3)]
    rows += [judged(row("ours", "one", s, 0.2, 0.85), 80) for s in range(3)]
    text = report(rows, EFFORT)
    assert "| t | `matched` | -4.50 ± 0.29 |" in text, "their own curve"
    low, high = (100 * x for x in stats.t.interval(0.95, 2, 0.04, stats.sem([0.05, 0.04, 0.03])))
    assert f"| `ours` one | +4.00 [{low:+.2f}, {high:+.2f}] (20 %) |" in text
    assert "| `ours` one | -50.00 (20 %) |" in text
    assert "| `ours` one | 1 of 1 | 0 of 1 | 0 of 1 | 0 of 1 | +4.00 ± 0.58 / -50.0 ± 0.0 % (20 %) |" in text
