"""Converts a pipeline's checkpoint to another number of stages and replicas. Offline: one process, no engine, no process group.

The weights are in one file per entry of the list of layers, independent of the stages (layer_XX): these are copied. The files that
DeepSpeed writes per stage and replica (mp_rank_XX, zero_pp_rank_D_mp_rank_XX) and the freeze state are rebuilt one at a time, from files
that are mapped into memory. Everything is written to a hidden folder, which is renamed to the tag when it is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import OPTIMIZER_STATE_DICT
from tqdm import tqdm

from smartfrz_ds.backends.deepspeed.compat import check_version
from smartfrz_ds.planner.costs import LayerCost
from smartfrz_ds.planner.cut import best_cut
from smartfrz_ds.planner.simulate import are_bounds

from .files import MARKER, SIDE_FILE, digest_of, kept_file, pack, write_atomically, write_complete
from .reshape_source import PipelineCheckpoint
from .reshape_states import FlatTarget, entry_of, kept_states, new_stages, whole_states
from .tensor_file import write_tensors


@dataclass(frozen=True, kw_only=True)
class Reshaped:
    """A converted checkpoint.

    Attributes:
        folder: Its folder.
        parts: Bounds of the stages in the list of layers.
        replicas: Number of replicas.
        old_parts: Bounds of the stages in the original.
        old_replicas: Number of replicas in the original.
        micro_batches: gradient_accumulation_steps of the run that saved the original, None where unknown.
        kept: Whether it includes optimizer state that is kept for a thaw.
    """

    folder: Path
    parts: tuple[int, ...]
    replicas: int
    old_parts: tuple[int, ...]
    old_replicas: int
    micro_batches: int | None
    kept: bool

    def text(self) -> str:
        """Return the lines that the command prints."""
        stages = len(self.parts) - 1
        lines = [
            f"{self.folder}: {stages} x {self.replicas} (stages x replicas), bounds {_shown(self.parts)}; it was "
            f"{len(self.old_parts) - 1} x {self.old_replicas}, bounds {_shown(self.old_parts)}",
            f"Resume from it on {stages * self.replicas} ranks with num_stages={stages} and load_checkpoint({str(self.folder.parent)!r}).",
        ]
        if self.micro_batches is not None and self.replicas != self.old_replicas:
            sequences = self.micro_batches * self.old_replicas
            if sequences % self.replicas == 0:
                lines.append(f"gradient_accumulation_steps {self.micro_batches} -> {sequences // self.replicas} keeps the global batch.")
            else:
                lines.append(
                    f"No whole gradient_accumulation_steps keeps the global batch ({sequences} micro-batches, {self.replicas} replicas): "
                    "change train_micro_batch_size_per_gpu too."
                )
        if self.kept:
            lines.append("Optimizer state that is kept for a thaw (keep_state) is included.")
        return "\n".join(lines)


def reshape(
    load_dir: str | Path,
    stages: int,
    replicas: int,
    *,
    output: str | Path | None = None,
    tag: str | None = None,
    bounds: Sequence[int] | None = None,
    trust: bool = False,
    progress: bool = False,
) -> Reshaped:
    """Write a pipeline's checkpoint for other numbers of stages and replicas. The original is only read.

    Args:
        load_dir: As in load_checkpoint.
        stages: Number of stages, from 1 to the number of entries in the list of layers.
        replicas: Number of replicas, >= 1.
        output: The new load_dir, which must not have this tag yet. Default: LOAD_DIR-ppP-dpD.
        tag: The tag; None: the one that `latest` names.
        bounds: The stages' bounds: `stages` + 1 increasing integers from 0 to the number of entries. None: balanced by weights, where a
            frozen weight counts as a third.
        trust: Whether to unpickle objects other than tensors and DeepSpeed's own types. This runs any code that the files name.
        progress: Whether to show a progress bar.

    Returns:
        The new checkpoint.

    Raises:
        ValueError: The conversion is not possible; with what is allowed. Nothing was written.
        OSError: A file cannot be written. The new tag does not exist.
    """
    check_version()
    source = PipelineCheckpoint(Path(load_dir), tag, trust)
    for name, value, most in (("stages (--pp)", stages, source.entries), ("replicas (--dp)", replicas, None)):
        if value < 1 or (most is not None and value > most):
            span = f"an integer from 1 to {most}, the number of entries in the list of layers" if most is not None else "an integer >= 1"
            raise ValueError(f"{name}: got {value!r}; allowed: {span}")
    parts = _bounds(source, stages, replicas, bounds)
    out = Path(output) if output is not None else source.root.with_name(f"{source.root.name}-pp{stages}-dp{replicas}")
    if out.resolve() == source.root.resolve() or (out / source.tag).exists():
        raise ValueError(f"output (--output): got {out}, which already has {source.tag}; allowed: a folder without it")
    target = _Target(source, parts, replicas)
    scratch = out / f".reshaping-{source.tag}"
    if scratch.exists():
        shutil.rmtree(scratch)  # an earlier attempt that was killed
    scratch.mkdir(parents=True)
    try:
        jobs = list(target.files())
        for name, write in tqdm(jobs, desc="reshape", unit="file", disable=not progress):
            write(scratch / name)
            _sync(scratch / name)
        write_complete(scratch, int(source.state["step"]))
        # If the process dies between these two, `latest` names a missing tag: a load refuses it, and another attempt succeeds.
        write_atomically(out / "latest", source.tag.encode())
        scratch.rename(out / source.tag)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return Reshaped(
        folder=out / source.tag,
        parts=tuple(parts),
        replicas=replicas,
        old_parts=tuple(source.parts),
        old_replicas=source.replicas,
        micro_batches=source.micro_batches,
        kept=bool(source.state["kept"]),
    )


class _Target:
    """The files of the new checkpoint."""

    def __init__(self, source: PipelineCheckpoint, parts: Sequence[int], replicas: int) -> None:
        self.source, self.parts, self.replicas = source, list(parts), replicas
        self.stages = new_stages(source.stages, parts)
        self.from_ = [source.overlapping(a, b) for a, b in pairwise(parts)]
        self.flat: list[FlatTarget] = []
        if source.is_flat:
            self.flat = [
                FlatTarget([source.flat(s) for s in old], new, replicas, source.params)
                for old, new in zip(self.from_, self.stages, strict=True)
            ]
        self._digests: dict[str, str] = {}
        self._side = b""

    def files(self) -> Iterator[tuple[str, Callable[[Path], None]]]:
        """Yield name and writer of each file; the freeze state needs the kept files' digests, the model files need the freeze state's."""
        for path in self.source.layers.values():
            yield path.name, partial(shutil.copyfile, path)
        if self.source.state["kept"]:
            for rank in range(len(self.stages) * self.replicas):
                yield kept_file(rank), partial(self._write_kept, *divmod(rank, self.replicas))
        yield SIDE_FILE, self._write_side
        for stage in range(len(self.stages)):
            yield f"mp_rank_{stage:02d}_model_states.pt", partial(self._write_model, stage)
            if self.source.is_flat:
                for replica in range(self.replicas):
                    yield self.source.zero_name(stage, replica), partial(self._write_zero, stage, replica)

    def _write_kept(self, stage: int, replica: int, path: Path) -> None:
        first, end = self.parts[stage], self.parts[stage + 1]
        sources = [self.source.kept(s) for s in self.from_[stage]]
        found = kept_states(sources, lambda name: first <= entry_of(name) < end, self.replicas, replica)
        if found is not None:
            self._digests[str(stage * self.replicas + replica)] = write_tensors(path, *found)

    def _write_side(self, path: Path) -> None:
        source = self.source
        privates = [self._private(stage, replica) for stage in range(len(self.stages)) for replica in range(self.replicas)]
        self._side = pack(
            source.state
            | {
                "world": len(privates),
                "private": privates[0],
                "privates": privates,
                "parts": self.parts,
                "kept": self._digests,
                "reshaped_from": {"parts": source.parts, "world": source.state["world"]},
            }
        )
        write_atomically(path, self._side)

    def _private(self, stage: int, replica: int) -> dict[str, Any]:
        """Return the value of DeepSpeedBackend.state_extras on this rank of the new run."""
        old, new = [self.source.privates[s] for s in self.from_[stage]], self.stages[stage]
        mine = old[0] | {"place": [stage, replica], "groups": new.groups, "frozen": sorted(new.frozen, key=lambda n: (entry_of(n), n))}
        if self.source.is_flat:
            return mine | {"steps": new.steps}
        return mine | {"levelled": any(p["levelled"] for p in old)}

    def _write_model(self, stage: int, path: Path) -> None:
        source, old = self.source, self.from_[stage]
        first, end = self.parts[stage], self.parts[stage + 1]
        model = dict(source.models[old[0]])
        if source.is_flat:
            model["param_shapes"] = self.flat[stage].param_shapes(source.shapes)
        else:
            parts = [(source.stages[s], source.models[s]["optimizer"], source.shared_count[s]) for s in old]
            model["optimizer"] = whole_states(parts, self.stages[stage])
        names = [name for s in old for name in source.models[s]["buffer_names"]]
        model |= {
            "buffer_names": [name for name in names if first <= entry_of(name) < end],
            "dp_world_size": self.replicas,
            "mp_world_size": len(self.stages),
            "checkpoint_parallel_dimensions": {**model["checkpoint_parallel_dimensions"], "pp_degree": len(self.stages)},
            MARKER: {**model[MARKER], "digest": digest_of(self._side)},
        }
        torch.save(model, path)

    def _write_zero(self, stage: int, replica: int, path: Path) -> None:
        template = self.source.zero(self.from_[stage][0], 0)
        torch.save({**template, OPTIMIZER_STATE_DICT: self.flat[stage].state_dict(replica)}, path)


def _bounds(source: PipelineCheckpoint, stages: int, replicas: int, bounds: Sequence[int] | None) -> list[int]:
    if bounds is not None:
        if not are_bounds(bounds, stages, source.entries):
            raise ValueError(
                f"bounds (--bounds): got {_shown(bounds)}; allowed: {stages + 1} increasing integers from 0 to {source.entries}"
            )
        return list(bounds)
    active = {entry_of(n) for stage in source.stages for i in range(len(stage.groups)) for n in stage.active(i)}
    weights = source.weights()
    costs = [
        LayerCost(forward=w / 2**40, backward_input=w / 2**40, backward_weight=w / 2**40 * (i in active)) for i, w in enumerate(weights)
    ]
    micro = max(1, (source.micro_batches or stages) * source.replicas // replicas)
    return best_cut(costs, stages, micro, frozen=min(active))


def _sync(path: Path) -> None:
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _shown(bounds: Sequence[int]) -> str:
    return ",".join(map(str, bounds))
