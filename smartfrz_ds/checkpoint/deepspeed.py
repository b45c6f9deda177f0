"""Checkpoints of a freezing engine: the work before and after DeepSpeed's own save and load.

Save: the old list of files is removed, the freeze state is written, DeepSpeed writes, the new list is written, `latest` is replaced. A
process that dies in between leaves an incomplete tag, and the previous tag unchanged. Load: all checks come first, before anything is
changed; then the frozen set is restored, DeepSpeed loads, and the rest of the freeze state is restored.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from smartfrz_ds.backends.deepspeed.base import DeepSpeedBackend
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.distributed.failures import Writes
from smartfrz_ds.runtime.controller import Controller
from smartfrz_ds.runtime.rules.user_frozen import Restored

from .files import (
    COMPLETE_FILE,
    MARKER,
    SIDE_FILE,
    Found,
    digest_of,
    find,
    kept_file,
    pack,
    write_atomically,
    write_complete,
)
from .tensor_file import read_kept, write_tensors


def find_together(ranks: Collectives, load_dir: str | Path, tag: str | None, *, universal: bool) -> Found | None:
    """Run `find` on rank 0 for all ranks. Collective.

    Args:
        ranks: The collectives of all ranks.
        load_dir: As in `find`.
        tag: As in `find`; the same on every rank.
        universal: As in `find`.

    Returns:
        As `find`, on every rank. `history` in the state is filled on rank 0 only.

    Raises:
        ValueError: As in `find`, on every rank.
        RanksDisagree: The ranks load different tags.
    """
    ranks.assert_same(f"load tag {tag}", "tags to load")
    found: Found | None = None

    def look() -> dict[str, Any] | None:
        nonlocal found
        found = find(load_dir, tag, universal=universal)
        if found is None:
            return None
        return {"tag": found.tag, "state": None if found.state is None else found.state | {"history": {}}, "warning": found.warning}

    answer = ranks.from_rank0(look)
    if ranks.rank == 0 and found is not None and found.warning:
        warnings.warn(f"smartfrz: {found.warning}", RuntimeWarning, stacklevel=4)
    return found if ranks.rank == 0 or answer is None else Found(**answer)


def hide_marker(client_state: Any) -> Any:
    """Return the user's client state, without the marker of this package."""
    return {k: v for k, v in client_state.items() if k != MARKER} if isinstance(client_state, dict) else client_state


class Checkpoints:
    """Saves and loads the checkpoints of one engine.

    Args:
        controller: The engine's controller.
    """

    def __init__(self, controller: Controller) -> None:
        self.controller, self.ranks = controller, controller.ranks
        self.freeze_state = controller.freeze_state
        self.backend = cast("DeepSpeedBackend", controller.backend)  # the controller of a DeepSpeed engine has no other

    # --- saving ---------------------------------------------------------------------------------------------------------------

    @contextmanager
    def saved(self, save_dir: str | Path, tag: str, *, save_latest: bool) -> Iterator[dict[str, Any]]:
        """Do the work before and after DeepSpeed's save, which is the block. Collective.

        Args:
            save_dir: As in DeepSpeedEngine.save_checkpoint.
            tag: The tag, never None.
            save_latest: Whether to replace `latest`. DeepSpeed's own save must not.

        Yields:
            The marker for client_state.

        Raises:
            OSError, RuntimeError: Some rank cannot write a file. Raised on every rank.
        """
        folder = Path(save_dir) / tag
        self.freeze_state.sync()
        digest = self._write_state(folder, tag)
        writes = Writes()
        with self.backend.saving(), writes.watched(self.backend.engine.checkpoint_engine):
            yield {"format": 1, "tag": tag, "digest": digest}
        self.ranks.run_on_all_ranks(writes.check)
        self._barrier()  # does not rely on the barrier at the end of DeepSpeed's save

        def declare() -> None:
            if self.ranks.rank == 0:
                write_complete(folder, self.controller.step)
                if save_latest:
                    write_atomically(Path(save_dir) / "latest", tag.encode())

        self.ranks.run_on_all_ranks(declare)
        self.controller.last_checkpoint = str(folder)

    def _write_state(self, folder: Path, tag: str) -> str:
        kept = self.backend.kept_state()

        def write_kept() -> str:
            if self.ranks.rank == 0:
                (folder / COMPLETE_FILE).unlink(missing_ok=True)  # a tag that is overwritten is incomplete from now on
            writes = kept is not None and (self.ranks.rank == 0 or self.backend.sharded)
            return write_tensors(folder / kept_file(self.ranks.rank), *kept) if kept is not None and writes else "-" * 64

        digests = [d.decode() for d in self.ranks.gather_bytes(self.ranks.run_on_all_ranks(write_kept).encode())]
        told = b""
        private = self.backend.state_extras()
        privates = self.ranks.gather_objects(private) if self.backend.is_pipeline else None

        def write_side() -> None:
            nonlocal told
            if self.ranks.rank == 0:
                state = self.freeze_state.state_dict() | {
                    "world": len(digests),
                    "sharded": self.backend.sharded,
                    "private": private,
                    "privates": privates,
                    "parts": self.backend.partition(),
                    "kept": {str(rank): d for rank, d in enumerate(digests) if d[0] != "-"},
                }
                side = pack(state)
                write_atomically(folder / SIDE_FILE, side)
                told = digest_of(side).encode()

        self.ranks.run_on_all_ranks(write_side)
        return self.ranks.broadcast_bytes(told).decode()

    # --- loading --------------------------------------------------------------------------------------------------------------

    @contextmanager
    def loaded(self, load_dir: str | Path, found: Found, *, universal: bool, module_only: bool, optimizer: bool) -> Iterator[None]:
        """Do the work before and after DeepSpeed's load, which is the block. Collective; at a step boundary if the frozen set changes.

        Args:
            load_dir: As in DeepSpeedEngine.load_checkpoint.
            found: The checkpoint.
            universal: Whether it is a universal checkpoint.
            module_only: Whether only weights are loaded.
            optimizer: Whether optimizer states are loaded.

        Raises:
            ValueError: The freeze state does not match this model or run. Nothing was changed, except the stages of a pipeline's layers.
            RuntimeError: Not at a step boundary. Nothing was changed.
        """
        state, before, folder = found.state, self.controller.frozen, Path(load_dir) / found.tag
        moments = optimizer and not module_only
        if state is not None:
            self.freeze_state.check_state(state)
            if moments and self.backend.is_pipeline and not universal:
                self._check_width(state, folder)
            needs_same = state["sharded"] and not universal and (moments or self.backend.weights_are_cut)
            if needs_same and state["world"] != len(self.ranks.gather_bytes(b"0")):
                raise ValueError(
                    f"{folder} was saved by {state['world']} ranks. For another number of ranks, convert it with ds_to_universal "
                    "--inject_missing_state and set checkpoint.load_universal to true"
                )
            if universal and self.backend.is_pipeline:
                raise ValueError(
                    f"{folder}: a pipeline cannot load a universal checkpoint with a freeze state; allowed: the same ranks and stages"
                )
        kept = self._read_kept(folder, state) if state is not None and moments and not universal else None
        frozen = set(state["frozen"]) if state is not None else set()
        if universal and (emptied := self.backend.emptied_groups(self.freeze_state.leaving(frozen))):
            raise ValueError(f"{folder}: a universal checkpoint cannot be loaded if whole parameter groups ({emptied}) are frozen")
        if moments and self.backend.is_pipeline and not universal:
            self.freeze_state.restore_bounds(None if state is None else state.get("parts"))
            if state is not None:
                self.ranks.run_on_all_ranks(lambda: self.backend.check_groups(state["privates"][self.ranks.rank]))
        restored = Restored()
        if state is None:
            self.freeze_state.restore_layout(frozen)
        else:
            by_position = moments and not universal and not self.backend.is_pipeline
            restored = self.freeze_state.restore_layout_of(state, by_position=by_position)
            if not module_only:  # before the load: without ZeRO, the optimizer may hold parameters that the user froze
                self.freeze_state.return_to_user(restored.were_users)
        with self.backend.loading():
            yield
            if universal:
                self.backend.load_frozen_weights(folder)
        if module_only:
            # Only weights were requested: the state of the run does not change.
            own = {*before, *restored.adopted}
            if own != set(self.controller.frozen):
                self.freeze_state.restore_layout(own)
            self.freeze_state.return_to_user(restored.adopted)
            self.freeze_state.weights_loaded(str(folder))
            return
        if state is None:
            self.freeze_state.reset(_applied_steps(self.backend.engine), str(folder))
        else:
            self.freeze_state.resume(state, str(folder))
        if moments:
            self.backend.forget([p for group in self.backend.groups for p in group])  # belongs to the run before the load
            private = {} if state is None else state["privates"][self.ranks.rank] if self.backend.is_pipeline else state["private"]
            self.backend.load_state_extras(private, universal=universal)
        if kept is not None:
            self.backend.load_kept_state(*kept)
        self.controller.last_checkpoint = str(folder)

    def _check_width(self, state: Mapping[str, Any], folder: Path) -> None:
        """Check that a pipeline with the same numbers of stages and replicas saved this. Collective.

        Raises:
            ValueError: The numbers differ.
        """
        parts, world = self.backend.partition() or [], len(self.ranks.gather_bytes(b"0"))
        theirs = state.get("parts") or parts
        stages, replicas = len(parts) - 1, world // (len(parts) - 1)
        if (len(theirs), state["world"]) != (len(parts), world):
            old = f"{len(theirs) - 1} x {state['world'] // (len(theirs) - 1)}"
            raise ValueError(
                f"{folder} was saved by a pipeline of {old} (stages x replicas), this one has {stages} x {replicas}: convert it with "
                f"`smartfrz reshape {folder.parent} --tag {folder.name} --pp {stages} --dp {replicas}`"
            )

    def _read_kept(self, folder: Path, state: Mapping[str, Any]) -> Any:
        """Read and check this rank's file of kept state. Collective.

        Returns:
            As `read_kept`; None where there is no file, or `keep_state` is 0.
        """
        if not state["kept"] or not self.freeze_state.keeps_released:
            return None
        rank = self.ranks.rank if state["sharded"] else 0
        read: Any = None

        def look() -> None:
            nonlocal read
            read = read_kept(folder, state["kept"], rank)

        self.ranks.run_on_all_ranks(look)
        return read

    def _barrier(self) -> None:
        if not self.ranks.alone:
            dist.barrier()


def _applied_steps(engine: Any) -> int:
    return int(engine.global_steps) - int(engine.skipped_steps)  # runtime/engine.py; global_steps counts skipped ones too
