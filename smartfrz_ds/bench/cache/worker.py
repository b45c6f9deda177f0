"""Measures one cell of `smartfrz bench cache`, on every rank. Arguments: CELL FILE SETTINGS, passed by command.py.

Three copies of the network take turns step by step, so that a busy machine slows all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from smartfrz_ds.bench.launching import Settings, worker_main

from .cells import BATCH, COPIES, Cell
from .engines import LR, Copy
from .nets import Deal, blocks_of, deals, network


def measure(name: str, settings: Settings) -> dict[str, Any]:
    """Measure a cell. Collective.

    Returns:
        "steps": for each step its epoch, whether the batch is "full" or a short one; "rows_back": the number of ranks all of whose rows
        have been in a full batch of an earlier step; "hits": the number of ranks that skipped the frozen layers; "seconds": those of each
        copy, of the slowest rank. "active": the share of the weights that trains. "equal": whether losses and weights of frozen and cached
        copy are equal, bit for bit, on all ranks. "note": what the cache says of itself on rank 0. If the engine refuses the cache, only
        "reason".
    """
    cell = Cell.of(name)
    rank, world = dist.get_rank(), dist.get_world_size()
    batch = settings["batch"] or BATCH[cell.net]
    result: dict[str, Any] = {"cell": name, "settings": settings}
    rows = world * (settings["batches"] * batch + batch // 2)
    copies: dict[str, Copy] = {}
    for kind in COPIES[::-1]:
        torch.manual_seed(0)
        model, data = network(cell.net, rows, settings["length"], settings["params"])
        # Not "auto": where copies take turns, the time between two steps of one says nothing about its gain.
        cache = {"mode": "on" if kind == "cached" else "off", "memory": "1GiB"}
        try:
            copies[kind] = Copy(cell.engine, model, LR[cell.net], {"policy": "manual", "cache": cache})
        except ValueError as error:
            if kind != "cached":
                raise
            return result | {"reason": str(error)}
        controller = copies[kind].controller
        if controller.report().cache_note.startswith("off: "):
            return result | {"reason": controller.report().cache_note}
        if kind != "full":
            controller.freeze(controller.layers[: 1 + cell.blocks])
        if kind != "cached":
            copies[kind].time_prefix(blocks_of(model)[cell.blocks - 1])
    copies = {kind: copies[kind] for kind in COPIES}
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in copies["frozen"].model.parameters()]
    steps, losses = _train(copies, data, batch, settings["epochs"], rank, world)
    equal = losses["frozen"] == losses["cached"] and all(
        torch.equal(a, b) for a, b in zip(copies["frozen"].weights(), copies["cached"].weights(), strict=True)
    )
    result |= {
        "rows": rows,
        "batch": batch,
        "active": sum(size for size, trains in sizes if trains) / sum(size for size, _ in sizes),
        "equal": all(_gathered(equal)),
        "steps": _joined(_gathered(steps)),
        "note": copies["cached"].controller.report().cache_note,
    }
    for copy in copies.values():
        copy.close()
    return result


def _train(
    copies: dict[str, Copy], data: Any, batch: int, epochs: int, rank: int, world: int
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Train all copies in turn. Returns this rank's steps, and the losses of each copy."""
    dealt = [list(deals(data, batch, epochs, r, world)) for r in range(world)]
    seen: set[int] = set()  # rows that were in a full batch, of any rank
    steps: list[dict[str, Any]] = []
    losses: dict[str, list[float]] = {kind: [] for kind in copies}
    for number, of_ranks in enumerate(zip(*dealt, strict=True)):
        deal: Deal = of_ranks[rank]
        full = len(deal.rows) == batch
        hits, seconds = copies["cached"].hits, {}
        for shift in range(len(copies)):  # the order rotates
            kind = COPIES[(number + shift) % len(COPIES)]
            seconds[kind] = copies[kind].step(deal, number * world + rank)
            losses[kind].append(seconds[kind].pop("loss"))
        hit = copies["cached"].hits > hits
        steps.append({"epoch": deal.epoch, "full": full, "rows_back": seen.issuperset(deal.rows), "hits": int(hit), "seconds": seconds})
        if full:
            seen.update(row for other in of_ranks for row in other.rows)
    return steps, losses


def _gathered(value: Any) -> list[Any]:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def _joined(of_ranks: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Make one list of steps of those of all ranks: the seconds of the slowest rank, and the sum of all hits."""
    joined = []
    for parts in zip(*of_ranks, strict=True):
        first = parts[0]
        seconds = {
            kind: {key: max(round(part["seconds"][kind][key], 6) for part in parts) for key in first["seconds"][kind]}
            for kind in first["seconds"]
        }
        together = {"rows_back": sum(p["rows_back"] for p in parts), "hits": sum(p["hits"] for p in parts), "seconds": seconds}
        joined.append(first | together)
    return joined


def main() -> None:
    """Measure the cell of the command line."""
    torch.set_num_threads(1)
    worker_main(measure)


if __name__ == "__main__":
    main()
