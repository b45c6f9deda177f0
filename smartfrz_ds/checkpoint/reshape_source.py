"""Reads a pipeline's checkpoint from disk: checks it, and maps its tensors into memory, to be read only when used.

Source: DeepSpeed 0.19.8:
  runtime/engine.py           _common_checkpoint_state, _get_ckpt_name, _get_rank_zero_ckpt_name, _get_zero_param_shapes
  runtime/pipe/module.py      ckpt_layer_path, save_state_dict
  runtime/pipe/topology.py    PipeDataParallelTopology: rank = stage * replicas + replica
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import BASE_OPTIMIZER_STATE, OPTIMIZER_STATE_DICT
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors import safe_open
from torch import Tensor

from smartfrz_ds.config.versions import TESTED, is_tested

from .files import MARKER, SIDE_FILE, complete_tags, digest_of, kept_file, missing_files, unpack
from .reshape_states import FlatSource, KeptSource, Params, Stage, entry_of
from .tensor_file import file_digest

_LAYER_FILE = re.compile(r"layer_(\d+)-model_states\.pt")
# DeepSpeed's own types in these files, besides tensors and plain containers.
_DEEPSPEEDS_OWN = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


class PipelineCheckpoint:
    """A checked checkpoint of a pipeline.

    Args:
        root: The folder, as in load_checkpoint.
        tag: The tag; None: the one that `latest` names.
        trust: Whether to unpickle objects other than tensors and DeepSpeed's own types.

    Raises:
        ValueError: The checkpoint is damaged or cannot be converted; with what is allowed.
    """

    def __init__(self, root: Path, tag: str | None, trust: bool) -> None:
        latest = root / "latest"
        if tag is None and not latest.is_file():
            raise ValueError(
                f"CHECKPOINT: got {root}, which has no file `latest`; allowed: a folder as load_checkpoint takes it, or a --tag of it"
            )
        self.root, self.tag, self._trust = root, tag or latest.read_text().strip(), trust
        self.folder = root / self.tag
        if not (self.folder / SIDE_FILE).is_file():
            raise ValueError(f"{self.folder} has no {SIDE_FILE}; allowed: a checkpoint that a freezing PipelineEngine saved")
        missing = missing_files(self.folder)
        if missing is None or missing:
            what = "its save did not finish" if missing is None else f"{', '.join(missing)} missing or of another size"
            raise ValueError(f"{self.folder} is incomplete: {what}; complete here: {complete_tags(root) or 'none'}")
        side = (self.folder / SIDE_FILE).read_bytes()
        self.state = unpack(side)
        if self.state.get("parts") is None:
            raise ValueError(f"{self.folder} is not a pipeline checkpoint; allowed: one that a freezing PipelineEngine saved")
        self.parts: list[int] = self.state["parts"]
        stages = len(self.parts) - 1
        self.entries, self.replicas = self.parts[-1], self.state["world"] // stages
        self.models = [_load(p, trust) for p in sorted(self.folder.glob("mp_rank_*_model_states.pt"), key=_numbers)]
        if len(self.models) != stages:
            raise ValueError(f"{self.folder} has {len(self.models)} files mp_rank_*_model_states.pt for {stages} stages")
        if self.models[0][MARKER]["digest"] != digest_of(side):
            raise ValueError(f"{self.folder / SIDE_FILE} is damaged: its digest is not the one in mp_rank_00_model_states.pt")
        self._check_kind()
        privates = self.state["privates"]
        if any("place" not in p for p in privates):
            raise ValueError(
                f"{self.folder} was saved by an earlier smartfrz_ds; resume it with the same stages and replicas, and save it again"
            )
        if [p["place"] for p in privates] != [[s, d] for s in range(stages) for d in range(self.replicas)]:
            raise ValueError(f"{self.folder}: a custom topology; allowed: PipelineModule's, rank = stage * replicas + replica")
        self.privates: list[dict[str, Any]] = privates[:: self.replicas]  # one per stage: replicas differ only in their place
        self.stages = [Stage(groups=p["groups"], frozen=set(p["frozen"]), steps=p.get("steps", {})) for p in self.privates]
        if len({len(stage.groups) for stage in self.stages}) != 1:
            raise ValueError(
                f"{self.folder}: the stages have {[len(s.groups) for s in self.stages]} parameter groups; allowed: the same number on each"
            )
        if any(p.get("options") != self.privates[0].get("options") for p in self.privates):
            raise ValueError(
                f"{self.folder}: the stages' parameter groups have different settings; allowed: the same groups on every stage"
            )
        # FusedAdam before its first freeze; afterwards every parameter has its own count (flat/step_counts.py)
        self.shared_count = [bool(p["shared_count"] and not p["levelled"]) for p in self.privates]
        self.layers = {int(m[1]): p for p in self.folder.glob("layer_*") if (m := _LAYER_FILE.fullmatch(p.name))}
        for name in (n for stage in self.stages for group in stage.groups for n in group):
            if entry_of(name) not in self.layers:
                raise ValueError(f"{self.folder} has no layer file for {name}; tensor parallelism is not supported")

    def _check_kind(self) -> None:
        config, saved_by = self.models[0]["ds_config"], self.models[0]["ds_version"]
        if not is_tested("deepspeed", saved_by):
            raise ValueError(f"{self.folder} was saved by DeepSpeed {saved_by}; allowed: {TESTED['deepspeed']}, the tested versions")
        self.is_flat = self.models[0]["param_shapes"] is not None
        zero = config.get("zero_optimization") or {}
        for key in ("round_robin_gradients", "parameter_alignment", "elastic_checkpoint"):
            if self.is_flat and zero.get(key):
                raise ValueError(f"zero_optimization.{key}: the checkpoint has {zero[key]!r}; smartfrz reshape allows: false")
        if not self.is_flat and BASE_OPTIMIZER_STATE in (self.models[0]["optimizer"] or {BASE_OPTIMIZER_STATE: None}):
            raise ValueError(
                f"{self.folder}: bf16 without ZeRO, which DeepSpeed {saved_by} writes but can't load; allowed: ZeRO stage 1, or fp32"
            )
        self.bf16 = any(self.folder.glob("bf16_zero_pp_rank_*"))
        micro = config.get("gradient_accumulation_steps")
        self.micro_batches = micro if isinstance(micro, int) else None

    def overlapping(self, first: int, end: int) -> list[int]:
        """Return the stages that hold some of a range of entries.

        Args:
            first: The first entry.
            end: The one after the last.
        """
        return [s for s, (a, b) in enumerate(pairwise(self.parts)) if a < end and first < b]

    def zero_name(self, stage: int, replica: int) -> str:
        """Return the name of DeepSpeed's file with the optimizer state of a stage and replica.

        Args:
            stage: The stage, from 0.
            replica: The replica, from 0.

        Source:
            `_get_rank_zero_ckpt_name` of DeepSpeed's runtime/engine.py.
        """
        return f"{'bf16_' if self.bf16 else ''}zero_pp_rank_{replica}_mp_rank_{stage:02d}_optim_states.pt"

    @cache  # noqa: B019 (one object, one run)
    def zero(self, stage: int, replica: int) -> dict[str, Any]:
        """Return the content of DeepSpeed's file with the optimizer state of a stage and replica.

        Args:
            stage: The stage, from 0.
            replica: The replica, from 0.

        Raises:
            ValueError: The file has objects that may not be unpickled.
        """
        return _load(self.folder / self.zero_name(stage, replica), self._trust)

    @cached_property
    def params(self) -> Params:
        """The placeholders of all parameters."""
        return Params()

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each parameter that is in a flat partition, by name."""
        return {name: shape for model in self.models for group in model["param_shapes"] for name, shape in group.items()}

    @cache  # noqa: B019
    def flat(self, stage: int) -> FlatSource:
        """Return the flat partitions of a stage.

        Raises:
            ValueError: They do not match the freeze state.
        """
        sizes = [{name: shape.numel() for name, shape in group.items()} for group in self.models[stage]["param_shapes"]]

        def read(replica: int) -> Mapping[str, Any]:
            return self.zero(stage, replica)[OPTIMIZER_STATE_DICT]

        try:
            return FlatSource(stage=self.stages[stage], shapes=sizes, replicas=self.replicas, read=read, params=self.params)
        except ValueError as error:
            raise ValueError(f"{self.folder / self.zero_name(stage, 0)}: {error}") from error

    def kept(self, stage: int) -> KeptSource:
        """Return the optimizer state that a stage keeps for a thaw."""

        @cache
        def read(replica: int) -> tuple[Mapping[str, Any], Mapping[str, Tensor]] | None:
            rank = stage * self.replicas + replica
            path = self.folder / kept_file(rank)
            return _read_kept(path, self.state["kept"][str(rank)]) if str(rank) in self.state["kept"] else None

        return KeptSource(read=read, params=self.params)

    def weights(self) -> list[int]:
        """Return the number of weights of each entry in the list of layers."""
        return [sum(t.numel() for t in _load(self.layers[i], self._trust).values()) if i in self.layers else 0 for i in range(self.entries)]


def _load(path: Path, trust: bool) -> dict[str, Any]:
    """Load a file of torch, mapped into memory if its format allows.

    Raises:
        ValueError: It cannot be read, or holds objects that `trust` does not allow.
    """
    for mapped in (True, False):
        try:
            with torch.serialization.safe_globals(_DEEPSPEEDS_OWN):
                return torch.load(path, map_location="cpu", mmap=mapped, weights_only=not trust)
        except pickle.UnpicklingError as error:
            name = re.search(r"GLOBAL (\S+)", str(error))
            raise ValueError(
                f"{path} holds {name[1] if name else 'Python objects'}, neither a tensor nor DeepSpeed's own type (your client_state?). "
                "--trust unpickles it, which runs any code that the file names: use it only for a checkpoint that you trust"
            ) from error
        except RuntimeError as error:  # checkpoint_serialization: false writes torch's old format, which cannot be mapped
            if not mapped:
                raise ValueError(f"{path} cannot be read: {error}") from error
    raise AssertionError


class _Mapped(Mapping[str, Tensor]):
    """The tensors of a safetensors file, read one at a time."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


def _read_kept(path: Path, digest: str) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    if file_digest(path) != digest:
        raise ValueError(f"{path} is damaged: its digest is not the one in {SIDE_FILE}")
    file = safe_open(path, framework="pt")
    return json.loads(file.metadata()["smartfrz"]), _Mapped(file)


def _numbers(path: Path) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", path.name)]
