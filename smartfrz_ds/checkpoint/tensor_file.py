"""Files of JSON and tensors in the safetensors format, streamed: no tensor is ever in host memory twice.

    8 bytes, little-endian: the length of the header
    the header, JSON: `__metadata__` with the keys "smartfrz" (JSON again) and "format", and for each tensor its dtype, shape and offsets
    the tensors' bytes, one after the other, without gaps

The digest of a file is the SHA-256 of all its bytes. It is computed while they are written or read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import FORMAT, atomic_file, kept_file

#: Bytes that copies of parts of tensors take at most: of those that are on a device, or not contiguous.
BUFFER_BYTES = 16 * 2**20

# The names of the format (https://github.com/huggingface/safetensors).
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8  # of the first tensor; wider dtypes come first, so that each tensor is aligned to its own elements


def write_tensors(path: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Write JSON and tensors, atomically: `path` has its old content or all of the new one, also after a crash at any moment.

    Args:
        path: The file; its folder is created where it is missing.
        about: JSON-able.
        tensors: On any device, of any layout in memory; two of them may share one storage.

    Returns:
        The digest of the file.

    Raises:
        ValueError: A dtype for which the format has no name.
        OSError: The file can't be written.
    """
    entries: dict[str, Any] = {"__metadata__": {"smartfrz": json.dumps(about), "format": str(FORMAT)}}
    ordered = sorted(tensors, key=lambda name: -tensors[name].element_size())
    end = 0
    for name in ordered:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{path}: {name} has dtype {tensor.dtype}; allowed: {', '.join(map(str, _NAMES))}")
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    digest = hashlib.sha256()
    with atomic_file(path) as file:
        for part in _parts(header, [tensors[name] for name in ordered]):
            file.write(part)
            digest.update(part)
    return digest.hexdigest()


def read_tensors(path: Path, digest: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_tensors`, or safetensors' own `save` with the same metadata, has written: straight into new tensors.

    Args:
        path: The file.
        digest: As `write_tensors` returned it.

    Returns:
        The JSON and the tensors, on the host.

    Raises:
        ValueError: The file is missing, damaged, or of a later format.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    damaged = f"{path} is damaged: its digest is not the one in the freeze state"
    found, tensors = hashlib.sha256(), {}
    with path.open("rb") as file:
        try:
            about, entries, version = _read_header(file, path.stat().st_size, found)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(damaged) from error
        if version > FORMAT:
            raise ValueError(f"{path} has format {version}, this version of smartfrz_ds reads up to {FORMAT}")
        for name, dtype, shape in entries:
            tensors[name] = torch.empty(shape, dtype=dtype)
            for part in _bytes_of(tensors[name]):
                _fill(file, part, damaged)
                found.update(part)
    if found.hexdigest() != digest:
        raise ValueError(damaged)
    return about, tensors


def read_kept(folder: Path, digests: Mapping[str, str], rank: int) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Read the state that a rank keeps for a thaw.

    Args:
        folder: The checkpoint's.
        digests: By rank, of the freeze state ("kept").
        rank: The rank that wrote it.

    Returns:
        As `read_tensors`; None where the rank had nothing.

    Raises:
        ValueError: The file is missing, or is not the one that was saved.
    """
    return read_tensors(folder / kept_file(rank), digests[str(rank)]) if str(rank) in digests else None


def file_digest(path: Path) -> str:
    """Return the digest of a file, read in small pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _read_header(file: BufferedReader, size: int, found: Any) -> tuple[dict[str, Any], list[tuple[str, torch.dtype, list[int]]], int]:
    """Read the header.

    Returns:
        The JSON data, name, dtype and shape of each tensor in the order of the file, and the format.

    Raises:
        ValueError: It does not describe a file of this size.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise ValueError("the header is longer than the file")
    header = file.read(length)
    found.update(start)
    found.update(header)
    listed = json.loads(header)
    metadata = listed.pop("__metadata__")
    entries, end = [], 0
    for name, entry in sorted(listed.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        begin, behind = entry["data_offsets"]
        if begin != end or behind - begin != prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
            raise ValueError(f"{name} does not lie where its shape says")
        entries.append((name, dtype, shape))
        end = behind
    if end != size - 8 - length:
        raise ValueError("the tensors do not fill the file")
    return json.loads(metadata["smartfrz"]), entries, int(metadata["format"])


def _parts(header: bytes, tensors: list[Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for tensor in tensors:
        yield from _bytes_of(tensor.detach())


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in the order of its elements: views of its memory if it has that order, else of small copies."""
    limit = BUFFER_BYTES // 2  # the caller still holds the last part while the next one is made
    if tensor.is_contiguous():
        flat = tensor.view(-1).view(torch.uint8)
        for begin in range(0, flat.numel(), limit):
            yield flat[begin : begin + limit].cpu().numpy().data
    elif tensor.nbytes <= limit:
        yield from _bytes_of(tensor.contiguous())
    else:  # along the first dimension; it has one, or it would be contiguous
        rows = max(1, limit * len(tensor) // tensor.nbytes)
        for begin in range(0, len(tensor), rows):
            yield from _bytes_of(tensor[begin : begin + rows] if rows > 1 else tensor[begin])


def _fill(file: BufferedReader, part: memoryview, damaged: str) -> None:
    filled = 0
    while filled < len(part):
        count = file.readinto(part[filled:])
        if not count:
            raise ValueError(damaged)  # it has become shorter
        filled += count
