"""The freeze state of a run without DeepSpeed, in files beside the user's own checkpoint.

However the checkpoint was written (torch.distributed.checkpoint, torch.save, a Trainer), its optimizer has only the active layers, so the
frozen set must be restored before it is loaded. Two files in the user's folder hold it, in the formats of files.py:
  smartfrz.safetensors          the freeze state, replaced atomically
  smartfrz_kept_N.safetensors   optimizer state that rank N keeps for a thaw (keep_state), if any
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from smartfrz_ds.backends.torch.base import TorchBackend
from smartfrz_ds.runtime.controller import Controller

from .files import SIDE_FILE, kept_file, pack, unpack, write_atomically
from .tensor_file import read_kept, write_tensors


def save_beside(controller: Controller, backend: TorchBackend, folder: str | Path) -> None:
    """Write the freeze state into a folder. Collective, between steps.

    Args:
        controller: The run's controller.
        backend: Its backend.
        folder: The checkpoint's folder, created if missing.

    Raises:
        OSError, RuntimeError: Some rank cannot write a file. Raised on every rank.
    """
    folder, ranks = Path(folder), controller.ranks
    controller.freeze_state.sync()
    kept = backend.kept_state()

    def write_kept() -> str:
        writes = kept is not None and (ranks.rank == 0 or backend.sharded)
        return write_tensors(folder / kept_file(ranks.rank), *kept) if kept is not None and writes else "-" * 64

    digests = [d.decode() for d in ranks.gather_bytes(ranks.run_on_all_ranks(write_kept).encode())]

    def write_side() -> None:
        if ranks.rank == 0:
            about = {"world": len(digests), "sharded": backend.sharded, "kept": {str(r): d for r, d in enumerate(digests) if d[0] != "-"}}
            write_atomically(folder / SIDE_FILE, pack(controller.state_dict() | about))

    ranks.run_on_all_ranks(write_side)


def restore_from(controller: Controller, backend: TorchBackend, folder: str | Path) -> None:
    """Restore the frozen set and the freeze state that `save_beside` wrote. Collective, at a step boundary.

    Args:
        controller: The run's controller.
        backend: Its backend.
        folder: The checkpoint's folder.

    Raises:
        ValueError: The freeze state is missing, damaged or of another model. Nothing was changed.
    """
    folder, ranks = Path(folder), controller.ranks
    whole: dict[str, Any] = {}

    def read() -> dict[str, Any]:
        nonlocal whole
        whole = _read(folder)
        return whole | {"history": {}}

    told = ranks.from_rank0(read)
    state = whole if ranks.rank == 0 else told
    _restore(controller, backend, state, str(folder), lambda: read_kept(folder, state["kept"], ranks.rank if backend.sharded else 0))
    controller.last_checkpoint = str(folder)


def state_object(controller: Controller, backend: TorchBackend) -> dict[str, Any]:
    """Return the freeze state as one object, for a checkpoint that is a single object too. Collective, between steps.

    Args:
        controller: The run's controller.
        backend: Its backend.

    Returns:
        On rank 0, the whole state; `torch.load(..., weights_only=True)` accepts it. `kept` has an entry for each rank of a sharded run,
        gathered on every rank.
    """
    ranks = controller.ranks
    controller.freeze_state.sync()
    mine = backend.kept_state()
    kept = ranks.gather_objects(mine) if backend.sharded else [mine]
    about = {
        "world": len(ranks.gather_bytes(b"0")),
        "sharded": backend.sharded,
        "kept": {str(r): "" for r, x in enumerate(kept) if x is not None},
    }
    packed = ranks.run_on_all_ranks(lambda: pack(controller.state_dict() | about))  # a policy's state can fail to be saved
    return {"state": torch.frombuffer(bytearray(packed), dtype=torch.uint8), "kept": kept}


def restore_object(controller: Controller, backend: TorchBackend, saved: Mapping[str, Any], source: str) -> None:
    """Restore what `state_object` returned. Collective, at a step boundary.

    Args:
        controller: The run's controller.
        backend: Its backend.
        saved: The object, whole on every rank.
        source: Path of the checkpoint, for messages and the record.

    Raises:
        ValueError: The freeze state is damaged or of another model. Nothing was changed.
    """
    ranks = controller.ranks

    def read() -> dict[str, Any]:
        try:
            return unpack(saved["state"].numpy().tobytes())
        except ValueError as error:
            raise ValueError(f"the freeze state in {source} can't be read: {error}") from error

    state = ranks.run_on_all_ranks(read)
    if ranks.rank:
        state["history"] = {}
    _restore(controller, backend, state, source, lambda: saved["kept"][ranks.rank if backend.sharded else 0])
    controller.last_checkpoint = source


def _restore(controller: Controller, backend: TorchBackend, state: dict[str, Any], source: str, read: Callable[[], Any]) -> None:
    """Restore the frozen set and a freeze state that was read.

    Args:
        controller: The run's controller.
        backend: Its backend.
        state: The state; `history` on rank 0 only.
        source: Folder or path of the checkpoint.
        read: Returns the state that this rank has kept for a thaw.
    """
    ranks, saved = controller.ranks, controller.freeze_state
    saved.check_state(state)
    kept: Any = None

    def look() -> None:
        nonlocal kept
        kept = read()

    if state["kept"] and saved.keeps_released:
        if state["sharded"] == backend.sharded and (not backend.sharded or state["world"] == len(ranks.gather_bytes(b"0"))):
            ranks.run_on_all_ranks(look)
        elif ranks.rank == 0:
            warnings.warn(
                f"smartfrz: {source} was saved by {state['world']} rank(s) in another way: the optimizer state that was kept for a thaw "
                "is lost, so thawed layers start with fresh moments",
                RuntimeWarning,
                stacklevel=4,
            )
    restored = saved.restore_layout_of(state)
    saved.return_to_user(restored.were_users)
    saved.resume(state, source)
    if kept is not None:
        backend.load_kept_state(*kept)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / SIDE_FILE
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: controller.save({str(folder)!r}) writes it, beside the checkpoint of the same step. If the run was "
            "killed during a save, resume from the previous checkpoint"
        )
    try:
        return unpack(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}") from error
