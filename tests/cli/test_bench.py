"""`smartfrz bench zero` at its smallest, the arithmetic of its tables, and the paper's table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from smartfrz_ds.backends.cost import Bandwidths, Cost
from smartfrz_ds.backends.deepspeed.flat.cost import layout_cost
from smartfrz_ds.backends.deepspeed.flat.partition import FlatLayout
from smartfrz_ds.bench import paper
from smartfrz_ds.bench.zero import ENGINES, bench_zero, engines_of, ideal_seconds, summary, tables
from smartfrz_ds.cli.main import app

ROOT = Path(__file__).parents[2]


def result(**changes: Any) -> dict[str, Any]:
    """An engine's JSON: 1 + 2 + 1 s unfrozen, 2.5 s frozen, half of the weights."""
    phases = {"forward": {}, "backward": {"all_reduce": 4_000_000}, "step": {"all_gather_into_tensor": 2_000_000}}
    round_ = {"unfrozen": [1.0, 2.0, 1.0], "naive": [1.0, 1.0, 1.0], "ours": [1.0, 1.0, 0.5], "fresh": [1.0, 1.0, 0.5], "freeze": 2.0}
    return {
        "engine": "z2-fp32",
        "share": 0.5,
        "rounds": [round_, round_, round_ | {"ours": [2.0, 2.0, 1.0]}],
        "bytes": dict.fromkeys(("unfrozen", "naive", "ours"), phases),
        "optimizer_bytes": {"unfrozen": 100, "naive": 100, "ours": 50},
        "freeze": {"rise": 1, "fall": 1, "allowed": 2, "moved_bytes": 3, "predicted_bytes": 3, "predicted_seconds": 0.25},
    } | changes


def test_ideal_leaves_forward_whole_and_takes_the_frozen_share_of_the_rest() -> None:
    assert ideal_seconds([1.0, 2.0, 4.0], 0.25) == 1.0 + 1.5 + 3.0


def test_ratios_are_medians_over_rounds() -> None:
    s = summary(result())
    assert (s["naive"], s["ours"], s["ideal"], s["achieved"], s["fresh"], s["freeze_steps"]) == (0.75, 0.625, 0.625, 1.0, 1.0, 0.5)
    assert s["achieved_quiet"] == s["fresh_quiet"] == 1.0
    assert summary(result(share=0.0))["achieved"] == 1.6


def test_tables_show_bytes_and_what_was_released() -> None:
    text = tables([result()])
    assert "| z2-fp32 | 6.0, 6.0, 6.0 |" in text and "(1.000)" in text and "**1.00** (0.50-1.00), **1.00** | 1.00, 1.00 |" in text


def test_stages_choose_engines() -> None:
    assert engines_of([1]) == ["z1-fp32", "z1-bf16opt"]
    assert engines_of([0, 1, 2, 3]) == list(ENGINES)
    with pytest.raises(ValueError, match=r"--stages: got \[4\]; allowed: 0, 1, 2, 3"):
        engines_of([4])


@pytest.mark.parametrize(
    ("arguments", "words"), [({"rounds": 0}, "rounds: got 0"), ({"ranks": 1}, "ranks: got 1"), ({"params": 0}, "params: got 0")]
)
def test_numbers_out_of_range_are_named(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bench_zero(["z0-fp32"], tmp_path, **arguments)


def test_unknown_engine_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="z9"):
        bench_zero(["z9"], tmp_path)


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_command_measures_an_engine_once(tmp_path: Path) -> None:
    """A real 2-rank run of the smallest kind; the second call finds its result and measures nothing."""
    arguments = ["bench", "zero", "--engine", "z1-fp32", "--params", "0.1", "--rounds", "1", "--steps", "1", "--out", str(tmp_path)]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    seen = json.loads((tmp_path / "z1-fp32.json").read_text())
    state = seen["optimizer_bytes"]
    assert state["naive"] == state["unfrozen"]
    assert math.isclose((state["unfrozen"] - state["ours"]) / state["unfrozen"], seen["share"], rel_tol=0.01)
    assert seen["freeze"]["moved_bytes"] == seen["freeze"]["predicted_bytes"] > 0
    phases = {kind: sum(seen["bytes"][kind]["step"].values()) for kind in ("unfrozen", "naive", "ours")}
    # naively frozen weights are still gathered after every step
    assert phases["naive"] == phases["unfrozen"] and phases["ours"] < 0.6 * phases["unfrozen"]
    assert "| z1-fp32 |" in first.stdout and (tmp_path / "zero.md").read_text() in first.stdout

    stamp = (tmp_path / "z1-fp32.json").stat().st_mtime_ns
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (tmp_path / "z1-fp32.json").stat().st_mtime_ns == stamp


def test_command_names_a_wrong_number_of_ranks() -> None:
    run = CliRunner().invoke(app, ["bench", "zero", "--ranks", "1"])
    assert run.exit_code == 2 and "ranks: got 1; allowed: at least 2" in run.stderr


def test_command_names_a_wrong_stage() -> None:
    run = CliRunner().invoke(app, ["bench", "zero", "--stages", "1,5"])
    assert run.exit_code == 2 and "--stages" in run.stderr and "0, 1, 2, 3" in run.stderr


# --- predicted pause, on paper ---------------------------------------------------------------------------------------------------


def test_seconds_add_up() -> None:
    speed = Bandwidths(network=10.0, memory=100.0, host_link=50.0, latency=0.5)
    cost = Cost(moved_bytes=99, busiest_bytes=20, exchanges=1, copied_bytes=300, linked_bytes=100)
    assert cost.seconds(speed) == 20 / 10 + 300 / 100 + 100 / 50 + (1 + 3) * 0.5


def test_two_ranks_by_hand() -> None:
    """Eight weights on two ranks, the first four freeze: rank 1 held all that is kept, half of it goes to rank 0."""
    params = paper_params([4, 4])
    cost = layout_cost(FlatLayout(params, 2), FlatLayout(params[1:], 2), [4, 4, 4], weight_bytes=0, on_host=True)
    assert (cost.moved_bytes, cost.busiest_bytes, cost.least_busiest_bytes, cost.exchanges) == (2 * 12, 2 * 12, 2 * 12, 3)
    assert cost.linked_bytes == 0
    nothing = layout_cost(FlatLayout(params, 2), FlatLayout(params, 2), [4, 4, 4], weight_bytes=0, on_host=True)
    assert nothing.moved_bytes == nothing.exchanges == 0


def paper_params(sizes: list[int]) -> tuple[Any, ...]:
    import torch

    return tuple(torch.nn.Parameter(torch.empty(n, device="meta")) for n in sizes)


def test_seven_billion_on_paper() -> None:
    """The formulas of docs/cost-of-a-freeze.md: all kept state moves, and the busiest rank can't do with less than its partition."""
    layers = paper.llama_7b()
    total, kept = (sum(p.numel() for layer in layers[first:] for p in layer) for first in (0, 17))
    assert total == 6_738_415_616
    half = paper.cost_of(layers, 0, 17)
    assert 0.97 * 12 * kept <= half.moved_bytes <= 12 * kept
    assert half.least_busiest_bytes == pytest.approx(12 * total / 64, rel=0.01)
    assert half.busiest_bytes >= half.least_busiest_bytes


def test_the_documented_table_is_the_one_of_the_code() -> None:
    """Made anew by: python -m smartfrz_ds.bench.paper docs/cost-of-a-freeze.md"""
    text = (ROOT / "docs" / "cost-of-a-freeze.md").read_text()
    assert paper.updated(text) == text
    with pytest.raises(ValueError, match="marks"):
        paper.updated("no marks")
