"""`smartfrz bench cache`: steps with nothing frozen, with a frozen prefix, and with the prefix cache, on each engine that has it.

Each cell is one launch (worker.py) in which three copies of a network take turns step by step, so that a busy machine slows all of them.
Each epoch deals the rows out anew over all ranks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from smartfrz_ds.bench.launching import Settings, run_cases

from .cells import BLOCKS, FROZEN, RANKS, cells_of
from .tables import table


def bench_cache(
    out: Path,
    *,
    nets: Sequence[str] = tuple(BLOCKS),
    engines: Sequence[str] = tuple(RANKS),
    frozen: Sequence[str] = FROZEN,
    batches: int = 6,
    batch: int = 0,
    length: int = 64,
    params: float = 38.0,
    epochs: int = 4,
) -> str:
    """Measure cells and make the table, which is also written to `out`/cache.md.

    Args:
        out: Folder with one JSON file per cell. A cell that was already measured with the same settings is not measured again, unless its
            engine refused the cache.
        nets: Keys of `BLOCKS`.
        engines: Keys of `RANKS`.
        frozen: Fractions of the blocks, such as "1/2"; the embeddings are frozen, too.
        batches: Full batches of each rank in an epoch, at least 1; a short one of half the size follows.
        batch: Rows of a batch, at least 2; 0: the network's own number.
        length: Tokens of a row of MiniLM.
        params: Size of the other network in millions of weights, at least 0.01.
        epochs: Number of epochs, at least 3: in the first one no row is stored yet, and the second one has the proof.

    Returns:
        The table as Markdown.

    Raises:
        ValueError: An unknown name, or a number out of range.
        RuntimeError: A cell's run failed; the message has the end of its output. Earlier results are kept.
    """
    cells = cells_of(nets, engines, frozen)
    for name, value, least in (("batches", batches, 1), ("length", length, 1), ("params", params, 0.01), ("epochs", epochs, 3)):
        if value < least:
            raise ValueError(f"--{name}: got {value}; allowed: at least {least}")
    if batch < 0 or batch == 1:
        raise ValueError(f"--batch: got {batch}; allowed: 0, or at least 2")
    settings: Settings = {"batches": batches, "batch": batch, "length": length, "params": params, "epochs": epochs}
    for cell in cells:
        _forget_refusal(out / f"{cell.name}.json")
    ranks = {cell.name: RANKS[cell.engine] for cell in cells}
    results = run_cases("smartfrz_ds.bench.cache.worker", list(ranks), out, settings, lambda name: ranks[name], unit="cell")
    text = table(results)
    (out / "cache.md").write_text(text)
    return text


def _forget_refusal(file: Path) -> None:
    """Remove the result of an engine that refused the cache: a newer version may have it."""
    try:
        if "reason" in json.loads(file.read_text()):
            file.unlink()
    except (OSError, ValueError):
        return
