"""`smartfrz bench cache` at its smallest, with the real MiniLM and BBC, and its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smartfrz_ds.bench.cache.cells import Cell, cells_of
from smartfrz_ds.bench.cache.command import bench_cache
from smartfrz_ds.bench.cache.tables import hits_of, times_of
from smartfrz_ds.bench.cache.trainings import bench_trainings
from smartfrz_ds.bench.cache.trainings import table as trainings_table


def check(tmp_path: Path, net: str, engine: str, ranks: int) -> None:
    text = bench_cache(tmp_path, nets=[net], engines=[engine], frozen=["5/6"], batches=2, batch=4, length=8, params=0.2, epochs=4)
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert result["equal"] and result["settings"]["batches"] == 2
    assert len(result["steps"]) == 4 * 3  # a short batch ends each epoch
    hits, times = hits_of(result), times_of(result)
    assert hits.batches == ranks * 3 * 2 and hits.hits <= hits.back
    assert times is not None and 0 < times.prefix < times.frozen
    assert [s["hits"] for s in result["steps"] if s["epoch"] == 0] == [0, 0, 0]
    assert "| yes |" in text and text == (tmp_path / "cache.md").read_text()
    before = file.stat().st_mtime_ns
    bench_cache(tmp_path, nets=[net], engines=[engine], frozen=["5/6"], batches=2, batch=4, length=8, params=0.2, epochs=4)
    assert file.stat().st_mtime_ns == before  # measured once


def test_one_process(tmp_path: Path) -> None:
    check(tmp_path, "minilm", "one", 1)


@pytest.mark.slow
@pytest.mark.distributed(2)
@pytest.mark.parametrize("net", ["minilm", "mlp"])
@pytest.mark.parametrize("engine", ["ddp", "z1", "z2", "z3", "fsdp2"])
def test_two_ranks(net: str, engine: str, tmp_path: Path) -> None:
    check(tmp_path, net, engine, 2)


@pytest.mark.slow
@pytest.mark.distributed(2)
@pytest.mark.parametrize("task", ["minilm", "gpt"])
def test_trainings(task: str, tmp_path: Path) -> None:
    text = bench_trainings(tmp_path, tasks=[task], seeds=1, steps=20)
    results = {name: json.loads((tmp_path / f"{task}-{name}-0.json").read_text()) for name in ("full", "frozen", "cached", "matched")}
    assert results["cached"]["loss"] == results["frozen"]["loss"]  # bit for bit
    assert results["cached"]["frozen"] == results["frozen"]["frozen"]
    assert results["matched"]["steps"] <= 20 and results["full"]["saved"] == 0
    assert all(f"| {task} | {name} |" in text for name in results)


def test_cells_are_rounded_to_blocks() -> None:
    assert [cell.blocks for cell in cells_of(["minilm"], ["one"], ["1/2", "3/4", "5/6"])] == [3, 4, 5]
    assert [cell.blocks for cell in cells_of(["mlp"], ["z1"], ["1/2", "3/4", "5/6"])] == [4, 6, 7]
    assert Cell.of("mlp-z1-6") == Cell("mlp", "z1", 6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("net", {"nets": ["bert"]}), ("engine", {"engines": ["z4"]}), ("frozen", {"frozen": ["1"]}), ("epochs", {"epochs": 2})],
)
def test_values_out_of_range(name: str, value: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"--{name}: got .*; allowed: "):
        bench_cache(tmp_path, **value)


def test_table_of_trainings_compares_with_the_full_run_of_the_same_seed() -> None:
    run = {"steps": 90, "metric": 0.9, "loss": 0.3, "saved": 0.0, "note": ""}
    results = [run | {"name": f"minilm-full-{seed}", "seconds": seconds} for seed, seconds in ((0, 10.0), (1, 20.0))]
    cached = run | {"metric": 0.91, "saved": 0.4, "note": "hit"}
    results += [cached | {"name": f"minilm-cached-{seed}", "seconds": seconds} for seed, seconds in ((0, 5.0), (1, 10.0))]
    text = trainings_table(results)
    assert "| minilm | cached | 90, 90 | 5.0, 10.0 | 0.50 | 40% | 91.00%, 91.00% (+1.00) | 0.3000, 0.3000 |" in text
    assert text.count("- minilm-cached-") == 2
