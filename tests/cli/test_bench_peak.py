"""`smartfrz bench peak`: measured bytes stay within the formula, and on accelerators the need does not grow with the ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from smartfrz_ds.backends.deepspeed.flat.memory import SMALL_BYTES
from smartfrz_ds.backends.deepspeed.flat.partition import FlatLayout
from smartfrz_ds.backends.deepspeed.flat.permute import PIECE_BYTES
from smartfrz_ds.bench import paper
from smartfrz_ds.bench.memory import AllocatorTrace
from smartfrz_ds.bench.peak import paper as peak_paper
from smartfrz_ds.bench.peak.command import ENGINES, bench_peak
from smartfrz_ds.cli.main import app

ROOT = Path(__file__).parents[2]
STAGING = 256 * 1024


def test_the_allocator_is_traced_exactly() -> None:
    """A tensor from before the mark counts when it goes; views and scalars of Python don't."""
    size = 2**20
    with AllocatorTrace() as trace:
        old = torch.empty(size, dtype=torch.uint8)
        with trace.measured():
            new = torch.empty(3 * size, dtype=torch.uint8)
            del old
            half = new[: size // 2]
            second = torch.empty(2 * size, dtype=torch.uint8)
            del new, half, second
    most, after = trace.rise()
    assert (most, after) == (4 * size, -size)


def check(measured: dict[str, dict[str, int]]) -> None:
    for name, e in measured.items():
        if name.startswith("z0"):  # nothing moves
            assert e["peak"] <= SMALL_BYTES, f"{name}: {e}"
            continue
        # One of gloo's threads may be the last to hold the two buffers of an exchange (three tensors, so three exchanges).
        unseen = 0 if name.startswith("z3") else 6 * STAGING
        assert e["slack"] >= -unseen, f"{name}: {e}"
        # Not loose: nothing but the staging buffers, alignment and ZeRO-3's buffer of gradients, which goes first, may be missing.
        spare = 2 * STAGING + SMALL_BYTES + (e["tensor"] if name.startswith("z3") else 0)
        assert e["formula"] - e["peak"] <= spare, f"{name}: {e}"
        assert e["after"] < 0


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_command_measures_peaks(tmp_path: Path) -> None:
    arguments = ["bench", "peak", "--ranks", "2", "--engine", "z1-bf16", "--engine", "z3-fp32", "--params", "1", "--out", str(tmp_path)]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.output
    check(json.loads((tmp_path / "2-ranks.json").read_text())["engines"])
    assert "| 2 | z1-bf16 |" in run.stdout and "| 1024 |" in run.stdout


@pytest.mark.slow
@pytest.mark.distributed(8)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_peaks_of_all_engines(tmp_path: Path, ranks: int) -> None:
    bench_peak(tmp_path, ranks=[ranks])
    check(json.loads((tmp_path / f"{ranks}-ranks.json").read_text())["engines"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"ranks": [1]}, "--ranks: got"), ({"engines": ["z9"]}, "z9"), ({"params": 0}, "params: got 0"), ({"staging": 0}, "staging: got 0")],
)
def test_wrong_arguments_are_named(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bench_peak(tmp_path, **arguments)
    assert set(ENGINES) == {"z0-fp32", "z0-bf16", "z1-fp32", "z1-bf16", "z1-bf16opt", "z2-fp32", "z2-bf16", "z3-fp32", "z3-bf16"}


# --- on paper ---------------------------------------------------------------------------------------------------------------------


def test_on_accelerators_only_the_staging_buffers_are_held() -> None:
    """Seven billion weights. On the host waits what leaves, all state of the first rank."""
    layers = paper.llama_7b()
    total = sum(p.numel() for layer in layers for p in layer)
    for ranks in (2, 64):
        flat, sharded = (peak_paper.need_of(layers, peak_paper.FROZEN, ranks, sharded=kind) for kind in (False, True))
        assert flat.device == sharded.device == 2 * PIECE_BYTES
        assert flat.host <= sum(paper.STATE) * (total // ranks + ranks) + PIECE_BYTES + SMALL_BYTES
        assert sharded.host < flat.host


def test_front_that_grows_by_padding_pushes_a_small_parameter_out() -> None:
    """One element leaves 16; the other 15 are padded to 16, so that it needs a storage of its own."""
    params = tuple(torch.nn.Parameter(torch.empty(n, device="meta")) for n in (1, 8, 7))
    old, new = FlatLayout(params, 2, 4), FlatLayout(params[1:], 2, 8)
    arrangement = peak_paper.arrangement_of(old, new, params[:1])
    assert (old.numel, new.numel) == (16, 16)
    assert arrangement.evicted == params[:1] and arrangement.extra == 1
    roomy = peak_paper.arrangement_of(FlatLayout(params, 2, 32), new, params[:1])
    assert roomy.extra == 0 and roomy.frozen[0].offset == 31


def test_the_documented_table_is_the_one_of_the_code() -> None:
    """Made anew by: python -m smartfrz_ds.bench.peak.paper docs/cost-of-a-freeze.md"""
    text = (ROOT / "docs" / "cost-of-a-freeze.md").read_text()
    assert peak_paper.updated(text) == text
