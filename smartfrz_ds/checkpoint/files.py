"""The freeze state beside a checkpoint: its files, written so that they are never half there.

In the folder of a tag, next to DeepSpeed's own files:
  smartfrz.safetensors              the freeze state: JSON in the header, the history's tensors behind it; written first, read first
  smartfrz_kept_N.safetensors       optimizer state that rank N holds back for a thaw (keep_state), where there is any
  smartfrz_complete.json            every file of the folder with its size; written last, before `latest` names the tag
and in DeepSpeed's client_state, under the key "smartfrz_ds", a marker with the digest of the first. A tag counts as complete when the last
is there and every file that it lists is there with that size. Nothing here knows DeepSpeed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from smartfrz_ds.backends.deepspeed.model_files import _MODEL_STATES, read_model_states

FORMAT = 1
MARKER = "smartfrz_ds"
SIDE_FILE = "smartfrz.safetensors"
COMPLETE_FILE = "smartfrz_complete.json"


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint that was looked at and can be loaded.

    tag: its folder in load_dir.
    state: the freeze state, None where the checkpoint has none. `history` in it is filled on the rank that read the file.
    warning: why it is not the tag that `latest` names, empty where it is.
    """

    tag: str
    state: dict[str, Any] | None
    warning: str = ""


def kept_file(rank: int) -> str:
    """The file of what this rank holds back for a thaw."""
    return f"smartfrz_kept_{rank}.safetensors"


def read_kept(folder: Path, digests: Mapping[str, str], rank: int) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What `rank` had kept, as `unpack_tensors` gives it; None where it had nothing. digests: by rank, of the freeze state ("kept").

    Raises ValueError: the file is missing, or is not the one of then.
    """
    if str(rank) not in digests:
        return None
    path = folder / kept_file(rank)
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    data = path.read_bytes()
    if digest_of(data) != digests[str(rank)]:
        raise ValueError(f"{path} is damaged: its digest is not the one in {SIDE_FILE}")
    return unpack_tensors(data)


# --- files --------------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes) -> None:
    """`path` has either its old content or all of `data`, also after a crash at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    _sync_folder(path.parent)


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def pack(state: Mapping[str, Any]) -> bytes:
    """A freeze state as the bytes of a safetensors file. All but `history` must be JSON-able; floats come back exactly."""
    tensors = {f"{name}/{key}": t.contiguous() for name, item in state["history"].items() for key, t in item.items()}
    rest = {key: value for key, value in state.items() if key != "history"}
    return save(tensors, {"smartfrz": json.dumps(rest), "format": str(FORMAT)})


def unpack(data: bytes) -> dict[str, Any]:
    """The inverse of `pack`. Raises ValueError for bytes that are not one, or of a later format."""
    state, tensors = unpack_tensors(data)
    state["history"] = {}
    for name, tensor in tensors.items():
        layer, _, key = name.rpartition("/")
        state["history"].setdefault(layer, {})[key] = tensor
    return state


def pack_tensors(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """JSON and tensors as the bytes of a safetensors file."""
    return save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, {"smartfrz": json.dumps(about), "format": str(FORMAT)})


def unpack_tensors(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `pack_tensors`. Raises ValueError for bytes that are not one, or of a later format."""
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]  # the layout of a safetensors file
        version, state = int(header["format"]), json.loads(header["smartfrz"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"it is no freeze state ({error})") from error
    if version > FORMAT:
        raise ValueError(f"it has format {version}, this version of smartfrz_ds reads up to {FORMAT}")
    return state, tensors


def write_complete(folder: Path, step: int) -> None:
    """Declare this tag complete: list what is there."""
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file() and p.name != COMPLETE_FILE}
    about = {"format": FORMAT, "step": step, "time": time.time_ns(), "files": files}
    write_atomically(folder / COMPLETE_FILE, json.dumps(about, indent=1).encode())


def missing_files(folder: Path) -> list[str] | None:
    """Files that a complete tag would have and this one has not, or not whole; None where the list itself is missing or damaged."""
    about = _read_complete(folder)
    if about is None:
        return None
    return [name for name, size in about["files"].items() if not (folder / name).is_file() or (folder / name).stat().st_size != size]


def complete_tags(load_dir: Path) -> list[str]:
    """The complete tags of a folder, newest first."""
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
    # The rename itself must be on disk too. Some file systems can't sync a folder.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- finding and reading --------------------------------------------------------------------------------------------------------


def find(load_dir: str | Path, tag: str | None, *, universal: bool = False) -> Found | None:
    """Look at a checkpoint without touching anything. For one rank.

    tag: the folder; None takes the one that `latest` names, or, where that can't be, the newest complete one with a warning.
    universal: the folder was made by ds_to_universal (`latest_universal`).
    Returns None where neither a tag nor a `latest` is there: DeepSpeed then loads nothing.

    Raises:
        ValueError: it can't be loaded, and why.
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
            warning = f"{problem}; going on from {root / tag}, the newest complete checkpoint"
    elif problem := _problem(root / tag, universal):
        raise ValueError(f"{problem}; complete here: {complete_tags(root) or 'none'}")
    return Found(tag=tag, state=_read_state(root, tag, universal), warning=warning)


def _problem(folder: Path, universal: bool) -> str:
    """Why this tag can't be loaded, as far as the names and sizes of files tell; empty where it can."""
    if not any(folder.glob(_MODEL_STATES)):
        return f"{folder} is missing" if not folder.is_dir() else f"{folder} holds no checkpoint (no {_MODEL_STATES})"
    if universal or not (folder / SIDE_FILE).is_file():
        return ""  # made without this package, or a marker will say that the file is lost
    missing = missing_files(folder)
    if missing is None:
        return f"{folder} is incomplete: its save never ended ({COMPLETE_FILE} is missing or damaged)"
    return f"{folder} is incomplete: {', '.join(missing)} missing or of another size" if missing else ""


def _read_state(root: Path, tag: str, universal: bool) -> dict[str, Any] | None:
    folder = root / tag
    marker = read_model_states(folder)[0].get(MARKER)
    if marker is None:
        return None
    places = [folder / SIDE_FILE]
    if universal:
        places.append(root / str(marker["tag"]) / SIDE_FILE)  # ds_to_universal copies DeepSpeed's files only
    side = next((p for p in places if p.is_file()), None)
    if side is None:
        raise ValueError(f"{folder} was saved with layers frozen or watched, but its freeze state {SIDE_FILE} is missing: copy it there")
    data = side.read_bytes()
    if digest_of(data) != marker["digest"]:
        raise ValueError(f"{side} is damaged: its digest is {digest_of(data)[:16]}, the checkpoint's marker says {marker['digest'][:16]}")
    try:
        return unpack(data)
    except ValueError as error:
        raise ValueError(f"{side} can't be read: {error}") from error
