"""The files of the freeze state beside a checkpoint. Each is written atomically.

In the folder of a tag, next to DeepSpeed's own files:
  smartfrz.safetensors              the freeze state: JSON in the header, then the history's tensors; written first, read first
  smartfrz_kept_N.safetensors       optimizer state that rank N keeps for a thaw (keep_state), if any
  smartfrz_complete.json            every file of the folder with its size; written last, before `latest` names the tag
DeepSpeed's client_state has, under the key "smartfrz_ds", a marker with the digest of the first file. A tag is complete if the last file
exists and every file that it lists exists with that size. This module does not depend on DeepSpeed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from smartfrz_ds.backends.deepspeed.model_files import _MODEL_STATES, read_client_state

FORMAT = 1
MARKER = "smartfrz_ds"
SIDE_FILE = "smartfrz.safetensors"
COMPLETE_FILE = "smartfrz_complete.json"


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint that was examined and can be loaded.

    Attributes:
        tag: Its folder in load_dir.
        state: The freeze state, None where the checkpoint has none. Its `history` is filled only on the rank that read the file.
        warning: Why it is not the tag that `latest` names; "" if it is.
    """

    tag: str
    state: dict[str, Any] | None
    warning: str = ""


def kept_file(rank: int) -> str:
    """Return the name of the file with the optimizer state that a rank keeps for a thaw."""
    return f"smartfrz_kept_{rank}.safetensors"


# --- files --------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that, after a crash at any moment, has either its old content or all that was written.

    Args:
        path: The file. Missing folders are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file as `atomic_file` does.

    Args:
        path: The file. Missing folders are created.
        data: Its content.
    """
    with atomic_file(path) as file:
        file.write(data)


def digest_of(data: bytes) -> str:
    """Return the SHA-256 digest, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def pack(state: Mapping[str, Any]) -> bytes:
    """Serialize a freeze state as a safetensors file.

    Args:
        state: `history` maps layers to tensors by name; everything else is JSON-serializable. Floats are restored exactly.
    """
    tensors = {f"{name}/{key}": t.contiguous() for name, item in state["history"].items() for key, t in item.items()}
    rest = {key: value for key, value in state.items() if key != "history"}
    return save(tensors, {"smartfrz": json.dumps(rest), "format": str(FORMAT)})


def unpack(data: bytes) -> dict[str, Any]:
    """Restore a freeze state.

    Args:
        data: The output of `pack`.

    Returns:
        The state: `history` maps layers to tensors by name.

    Raises:
        ValueError: The bytes are not a freeze state, or have a later format.
    """
    state, tensors = unpack_tensors(data)
    state["history"] = {}
    for name, tensor in tensors.items():
        layer, _, key = name.rpartition("/")
        state["history"].setdefault(layer, {})[key] = tensor
    return state


def unpack_tensors(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore JSON data and tensors from a safetensors file.

    Args:
        data: The content of the file.

    Returns:
        The JSON data of the metadata, and the tensors by name.

    Raises:
        ValueError: The bytes are not such a file, or have a later format.
    """
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]  # the header of a safetensors file
        version, state = int(header["format"]), json.loads(header["smartfrz"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"it is not a freeze state ({error})") from error
    if version > FORMAT:
        raise ValueError(f"it has format {version}, this version of smartfrz_ds reads up to {FORMAT}")
    return state, tensors


def write_complete(folder: Path, step: int) -> None:
    """Declare a tag complete by listing its files with their sizes.

    Args:
        folder: The tag's folder.
        step: Successful optimizer steps at the save.
    """
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file() and p.name != COMPLETE_FILE}
    about = {"format": FORMAT, "step": step, "time": time.time_ns(), "files": files}
    write_atomically(folder / COMPLETE_FILE, json.dumps(about, indent=1).encode())


def missing_files(folder: Path) -> list[str] | None:
    """Return the listed files that are missing or of another size; None where the list itself is missing or damaged."""
    about = _read_complete(folder)
    if about is None:
        return None
    return [name for name, size in about["files"].items() if not (folder / name).is_file() or (folder / name).stat().st_size != size]


def complete_tags(load_dir: Path) -> list[str]:
    """Return the complete tags of a folder, newest first."""
    found = []
    for listed in load_dir.glob(f"*/{COMPLETE_FILE}"):
        about = _read_complete(listed.parent)
        if about is not None and not missing_files(listed.parent):
            found.append((about["time"], listed.parent.name))
    return [tag for _, tag in sorted(found, reverse=True)]


def _read_complete(folder: Path) -> dict[str, Any] | None:
    try:
        about = json.loads((folder / COMPLETE_FILE).read_bytes())
        return about if isinstance(about["files"], dict) and isinstance(about["time"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sync_folder(folder: Path) -> None:
    # The rename itself must be on disk too. Some file systems cannot sync a folder.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- finding and reading --------------------------------------------------------------------------------------------------------


def find(load_dir: str | Path, tag: str | None, *, universal: bool = False) -> Found | None:
    """Examine a checkpoint, read-only. For one rank.

    Args:
        load_dir: As in load_checkpoint.
        tag: The tag; None: the one that `latest` names or, if that cannot be loaded, the newest complete one, with a warning.
        universal: Whether ds_to_universal created the folder (`latest_universal`).

    Returns:
        The checkpoint; None where there is neither a tag nor `latest`: DeepSpeed then loads nothing.

    Raises:
        ValueError: It cannot be loaded; with the reason.
    """
    root, warning = Path(load_dir), ""
    if tag is None:
        latest = root / ("latest_universal" if universal else "latest")
        if not latest.is_file():
            return None
        tag = latest.read_text(errors="replace").strip("\0 \n\r\t")
        problem = f"{latest} is empty" if not tag else _problem(root / tag, universal)
        if problem:
            others = [] if universal else complete_tags(root)
            if not others:
                raise ValueError(f"nothing to resume from: {problem}, and no other tag of {root} is complete")
            tag = others[0]
            warning = f"{problem}; loading instead {root / tag}, the newest complete checkpoint"
    elif problem := _problem(root / tag, universal):
        raise ValueError(f"{problem}; complete here: {complete_tags(root) or 'none'}")
    return Found(tag=tag, state=_read_state(root, tag, universal), warning=warning)


def _problem(folder: Path, universal: bool) -> str:
    """Return why this tag cannot be loaded, judged by the names and sizes of its files; "" if it can."""
    if not any(folder.glob(_MODEL_STATES)):
        return f"{folder} is missing" if not folder.is_dir() else f"{folder} holds no checkpoint (no {_MODEL_STATES})"
    if universal or not (folder / SIDE_FILE).is_file():
        return ""  # saved without this package, or the marker will show that the file is lost
    missing = missing_files(folder)
    if missing is None:
        return f"{folder} is incomplete: its save did not finish ({COMPLETE_FILE} is missing or damaged)"
    return f"{folder} is incomplete: {', '.join(missing)} missing or of another size" if missing else ""


def _read_state(root: Path, tag: str, universal: bool) -> dict[str, Any] | None:
    folder = root / tag
    marker = read_client_state(folder).get(MARKER)
    if marker is None:
        return None
    places = [folder / SIDE_FILE]
    if universal:
        places.append(root / str(marker["tag"]) / SIDE_FILE)  # ds_to_universal copies only DeepSpeed's files
    side = next((p for p in places if p.is_file()), None)
    if side is None:
        raise ValueError(f"{folder} was saved by a freezing run, but its freeze state {SIDE_FILE} is missing: copy it there")
    data = side.read_bytes()
    if digest_of(data) != marker["digest"]:
        raise ValueError(f"{side} is damaged: its digest is {digest_of(data)[:16]}, the checkpoint's marker says {marker['digest'][:16]}")
    try:
        return unpack(data)
    except ValueError as error:
        raise ValueError(f"{side} can't be read: {error}") from error
