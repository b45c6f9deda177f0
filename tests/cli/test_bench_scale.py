"""`smartfrz bench scale` on small shapes: its counts, what it stores, and that no work grows faster than linearly."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from typer.testing import CliRunner

from smartfrz_ds.backends import memory
from smartfrz_ds.bench import paper
from smartfrz_ds.bench.scale import command
from smartfrz_ds.bench.scale.command import PARTS, bench_scale, exponent, growth_table
from smartfrz_ds.bench.scale.measure import ENGINES, executed_bytecodes, measure
from smartfrz_ds.bench.scale.shapes import SHAPES, Decoder, Shape
from smartfrz_ds.cli.main import app

TINY = Shape(hidden=64, inner=96, blocks=16, heads=4, kv_heads=2, vocabulary=128)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)


def test_shapes_have_the_weights_of_their_names() -> None:
    counts = {name: sum(p.numel() for p in Decoder(shape).parameters()) for name, shape in SHAPES.items() if name != "tiny"}
    assert {name: round(count / 1e9, 2) for name, count in counts.items()} == {
        "llama-7b": 6.74,
        "llama-13b": 13.02,
        "llama-70b": 68.98,
        "llama-70b-40": 34.75,
        "llama-70b-160": 137.43,
        "mixtral-8x7b": 46.70,
    }


def test_command_stores_each_cell_once(tmp_path: Path) -> None:
    arguments = ["bench", "scale", "--model", "tiny", "--ranks", "8,16", "--repeats", "1", "--out", str(tmp_path)]
    arguments += ["--engine", "zero-3", "--engine", "pipeline"]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.output
    assert not dist.is_initialized()
    file = tmp_path / "cells.jsonl"
    lines = file.read_text().splitlines()
    assert [(json.loads(line)["ranks"], json.loads(line)["engine"]) for line in lines] == [(w, e) for w in (8, 16) for e in ENGINES[2:]]
    assert "| tiny | pipeline | 16 |" in run.stdout and "| zero-3 | ranks, tiny |" in run.stdout
    assert (tmp_path / "scale.md").read_text() in run.stdout
    # a process that ended in the middle of the last line
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40] + "\n")
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    kept = file.read_text().splitlines()
    assert kept[: len(lines) - 1] == lines[:-1] and len(kept) == len(lines) + 1
    assert json.loads(kept[-1])["engine"] == ENGINES[-1]


# the first two share all of their plans
QUICK = [pytest.param(engine, marks=pytest.mark.slow) if engine == "zero-1" else engine for engine in ENGINES]


@functools.cache
def cell(engine: str, ranks: int, blocks: int) -> dict[str, Any]:
    return {"ranks": ranks} | measure(replace(TINY, blocks=blocks), ranks, engine, 1)


@pytest.mark.parametrize("engine", QUICK)
def test_collectives_do_not_depend_on_ranks_or_layers(engine: str) -> None:
    free = memory.free_memory
    cells = [cell(engine, 64, 16), cell(engine, 256, 16), cell(engine, 64, 64)]
    for part in PARTS:
        assert len({c[f"{part}_collectives"] for c in cells}) == 1, f"{engine}, {part}"
    # one reduction of the samples; the decision, and the digest of what each rank has heard
    assert (cells[0]["snapshot_collectives"], cells[0]["stage_collectives"]) == (1, 2)
    assert memory.free_memory is free and not dist.is_initialized()


@pytest.mark.parametrize("engine", QUICK)
def test_work_grows_no_faster_than_linearly(engine: str) -> None:
    """By executed bytecodes: the parts of a cell with four times the ranks, and with four times the blocks."""
    small = cell(engine, 64, 16)
    for large, axis in ((cell(engine, 256, 16), "ranks"), (cell(engine, 64, 64), "layers")):
        for part in PARTS:
            assert exponent([small, large], axis, f"{part}_work") < 1.1, f"{part}, {axis}"


def test_bytes_are_those_of_the_paper_bench() -> None:
    """Seven billion weights on 64 ranks, half frozen: the other bench lays the tensors out by itself."""
    measured = measure(SHAPES["llama-7b"], 64, "zero-2", 1)
    cost = paper.cost_of(paper.llama_7b(), 0, 17, 64)
    assert (measured["moved_bytes"], measured["exchanges"]) == (cost.moved_bytes, cost.exchanges)
    assert measured["busiest_bytes"] == cost.busiest_bytes


def test_bytecodes_count_work_that_a_call_does() -> None:
    def square(n: int) -> int:
        return sum(1 for _ in range(n) for _ in range(n))

    counts = [{"n": n, "work": executed_bytecodes(lambda n=n: square(n))} for n in (20, 40, 80)]  # type: ignore[misc]
    assert 1.8 < exponent(counts, "n", "work") < 2.05
    assert counts[0]["work"] == executed_bytecodes(lambda: square(20))


def test_growth_is_fitted_over_ranks_and_over_layers() -> None:
    def row(model: str, ranks: int, layers: int) -> dict[str, Any]:
        parts = {f"{part}_s": 1e-3 * ranks for part in PARTS} | {f"{part}_work": ranks * layers**2 for part in PARTS}
        return {"model": model, "ranks": ranks, "engine": "zero-1", "layers": layers} | parts

    rows = [row("llama-70b", 8, 82), row("llama-70b", 64, 82), row("llama-70b-160", 64, 162)]
    text = growth_table(rows)
    assert "| zero-1 | ranks, llama-70b | 1.00 (1.00) |" in text
    assert "| zero-1 | layers, 64 ranks | 0.00 (2.00) |" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"models": ["gpt-9"]}, "--model: got .*gpt-9"),
        ({"engines": ["zero-9"]}, "--engine: got .*zero-9"),
        ({"ranks": [1], "engines": ["zero-1"]}, "--ranks: got .*at least 2"),
        ({"ranks": [12]}, "--ranks: got .*multiples of 8"),
        ({"repeats": 0}, "--repeats: got 0"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bench_scale(tmp_path, **arguments)
    assert not (tmp_path / "cells.jsonl").exists()
    assert command.RANKS == (8, 64, 256, 1024)
