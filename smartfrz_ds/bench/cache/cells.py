"""The cells of `smartfrz bench cache`: a network, an engine and a frozen part each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

COPIES = ("full", "frozen", "cached")
BLOCKS = {"minilm": 6, "mlp": 8}  # equal blocks of each network, between embeddings and head
BATCH = {"minilm": 8, "mlp": 32}  # rows of a batch of each rank
RANKS = {"one": 1, "ddp": 2, "z1": 2, "z2": 2, "z3": 2, "fsdp2": 2}
ENGINE_NAMES = {"one": "one process", "ddp": "DDP", "z1": "ZeRO-1", "z2": "ZeRO-2", "z3": "ZeRO-3", "fsdp2": "FSDP2"}
FROZEN = ("1/2", "3/4", "5/6")


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        net: A key of `BLOCKS`.
        engine: A key of `RANKS`.
        blocks: Number of frozen blocks; the embeddings in front of them are frozen, too.
    """

    net: str
    engine: str
    blocks: int

    @property
    def name(self) -> str:
        """Name of its result: net-engine-blocks."""
        return f"{self.net}-{self.engine}-{self.blocks}"

    @classmethod
    def of(cls, name: str) -> Cell:
        """Return the cell of this name."""
        net, engine, blocks = name.split("-")
        return cls(net, engine, int(blocks))


def cells_of(nets: Sequence[str], engines: Sequence[str], frozen: Sequence[str]) -> list[Cell]:
    """Return the cells of these networks, engines and fractions of the blocks.

    A fraction is rounded to whole blocks, and a half to the even number: 3/4 of 6 blocks are 4.

    Raises:
        ValueError: An unknown name, or a fraction that leaves no block frozen or active.
    """
    for option, names, known in (("--net", nets, BLOCKS), ("--engine", engines, RANKS)):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{option}: got {unknown[0]!r}; allowed: {', '.join(known)}")
    cells: dict[Cell, None] = {}
    for net in nets:
        for engine in engines:
            for text in frozen:
                cells[Cell(net, engine, _blocks(text, BLOCKS[net]))] = None
    return list(cells)


def _blocks(text: str, of: int) -> int:
    try:
        count = round(Fraction(text) * of)
    except (ValueError, ZeroDivisionError):
        count = 0
    if not 1 <= count < of:
        raise ValueError(f"--frozen: got {text!r}; allowed: a fraction such as 1/2 that leaves blocks frozen and active, of {of}")
    return count
