"""`smartfrz bench pipeline` at its smallest, the arithmetic of its tables, and (slow) its claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from smartfrz_ds.bench.pipeline import CASES, KINDS, bench_pipeline, ratio, tables
from smartfrz_ds.bench.pipeline_nets import SLEEPERS, WIDTH, gpt, sleepers
from smartfrz_ds.cli.main import app
from smartfrz_ds.planner import LayerCost, best_cut, simulate


def result() -> dict[str, Any]:
    """A case's JSON with one fraction: 4 s unfrozen, 2 s rebalanced, of which half was predicted otherwise."""
    holds = {"activations": [3_000_000, 0], "gradients": [0, 3_000_000], "optimizer": [2_000_000, 1_000_000]}
    part = {
        "fraction": 0.5,
        "frozen": 8,
        "rebalance": {"bounds": [0, 11, 16], "moves": [{"seconds": 0.25, "bytes": 4_000_000, "gain": 1.5}]},
        "seconds": {"unfrozen": [4.0, 5.0, 6.0], "balanced": [4.0, 5.0, 6.0], "pruned": [3.2, 4.0, 9.0], "rebalanced": [2.0, 2.0, 2.0]},
        "predicted": {"unfrozen": 4.0, "balanced": 4.0, "pruned": 3.2, "rebalanced": 1.6},
        "holds": {"pruned": holds, "rebalanced": holds | {"gradients": [0, 0]}},
    }
    return {"case": "sleep-pp2", "layers": 16, "start": [0, 8, 16], "holds": {"unfrozen": holds}, "fractions": [part]}


def test_ratios_are_medians_over_rounds_beside_those_of_the_fastest_steps() -> None:
    part = result()["fractions"][0]
    got = ratio(part, "rebalanced")
    assert (got.measured, got.fastest, got.predicted, got.reached) == (2.5, 2.0, 2.5, 1.0)
    assert ratio(part, "pruned").measured == ratio(part, "pruned").fastest == ratio(part, "pruned").predicted == 1.25


def test_tables_show_speed_bytes_and_what_moved() -> None:
    text = tables([result()])
    assert "| 50% of 16 | 1.00x (1.00) / 1.00x | 1.25x (1.25) / 1.25x | 2.50x (2.00) / 2.50x | **1.00** | 8+8 -> 11+5 |" in text
    assert "| sleep-pp2 | 50%, rebalanced | 3 + 0 | 0 + 0 | 2 + 1 | 4 MB in 0.25 s |" in text
    assert "| sleep-pp2 | 50% | 4000 / 4000 | 4000 / 4000 | 3200 / 3200 | 2000 / 1600 |" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"cases": ["z9"]}, "--case: got 'z9'; allowed: sleep-pp2"),
        ({"rounds": 0}, "rounds: got 0; allowed: more than 0"),
        ({"nap": -1.0}, "nap: got -1.0"),
        ({"blocks": 6}, "blocks: got 6; allowed: a multiple of 4"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bench_pipeline(arguments.pop("cases", ["sleep-pp2"]), tmp_path, **arguments)


def test_nets_are_as_long_as_they_say() -> None:
    assert len(sleepers(0.1)) == SLEEPERS and sum(spec.build().seconds > 0 for spec in sleepers(0.1)) == 13
    assert len(gpt(8, 16, 4)) == 10


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_command_measures_a_case_once(tmp_path: Path) -> None:
    """Two real stages of layers that sleep for a millisecond, two micro-batches; the second call measures nothing."""
    options = ["bench", "pipeline", "--case", "sleep-pp2", "--rounds", "2", "--nap", "1", "--micro-batches", "2", "--out", str(tmp_path)]
    first = CliRunner().invoke(app, options)
    assert first.exit_code == 0, first.output
    seen = json.loads((tmp_path / "sleep-pp2.json").read_text())
    message, micro = WIDTH * 4, 2
    state = 2 * WIDTH * 4  # two moments
    assert seen["start"] == [0, 8, 16] and [p["frozen"] for p in seen["fractions"]] == [4, 8, 12]
    assert seen["holds"]["unfrozen"] == {
        "activations": [micro * message, 0],
        "gradients": [0, micro * message],
        "optimizer": [8 * state, 8 * state],
    }
    for part, left in zip(seen["fractions"], ([4, 8], [0, 8], [0, 4]), strict=True):
        pruned, moved = part["holds"]["pruned"], part["holds"]["rebalanced"]
        assert pruned["optimizer"] == [n * state for n in left] and sum(moved["optimizer"]) == sum(left) * state
        assert pruned["gradients"] == [0, micro * message if left[0] else 0]
        assert moved["gradients"] == [0, micro * message if part["rebalance"]["bounds"][1] > part["frozen"] else 0]
        assert set(part["seconds"]) == set(KINDS) and all(len(taken) == 2 for taken in part["seconds"].values())
        # What was measured is what the layers were told to take, and what is predicted is the planner's.
        costs = [LayerCost(**cost) for cost in part["costs"]]
        assert all(1e-3 <= c.forward < 2e-3 and 2e-3 <= c.backward_input + c.backward_weight < 4e-3 for c in costs[2:15]), costs
        assert all(c.forward < 1e-3 for c in (*costs[:2], costs[15])), costs
        best = best_cut(costs, 2, micro, part["frozen"])
        now, possible = (simulate(costs, bounds, micro, part["frozen"]).makespan for bounds in (part["rebalance"]["bounds"], best))
        assert now == pytest.approx(part["predicted"]["rebalanced"]) and now <= 1.1 * possible
    assert part["predicted"]["unfrozen"] / part["predicted"]["rebalanced"] > 1.5
    assert ratio(part, "rebalanced").measured > 1.2
    assert (tmp_path / "pipeline.md").read_text() in first.stdout and "| sleep-pp2 | 75% of 16 |" in first.stdout

    stamp = (tmp_path / "sleep-pp2.json").stat().st_mtime_ns
    assert CliRunner().invoke(app, options).exit_code == 0
    assert (tmp_path / "sleep-pp2.json").stat().st_mtime_ns == stamp


def test_command_names_a_wrong_case(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["bench", "pipeline", "--case", "gpt-pp9", "--out", str(tmp_path)])
    assert run.exit_code == 2 and all(name in run.stderr for name in CASES)


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_the_gpt_is_measured_too(tmp_path: Path) -> None:
    bench_pipeline(["gpt-pp2"], tmp_path, rounds=1, blocks=4, width=16, length=8, micro_batches=2)
    seen = json.loads((tmp_path / "gpt-pp2.json").read_text())
    assert [p["frozen"] for p in seen["fractions"]] == [2, 3, 4] and seen["layers"] == 4
    message = 2 * 8 * 16 * 4
    assert seen["holds"]["unfrozen"]["activations"] == [2 * message, 0]
