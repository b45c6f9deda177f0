"""`smartfrz bench cache` at its smallest, with the real MiniLM and BBC."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smartfrz_ds.bench.cache import bench_cache


def test_smallest_run(tmp_path: Path) -> None:
    text = bench_cache(tmp_path, blocks=(5,), rows=12, batch=4, length=8, epochs=3)
    (result,) = json.loads((tmp_path / "cache.json").read_text())
    assert result["equal"] and " equal |" in text
    assert "9 rows" not in result["note"] and "12 rows" in result["note"]
    assert result["note"].startswith("5 of 8 forwards skipped the frozen layers")  # one of the second epoch is compared
    assert 0 < result["prefix"] < result["seconds"]["frozen"]


@pytest.mark.parametrize(("name", "value"), [("blocks", (6,)), ("epochs", 2), ("rows", 8)])
def test_numbers_out_of_range(name: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"--{name}: got .*; allowed: "):
        bench_cache(tmp_path, **{name: value})  # type: ignore[arg-type]
