"""Computes what a freeze holds above the level before on a large cluster: the second table of `smartfrz bench peak`.

`python -m smartfrz_ds.bench.peak.paper docs/cost-of-a-freeze.md` updates it there. The plans are those that a change carries out, made for
tensors on torch's meta device.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import Parameter

from smartfrz_ds.backends.deepspeed.flat.memory import TensorBytes, with_staging
from smartfrz_ds.backends.deepspeed.flat.partition import FlatLayout
from smartfrz_ds.backends.deepspeed.flat.permute import PIECE_BYTES
from smartfrz_ds.backends.deepspeed.flat.state_moves import GroupMoves
from smartfrz_ds.backends.deepspeed.flat.weights import Arrangement, Place, arrange
from smartfrz_ds.backends.memory import MemoryNeed
from smartfrz_ds.bench.paper import STATE, WEIGHT, llama_7b, replaced

BEGIN = "<!-- table of peaks: begin (made by smartfrz_ds/bench/peak/paper.py) -->"
END = "<!-- table of peaks: end -->"
RANKS = (2, 4, 8, 64, 512, 1024)
FROZEN = 17  # layers: embeddings and 16 blocks
DEVICE = torch.device("cuda")  # only a name: nothing is allocated
WORDS = (
    "On paper: 7 billion weights in bf16 with Adam on an accelerator; the embeddings and 16 of 32 blocks freeze. GB above the level\n"
    "before, on the busiest rank, with the package's own staging buffers. Second copy: what a new buffer of the weights would hold besides."
)


def need_of(layers: Sequence[Sequence[Parameter]], frozen: int, ranks: int, *, sharded: bool) -> MemoryNeed:
    """Compute the need of a freeze on the rank with the most.

    Args:
        layers: The parameters of each layer, front to back.
        frozen: Number of layers at the front that freeze.
        ranks: Number of ranks.
        sharded: Whether each rank has its shards of the weights (ZeRO-3) instead of all of them (ZeRO-1 and 2).
    """
    if sharded:
        layers = [[Parameter(torch.empty(-(-p.numel() // ranks), device="meta")) for p in layer] for layer in layers]
    leaving = [p for layer in layers[:frozen] for p in layer]
    staying = [p for layer in layers[frozen:] for p in layer]
    world = 1 if sharded else ranks
    old, new = (FlatLayout(tuple(params), world, 1 if sharded else 2 * ranks) for params in ([*leaving, *staying], staying))
    moves, arrangement = GroupMoves.plan(old, new, leaving, rank=0, group=None, keep=False), arrangement_of(old, new, leaving)
    needs = [
        with_staging(
            [TensorBytes(old.partition_size * size, new.partition_size * size, waiting * size) for size in STATE],
            arrangement.extra * WEIGHT,
            0,
            on_host=False,
            device=DEVICE,
        )
        for waiting in {moves.waiting_elements(rank) for rank in range(world)}
    ]
    return MemoryNeed(device=max(n.device for n in needs), host=max(n.host for n in needs))


def arrangement_of(old: FlatLayout, new: FlatLayout, leaving: Sequence[Parameter]) -> Arrangement:
    """Plan the first rearrangement of a buffer of bf16 weights that has the layout `old`."""
    places = [Place(p, new.offsets[p], p.numel()) for p in new.params]
    return arrange(places, new.numel, leaving, at=old.offsets, capacity=old.numel, limit=PIECE_BYTES // WEIGHT)


def table() -> str:
    """Make the table: one row per number of ranks."""
    layers = llama_7b()
    total = WEIGHT * sum(p.numel() for layer in layers for p in layer)
    lines = [
        "| ranks | ZeRO-1, ZeRO-2: device | host | second copy | ZeRO-3: device | host | second copy |",
        "|---|---|---|---|---|---|---|",
    ]
    for ranks in RANKS:
        flat, sharded = (need_of(layers, FROZEN, ranks, sharded=kind) for kind in (False, True))
        cells = [flat.device, flat.host, total, sharded.device, sharded.host, total // ranks]
        lines.append(f"| {ranks} | {' | '.join(f'{count / 1e9:.3f}' for count in cells)} |")
    return "\n".join(lines) + "\n"


def updated(text: str) -> str:
    """Replace the table between the marks in `text`.

    Raises:
        ValueError: The marks are missing.
    """
    return replaced(text, BEGIN, END, table())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m smartfrz_ds.bench.peak.paper docs/cost-of-a-freeze.md")
    target = Path(sys.argv[1])
    target.write_text(updated(target.read_text(encoding="utf-8")), encoding="utf-8")
