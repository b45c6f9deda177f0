"""The freeze state of a run without DeepSpeed, in files beside the user's own checkpoint.

However the checkpoint was written (torch.distributed.checkpoint, torch.save, a Trainer), its optimizer has only the active layers, so the
frozen set must be restored before it is loaded. Two files in the user's folder hold it, in the formats of files.py:
  smartfrz.safetensors          the freeze state, replaced atomically
  smartfrz_kept_N.safetensors   optimizer state that rank N keeps for a thaw (keep_state), if any
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

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
    saved = controller.freeze_state
    saved.check_state(state)
    kept: Any = None

    def look() -> None:
        nonlocal kept
        kept = read_kept(folder, state["kept"], ranks.rank if backend.sharded else 0)

    if state["kept"] and saved.keeps_released:
        if state["sharded"] == backend.sharded and (not backend.sharded or state["world"] == len(ranks.gather_bytes(b"0"))):
            ranks.run_on_all_ranks(look)
        elif ranks.rank == 0:
            warnings.warn(
                f"smartfrz: {folder} was saved by {state['world']} rank(s) in another way: the optimizer state that was kept for a thaw "
                "is lost, so thawed layers start with fresh moments",
                RuntimeWarning,
                stacklevel=3,
            )
    restored = saved.restore_layout_of(state)
    saved.return_to_user(restored.were_users)
    saved.resume(state, str(folder))
    if kept is not None:
        backend.load_kept_state(*kept)
    controller.last_checkpoint = str(folder)


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
