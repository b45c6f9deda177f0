"""Computes the pause of a freeze on a large cluster from the layouts alone: the table of docs/cost-of-a-freeze.md.

`python -m smartfrz_ds.bench.paper docs/cost-of-a-freeze.md` updates it. The tensors are on torch's meta device and have only shapes.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import Parameter

from smartfrz_ds.backends.cost import Bandwidths, Cost
from smartfrz_ds.backends.deepspeed.flat.cost import layout_cost
from smartfrz_ds.backends.deepspeed.flat.partition import STAGING_BYTES, FlatLayout

BEGIN = "<!-- table: begin (made by smartfrz_ds/bench/paper.py) -->"
END = "<!-- table: end -->"
RANKS = 64
# 200 Gbit/s per rank, device memory with 1.5 TB/s, PCIe 4 x16, 50 microseconds per exchange.
CLUSTER = Bandwidths(network=25e9, memory=1.5e12, host_link=25e9, latency=50e-6)
STATE = (4, 4, 4)  # bytes per element: fp32 master, exp_avg, exp_avg_sq
WEIGHT = 2  # bf16


def llama_7b() -> list[list[Parameter]]:
    """Make the parameters of a Llama with 6.74 billion weights, per layer: embeddings, 32 blocks, norm and head."""
    hidden, inner, vocabulary = 4096, 11008, 32000
    block: list[tuple[int, ...]] = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)] + [(hidden,)] * 2
    layers: list[list[tuple[int, ...]]] = [[(vocabulary, hidden)], *[block] * 32, [(hidden,), (vocabulary, hidden)]]
    return [[Parameter(torch.empty(shape, device="meta")) for shape in layer] for layer in layers]


def cost_of(layers: Sequence[Sequence[Parameter]], frozen: int, more: int, ranks: int = RANKS) -> Cost:
    """Compute the cost of a freeze under ZeRO-1/2, with one parameter group.

    Args:
        layers: The parameters of each layer, front to back.
        frozen: Number of layers at the front that are already frozen.
        more: Number of following layers that freeze now.
        ranks: Number of ranks.
    """

    def layout(first: int) -> FlatLayout:
        return FlatLayout(tuple(p for layer in layers[first:] for p in layer), ranks, alignment=2 * ranks)

    old, new = layout(frozen), layout(frozen + more)
    return layout_cost(old, new, STATE, weight_bytes=WEIGHT * (2 * new.numel + old.numel - new.numel), on_host=False)


def table() -> str:
    """Make the table: one row per freeze, with the moved bytes and the pause."""
    layers = llama_7b()
    lines = [
        "| freeze of | moved, GB | busiest link at least, GB | exchanges | one after the other, GB | pause, s (all links at once) |",
        "|---|---|---|---|---|---|",
    ]
    for name, frozen, more in (
        ("the embeddings", 0, 1),
        ("block 0, after the embeddings", 1, 1),
        ("block 8, after those before", 9, 1),
        ("block 16, after those before", 17, 1),
        ("half at once (embeddings and 16 blocks)", 0, 17),
    ):
        c = cost_of(layers, frozen, more)
        numbers = f"{c.moved_bytes / 1e9:.1f} | {c.least_busiest_bytes / 1e9:.2f} | {c.exchanges} | {c.busiest_bytes / 1e9:.1f}"
        lines.append(f"| {name} | {numbers} | {c.seconds(CLUSTER):.2f} ({_at_best(c).seconds(CLUSTER):.2f}) |")
    return "\n".join(lines) + "\n"


def _at_best(cost: Cost) -> Cost:
    """Return the cost if all exchanges ran at the same time, each with its own staging buffer."""
    waits = cost.busiest_bytes - cost.least_busiest_bytes
    exchanges = len(STATE) * -(-cost.least_busiest_bytes // len(STATE) // STAGING_BYTES)
    return dataclasses.replace(
        cost,
        busiest_bytes=cost.least_busiest_bytes,
        exchanges=exchanges,
        copied_bytes=cost.copied_bytes - 2 * waits,
        linked_bytes=cost.linked_bytes - waits,
    )


def updated(text: str) -> str:
    """Replace the table between the marks in `text`.

    Raises:
        ValueError: The marks are missing.
    """
    return replaced(text, BEGIN, END, table())


def replaced(text: str, begin: str, end: str, new: str) -> str:
    """Replace what is between two marks in `text`.

    Raises:
        ValueError: The marks are missing.
    """
    if begin not in text or end not in text:
        raise ValueError(f"the marks {begin!r} and {end!r} are missing")
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{new}{end}{rest.split(end, 1)[1]}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m smartfrz_ds.bench.paper docs/cost-of-a-freeze.md")
    target = Path(sys.argv[1])
    target.write_text(updated(target.read_text(encoding="utf-8")), encoding="utf-8")
