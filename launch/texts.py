"""Text to pre-train on: a folder's files or Python's documentation, cut into what is trained on and what is held out, as tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BYTES = 256  # the vocabulary of a byte tokeniser
HELD_OUT = 0.1  # of each document, its end


@dataclass(frozen=True, kw_only=True)
class Texts:
    """train, held_out: one text a document, in a fixed order. skipped: files that are no UTF-8 text."""

    train: list[str]
    held_out: list[str]
    skipped: int = 0

    @property
    def digest(self) -> str:
        """The same for the same texts: a run must not go on with others."""
        whole = hashlib.sha256()
        for text in (*self.train, *self.held_out):
            whole.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        return whole.hexdigest()[:16]


def read_folder(folder: Path) -> Texts:
    """All text files below a folder (hidden ones not), sorted by path; what isn't UTF-8 is skipped.

    Raises ValueError where there is no folder, or no text in it.
    """
    if not folder.is_dir():
        raise ValueError(f"--data {folder}: no such folder")
    documents, skipped = [], 0
    for path in sorted(
        p for p in folder.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    ):
        data = path.read_bytes()
        try:
            if b"\0" in data:
                raise ValueError
            text = data.decode("utf-8-sig")
        except ValueError:  # UnicodeDecodeError is one
            skipped += 1
            continue
        if text.strip():
            documents.append(text)
    if not documents:
        raise ValueError(f"--data {folder}: no text file in it ({skipped} other files)")
    return split(documents, skipped)


def python_docs() -> Texts:
    """The parts of Python's documentation that come with Python (`help("topics")`), about half a megabyte."""
    from pydoc_data.topics import topics

    return split([topics[name] for name in sorted(topics)])


def split(documents: Sequence[str], skipped: int = 0) -> Texts:
    """The last tenth of each document is held out."""
    cuts = [round(len(text) * (1 - HELD_OUT)) for text in documents]
    return Texts(
        train=[text[:cut] for text, cut in zip(documents, cuts, strict=True)],
        held_out=[text[cut:] for text, cut in zip(documents, cuts, strict=True)],
        skipped=skipped,
    )


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
    """What turns text into tokens, and how many different ones there are."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: tokenizer.encode(text).ids, tokenizer.get_vocab_size()


def as_tokens(texts: Sequence[str], encode: Callable[[str], list[int]]) -> Tensor:
    """(n,) int32: all texts, one after the other, two newlines between them."""
    return torch.tensor([token for text in texts for token in encode(text + "\n\n")], dtype=torch.int32)


def windows(tokens: Tensor, *, rows: int, length: int, draw: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A micro-batch: (rows, length) int64 tokens, and those that follow each. The same for the same `draw` (integers >= 0)."""
    seed = int.from_bytes(hashlib.sha256(repr(tuple(draw)).encode()).digest()[:8], "big") >> 1
    starts = torch.randint(len(tokens) - length, (rows,), generator=torch.Generator().manual_seed(seed))
    cut = tokens[starts[:, None] + torch.arange(length + 1)].long()
    return cut[:, :-1].contiguous(), cut[:, 1:].contiguous()
