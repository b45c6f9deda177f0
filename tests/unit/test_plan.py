"""Layer costs, traffic and freeze plans of the planner, and the `smartfrz plan` command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_planner import layer, naps, uniform
from typer.testing import CliRunner

from smartfrz_ds.cli.main import app
from smartfrz_ds.model.flops import FlopMeter
from smartfrz_ds.model.layers import find_layers
from smartfrz_ds.planner import Cluster, DoesNotFit, Link, Phase, best_cut, estimate_costs, freeze_plan, load_costs, simulate


def test_traffic_between_replicas() -> None:
    """n = 100 active and 60 frozen weights, 4 replicas, 2 bytes an element, 8 micro-batches."""
    wire = {zero: Cluster(replicas=4, zero=zero).traffic(100, 60, 8) for zero in range(4)}
    assert [wire[z].reduced for z in range(4)] == [300, 300, 8 * 300, 8 * 150]
    assert [wire[z].gathered for z in range(4)] == [0, 150, 150, 8 * (2 * 150 + 90)]
    assert Cluster(replicas=4, zero=3, replicated_frozen=True).traffic(100, 60, 8).gathered == 8 * 2 * 150
    assert Cluster(replicas=1, zero=3).traffic(100, 60, 8).total == 0
    assert Cluster(replicas=4).traffic(0, 60, 8).collectives == 0


def test_overlap_hides_what_fits_behind_computing() -> None:
    costs = [layer(0.1, 0.1, 0.1, weights=10**9)]
    net = Link(bandwidth=1e10)

    def takes(zero: int, overlap: bool) -> float:
        cluster = Cluster(replicas=2, zero=zero, between_replicas=net, overlap=overlap)
        return simulate(costs, [0, 1], 4, cluster=cluster).makespan

    assert takes(0, False) == pytest.approx(4 * 0.2 + 0.2)
    assert takes(0, True) == pytest.approx(4 * 0.2 + 0.2 - 0.1)  # behind the last backward of 0.1 s
    assert takes(1, True) == pytest.approx(4 * 0.2 + 0.2 - 0.1 + 0.1)  # and the gather
    assert takes(2, True) == pytest.approx(4 * 0.2 + 0.8 - 0.4 + 0.1)
    assert takes(3, True) == pytest.approx(max(4 * 0.2, 4 * (0.2 + 0.1)))


def test_plan_of_a_run_adds_up() -> None:
    costs = naps()
    phases = [Phase(share=0.25, frozen=0), Phase(share=0.25, frozen=8), Phase(share=0.5, frozen=12)]
    plan = freeze_plan(costs, phases, stages=4, micro_batches=8, steps=7200, parts=uniform(16, 4))
    assert [p.rebalanced.parts for p in plan.phases][1:] == [(0, 8, 11, 13, 16), (0, 7, 12, 14, 16)]
    assert plan.hours["unfrozen"] == pytest.approx(2 * 0.600)
    assert plan.hours["pruned"] == pytest.approx(2 * (0.25 * 0.600 + 0.25 * 0.505 + 0.5 * 0.370))
    best = simulate(costs, best_cut(costs, 4, 8), 8).makespan
    assert plan.hours["rebalanced"] == pytest.approx(2 * (0.25 * best + 0.25 * 0.390 + 0.5 * 0.265))
    assert plan.ranks == 4


def test_plan_counts_what_goes_between_stages() -> None:
    costs = [layer(output_bytes=10)] * 4
    plan = freeze_plan(costs, [Phase(share=1, frozen=f) for f in (1, 2)], stages=4, micro_batches=3, parts=[0, 1, 2, 3, 4])
    assert plan.unfrozen.stage_bytes == 3 * 10 * 3 * 2
    assert plan.phases[0].pruned.stage_bytes == 3 * 10 * (1 + 2 + 2)  # no gradient goes into the frozen stage
    assert plan.phases[1].pruned.stage_bytes == 3 * 10 * (1 + 1 + 2)


def test_memory_limit_holds_in_every_phase() -> None:
    costs = [layer(weights=10**9)] * 8
    phases = [Phase(share=1, frozen=f) for f in (2, 4, 6)]
    free = freeze_plan(costs, phases, stages=2, micro_batches=8)
    limit = 40e9  # 16 GB a layer that trains, 2 GB a frozen one
    with pytest.raises(DoesNotFit, match=r"memory_limit: got 40000000000\.0; no cut of 8 layers into 2 stages fits"):
        freeze_plan(costs, phases, stages=2, micro_batches=8, memory_limit=limit)
    tight = freeze_plan(costs, phases[1:], stages=2, micro_batches=8, memory_limit=limit, parts=[0, 4, 8])
    for p in tight.phases:
        for a, b in zip(p.rebalanced.parts, p.rebalanced.parts[1:], strict=False):
            assert sum(2e9 if i < p.frozen else 16e9 for i in range(a, b)) <= limit
    assert tight.phases[0].rebalanced.seconds >= free.phases[1].rebalanced.seconds


@pytest.mark.parametrize("recompute", [False, True])
def test_estimated_costs_are_the_flops_of_a_real_gpt(recompute: bool) -> None:
    hidden, vocabulary, sequence, micro_batch = 32, 96, 24, 3
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_embd=hidden, n_layer=2, n_head=2, n_positions=sequence, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager")
    meter = FlopMeter(model, find_layers(model))
    model(torch.zeros(micro_batch, sequence, dtype=torch.int64))
    assert meter.profile is not None
    forward, gradients = meter.profile.forward, meter.profile.gradients
    costs = estimate_costs(
        layers=2, hidden=hidden, vocabulary=vocabulary, sequence=sequence, micro_batch=micro_batch, flops=1.0, recompute=recompute
    )
    assert [c.forward for c in costs] == list(forward)
    again = sum(c.forward for c in costs[1:3]) if recompute else 0
    assert sum(c.backward_weight for c in costs) - again == sum(g.flops for g in gradients if g.of_weight)
    assert sum(c.backward_input for c in costs) == sum(g.flops for g in gradients if not g.of_weight)


def profile(folder: Path, layers: Any) -> Path:
    file = folder / "costs.json"
    file.write_text(json.dumps({"layers": layers}))
    return file


def test_profile_is_read(tmp_path: Path) -> None:
    one = {"name": "block", "count": 3, "forward": 1e-3, "backward_input": 0, "backward_weight": 2e-3, "weights": 5}
    assert load_costs(profile(tmp_path, [one])) == [layer(1e-3, 0, 2e-3, weights=5)] * 3


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], 'allowed: an object with "layers", a list of at least one layer'),
        ([3], r"layers\[0\]: got 3; allowed: an object with"),
        ([{"forward": 1, "backward_input": 1}], r"layers\[0\]: 'backward_weight' is missing"),
        ([{"forward": -1, "backward_input": 1, "backward_weight": 1}], r"layers\[0\]\.forward: got -1; allowed: a finite number >= 0"),
        ([{"forward": "1"}], r"layers\[0\]\.forward: got '1'; allowed: a finite number >= 0"),
        ([{"foward": 1}], r"layers\[0\]: unknown key 'foward'; allowed: activation_bytes, backward_input, .*forward"),
        ([{"forward": 1, "backward_input": 1, "backward_weight": 1, "count": 0}], r"layers\[0\]\.count: got 0; allowed: an integer >= 1"),
        (
            [{"forward": 1, "backward_input": 1, "backward_weight": 1, "weights": 0.5}],
            r"layers\[0\]\.weights: got 0\.5; allowed: an integer",
        ),
    ],
)
def test_profile_is_checked(tmp_path: Path, layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_costs(profile(tmp_path, layers))


def run(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["plan", *args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_command_prints_a_table_and_json(tmp_path: Path) -> None:
    costs = [{"forward": c.forward, "backward_input": c.backward_input, "backward_weight": c.backward_weight} for c in naps()]
    options = ["--profile", str(profile(tmp_path, costs)), "--pp", "2", "--micro-batches", "8", "--latency", "0", "--parts", "0,8,16"]
    code, out, _ = run(*options, "--frozen", "0.25,0.5,0.75")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[1][:2] == ["0", "930.0"]
    assert [row[:8] for row in rows[2:5]] == [
        ["4", "905.0", "ms", "1.03x", "800.0", "ms", "1.16x", "15%"],
        ["8", "830.0", "ms", "1.12x", "610.0", "ms", "1.52x", "15%"],
        ["12", "510.0", "ms", "1.82x", "405.0", "ms", "2.30x", "11%"],
    ]
    assert rows[2][-1] == "9+7"
    code, out, _ = run(*options, "--schedule", "0.5:0,0.5:0.75", "--steps", "3600", "--json")
    assert code == 0
    read = json.loads(out)
    assert read["hours"]["unfrozen"] == pytest.approx(0.93)
    assert read["phases"][1]["rebalanced"]["parts"] == [0, 11, 16]


def test_command_plans_plain_data_parallel_training() -> None:
    code, out, _ = run("--layers", "24", "--hidden", "1024", "--dp", "8", "--zero", "3", "--schedule", "0.4:0,0.6:0.5", "--steps", "1000")
    assert code == 0
    assert "frozen: " in out and "between stages" not in out and "rebalanced" not in out
    assert "device hours on 8 devices" in out


def test_the_documented_plan_is_what_the_command_prints() -> None:
    text = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    command = next(line for line in text.splitlines() if line.startswith("smartfrz plan") and "--schedule" in line)
    code, out, _ = run(*command.split("#")[0].split()[2:])
    assert code == 0
    assert text.split("```text\n")[1].split("```")[0] == out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--profile, --layers: allowed: exactly one of them"),
        (["--layers", "4", "--frozen", "1.5"], "--frozen: got '1.5'; allowed: fractions of the layers from 0 to below 1"),
        (["--layers", "4", "--frozen", "a"], "--frozen: got 'a'; allowed"),
        (
            ["--layers", "4", "--schedule", "0.5:0.5"],
            "--schedule: got '0.5:0.5', whose shares add up to 0.5; allowed: comma-separated SHARE:FRACTION",
        ),
        (["--layers", "4", "--schedule", "half"], "--schedule: got 'half'; allowed: comma-separated SHARE:FRACTION"),
        (["--layers", "4", "--schedule", "1:0", "--frozen", "0.5"], "--frozen, --schedule: allowed: at most one"),
        (["--layers", "4", "--pp", "7"], "--pp: got 7; allowed: at most 6"),
        (["--layers", "4", "--pp", "2", "--zero", "2"], "--zero: got 2 with --pp 2; allowed in a pipeline: 0 or 1"),
        (
            ["--layers", "4", "--pp", "2", "--parts", "0,7,6"],
            "--parts: got '0,7,6'; allowed: 3 increasing comma-separated integers from 0 to 6",
        ),
        (["--layers", "4", "--order", "zb"], "--order: got 'zb'; allowed: '1f1b' or 'gpipe'"),
        (["--layers", "4", "--bandwidth", "0"], "--bandwidth: got 0; allowed: a number above 0"),
        (
            ["--layers", "4", "--memory-limit", "0.001"],
            "--memory-limit: got 0.001, which lacks 19.7 GB; allowed: at least 19.7 GB a rank",
        ),
        (["--profile", "no/such.json"], "no/such.json"),
    ],
)
def test_command_refuses(args: list[str], message: str) -> None:
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), err), err
