"""What DeepSpeed's checkpoints need to be told about frozen layers, and what they leave out.

Touched in DeepSpeed 0.19.8:
  runtime/engine.py              _load_checkpoint, _load_zero_checkpoint (bf16 without ZeRO), _common_checkpoint_state (stage 1 leaves
                                 frozen parameters out of the file), _get_zero_param_shapes, param_names, module_state_dict,
                                 load_module_state_dict, FreezingMixin's super() calls in ../engine.py
  runtime/zero/stage_1_and_2.py  groups_padding, round_robin_bit16_padding, _param_slice_mappings (of a placeholder, while saving); the
                                 links are made anew by flat.link
  runtime/zero/partition_parameters.py   ds_status, ds_tensor, ds_numel, partition_numel
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor
from torch.nn import Parameter

from smartfrz_ds.backends.base import Backend
from smartfrz_ds.backends.state_layout import pack_state, unpack_state

from .base import ZeroParam
from .flat import FlatBackend, _Kept, link
from .half import Bf16Backend
from .model_files import read_model_states
from .partition import PackedLayout, Segment
from .step_counts import copy_step
from .zero0 import Zero0Backend
from .zero3 import Zero3Backend
from .zero12 import Zero12Backend

_PLACEHOLDER = "smartfrz_placeholder_"


class CompleteCheckpoints:
    """Mixed into a freezing engine: what DeepSpeed writes holds every weight, so that zero_to_fp32.py finds the whole model.

    With `exclude_frozen_parameters` (the Trainer's choice for PEFT models) what the user froze is left out, what this package froze is not.
    """

    _left_out: Collection[str] = ()  # names, for the time of a save

    @contextmanager
    def _leaving_out(self, wanted: bool) -> Iterator[bool]:
        """For the time of a save; gives what DeepSpeed is to be told instead of `exclude_frozen_parameters`."""
        ours: Collection[Parameter] = self.smartfrz.backend.frozen  # type: ignore[attr-defined]
        trainable = [p for p in ours if p.requires_grad]  # after `release`; DeepSpeed goes by the flag
        if wanted and ours:
            named = self.module.named_parameters()  # type: ignore[attr-defined]
            self._left_out = {n for n, p in named if not p.requires_grad and p not in ours}
        for param in trainable:
            param.requires_grad_(False)
        try:
            yield wanted and not ours
        finally:
            self._left_out = ()
            for param in trainable:
                param.requires_grad_(True)

    def module_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().module_state_dict(*args, **kwargs)  # type: ignore[misc]
        for name in self._left_out:
            state.pop(name, None)
        return state

    def _get_zero_frozen_param_attributes(self, attr_func: Any) -> Any:
        found = super()._get_zero_frozen_param_attributes(attr_func)  # type: ignore[misc]
        for name in self._left_out:
            found.pop(name, None)
        return found

    def load_module_state_dict(self, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        fragments = checkpoint.get("frozen_param_fragments")
        if fragments is not None:  # of what was left out, what is there now: DeepSpeed looks for all
            for param, name in self.param_names.items():  # type: ignore[attr-defined]
                if not param.requires_grad and name not in fragments:
                    fragments[name] = self._get_param_fragment_func(param)  # type: ignore[attr-defined]
        return super().load_module_state_dict(checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _common_checkpoint_state(self, module_state_dict: Any, zero_optimizer_state: Any, save_frozen_param: bool) -> Any:
        # _save_checkpoint asks for the frozen parameters in stages 2 and 3 only, unless the user excludes them.
        if zero_optimizer_state and not save_frozen_param and isinstance(module_state_dict, Mapping):
            named = self.module.named_parameters()  # type: ignore[attr-defined]
            names = [n for n, p in named if not p.requires_grad and n not in self._left_out]
            save_frozen_param = bool(names) and all(n in module_state_dict for n in names)
        return super()._common_checkpoint_state(module_state_dict, zero_optimizer_state, save_frozen_param)  # type: ignore[misc]

    def _load_checkpoint(self, load_dir: str, tag: str, *args: Any, **kwargs: Any) -> Any:
        """With bf16 and without ZeRO a pipeline has a BF16_Optimizer: DeepSpeed 0.19.8 writes its partitions as ZeRO's, and then hands it
        the model file's copy, which it can't take (KeyError: 0). Its own files are loaded here, as for ZeRO-1."""
        engine: Any = self
        if not isinstance(engine.optimizer, BF16_Optimizer) or engine.zero_optimization():
            return super()._load_checkpoint(load_dir, tag, *args, **kwargs)  # type: ignore[misc]
        wanted = kwargs.get("load_optimizer_states", True) and not kwargs.get("load_module_only", False)
        path, client_state = super()._load_checkpoint(load_dir, tag, *args, **{**kwargs, "load_optimizer_states": False})  # type: ignore[misc]
        if path is not None:
            client_state.pop("optimizer", None)
            if not wanted or not engine._load_zero_checkpoint(load_dir, tag):
                engine.optimizer._restore_from_bit16_weights()
        return path, client_state

    def _get_zero_param_shapes(self) -> Any:
        shapes = super()._get_zero_param_shapes()  # type: ignore[misc]
        for group in shapes:
            for name in [n for n in group if n.startswith(_PLACEHOLDER)]:
                del group[name]
        return shapes


# --- while DeepSpeed saves or loads ---------------------------------------------------------------------------------------------


@contextmanager
def saving(backend: Backend) -> Iterator[None]:
    """For the time of DeepSpeed's save, this package's own things look like DeepSpeed's."""
    with _placeholders_empty(backend), _replicas_hidden(backend), _sleeping_hidden(backend):
        yield


@contextmanager
def loading(backend: Backend) -> Iterator[None]:
    """For the time of DeepSpeed's load. Collective: replicas under ZeRO-3 are let go and gathered anew, with the loaded values."""
    if isinstance(backend, Zero3Backend):
        backend._replicas.update(set(), {})
    try:
        with _placeholders_empty(backend):
            yield
    finally:
        if isinstance(backend, Zero3Backend):
            backend._replicas.update(backend.frozen, backend._released_by(backend.frozen))
        elif isinstance(backend, Zero12Backend | Bf16Backend):
            # After a load DeepSpeed's accessors still show the optimizer state of before, and keep it alive.
            link(backend.wrapper, backend.masters())


@contextmanager
def _placeholders_empty(backend: Backend) -> Iterator[None]:
    """An emptied group of ZeRO-1/2 is written, and compared, as one without elements: zero_to_fp32.py would report a weight too many."""
    if not isinstance(backend, Zero12Backend):
        yield
        return
    zero = backend.wrapper
    emptied = [i for i in range(len(backend.groups)) if not backend.active(i)]
    old = [(zero.groups_padding[i], zero.round_robin_bit16_padding[i], zero._param_slice_mappings[i]) for i in emptied]
    for i in emptied:
        zero.groups_padding[i], zero.round_robin_bit16_padding[i] = backend.master(i).numel(), []
        zero._param_slice_mappings[i] = {}
    try:
        yield
    finally:
        for i, (padding, between, mapping) in zip(emptied, old, strict=True):
            zero.groups_padding[i], zero.round_robin_bit16_padding[i], zero._param_slice_mappings[i] = padding, between, mapping


@contextmanager
def _replicas_hidden(backend: Backend) -> Iterator[None]:
    """Frozen ZeRO-3 parameters that stay gathered are written as their shards only, like all others; without communication."""
    whole: dict[ZeroParam, Tensor] = {}
    if isinstance(backend, Zero3Backend):
        whole = {p: p.data for p in backend._replicas.params if p.ds_status == ZeroParamStatus.AVAILABLE}
    for param in whole:
        param.data = torch.empty(0, dtype=param.dtype, device=param.device)  # as free_param does
        param.ds_status = ZeroParamStatus.NOT_AVAILABLE
    try:
        yield
    finally:
        for param, data in whole.items():
            param.data, param.ds_status = data, ZeroParamStatus.AVAILABLE


@contextmanager
def _sleeping_hidden(backend: Backend) -> Iterator[None]:
    """The state of sub-groups that are frozen whole: torch's state_dict refuses state of a tensor that is in no group."""
    state = backend.base_optimizer().state
    sleeping = {m: state.pop(m) for _, m in _sleeping(backend) if m in state}
    try:
        yield
    finally:
        state.update(sleeping)


def _sleeping(backend: Backend) -> list[tuple[int, Tensor]]:
    if not isinstance(backend, Zero3Backend):
        return []
    return [(i, backend.master(i)) for i in range(len(backend.groups)) if not backend.active(i)]


# --- what DeepSpeed doesn't know of -------------------------------------------------------------------------------------------------


def weights_are_cut(backend: Backend) -> bool:
    """Whether the weights themselves are in the files of all ranks, so that even they alone need the same number of ranks."""
    return isinstance(backend, Zero3Backend)


def private_state(backend: Backend) -> dict[str, Any]:
    """JSON-able: step counts of thawed parameters, and the entries of sub-groups that are frozen as a whole. The same on all ranks but in a
    pipeline, where it says whose stage it is, too."""
    return _private(backend) | (_of_stage(backend) if backend.is_pipeline else {})


def _private(backend: Backend) -> dict[str, Any]:
    if isinstance(backend, Zero0Backend):
        return {"levelled": backend._counts is not None and backend._counts.levelled}
    if not isinstance(backend, FlatBackend):
        return {}
    names, state = _names(backend), backend.base_optimizer().state
    asleep = {}
    for i, master in _sleeping(backend):
        entries = state.get(master, {})
        if "step" in entries:
            asleep[str(i)] = {"step": _step_to_json(entries["step"]), "keys": [k for k, v in entries.items() if _is_flat(v)]}
    saved: dict[str, Any] = {"steps": {names[p]: _step_to_json(s) for p, s in backend._own_steps.count.items()}, "asleep": asleep}
    live = [(state[backend.master(i)]["step"], backend.active(i)) for i in range(len(backend.groups)) if _counts(backend, i)]
    if isinstance(backend, Zero3Backend) and len({float(step) for step, _ in live}) > 1:
        saved["groups"] = [{"step": _step_to_json(step), "params": [names[p] for p in params]} for step, params in live]
    return saved


def _of_stage(backend: Backend) -> dict[str, Any]:
    """place: [stage, replica]. options: the settings of each parameter group. groups: names of each parameter group in the optimizer's
    order, frozen ones too; frozen: those."""
    grid, names = backend.engine.grid, _names(backend)
    shared = isinstance(backend, Zero0Backend) and backend._counts is not None
    return {
        "place": [grid.get_pipe_parallel_rank(), grid.get_data_parallel_rank()],
        "groups": _group_names(backend, names),
        "options": backend.group_options(),
        "frozen": [name for p, name in names.items() if p in backend.frozen],
        "shared_count": shared,  # one step count a group, in the state of its last parameter (FusedAdam)
    }


def _group_names(backend: Backend, names: Mapping[Parameter, str]) -> list[list[str]]:
    groups = backend._order if isinstance(backend, Zero0Backend) else backend.groups
    return [[names.get(p, "?") for p in group] for group in groups]


def check_groups(backend: Backend, saved: Mapping[str, Any]) -> None:
    """Raise ValueError where this rank's optimizer holds other parameters, or in another order, than the checkpoint's: DeepSpeed goes by
    position. saved: `private_state` of this rank."""
    own, theirs = _group_names(backend, _names(backend)), saved.get("groups")
    if theirs is not None and own != theirs:
        index = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b), min(len(own), len(theirs)))
        held, wanted = (f"{g[index][:4]}…" if index < len(g) else "nothing" for g in (own, theirs))
        raise ValueError(
            f"parameter group {index} of pipeline stage {saved['place'][0]} holds {held}, in the checkpoint {wanted}; allowed: the "
            "same parameters of a stage in the same groups and order (the model's own order, where the stages are others than before)"
        )


def load_private_state(backend: Backend, saved: Mapping[str, Any], *, universal: bool) -> None:
    """The inverse, after DeepSpeed has loaded. universal: it has loaded a checkpoint of maybe another number of ranks."""
    if isinstance(backend, Zero0Backend) and backend._counts is not None:
        backend._counts.loaded(levelled=saved.get("levelled", False))
    if not isinstance(backend, FlatBackend):
        return
    params, state = {n: p for p, n in _names(backend).items()}, backend.base_optimizer().state
    backend._own_steps.count.clear()
    for name, step in saved.get("steps", {}).items():
        backend._own_steps.set(params[name], _step_from_json(step))
    if universal and "groups" in saved:
        # stage3.py gives every sub-group the step of the first; one that was frozen as a whole for a while has another. Another number of
        # ranks makes other sub-groups besides.
        steps = {params[n]: _step_from_json(g["step"]) for g in saved["groups"] for n in g["params"]}
        for i in range(len(backend.groups)):
            if not _counts(backend, i):
                continue
            base = state[backend.master(i)]["step"] = copy_step(steps[backend.active(i)[0]])
            for param in backend.active(i):
                if float(steps[param]) != float(base) and param not in backend._own_steps.count:
                    backend._own_steps.set(param, steps[param])
    for i, master in _sleeping(backend):
        state.pop(master, None)
        if str(i) in saved.get("asleep", {}):
            entries = saved["asleep"][str(i)]
            state[master] = {"step": _step_from_json(entries["step"])} | {k: torch.empty_like(master.detach()) for k in entries["keys"]}


def kept_state(backend: Backend, only: Collection[Parameter] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What this rank holds back for a thaw, as JSON and tensors; None where there is nothing. only: of these parameters, where given."""
    names = {p: n for p, n in _names(backend).items() if only is None or p in only}
    about: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    if isinstance(backend, Zero0Backend):
        held = [(p, kept) for p, kept in backend._kept.items() if p in names]
        for param, (master, state) in held:
            if (packed := pack_state(state)) is None:
                continue
            k = len(about)
            about.append({"param": names[param]} | packed[0])
            tensors |= {f"{k}/state/{key}": v for key, v in packed[1].items()}
            if master is not None:
                tensors[f"{k}/master"] = master
    elif isinstance(backend, FlatBackend):
        for k, kept in enumerate({id(v): v for p, v in backend._kept.items() if p in names}.values()):
            waiting = [p for p, v in backend._kept.items() if v is kept and p in names]
            if only is not None:
                kept = kept.part(waiting, backend.group_rank(next(i for i, g in enumerate(backend.groups) if waiting[0] in set(g))))
            pieces = {names[p]: [[s.start, s.numel, s.rank, s.offset] for s in kept.layout.segments(p)] for p in waiting}
            steps = {names[p]: _step_to_json(kept.step[p]) for p in waiting if kept.step.get(p) is not None}
            about.append({"pieces": pieces, "sizes": list(kept.layout.sizes), "steps": steps})
            tensors |= {f"{k}/{key}": v for key, v in kept.tensors.items()}
    return ({"kept": about}, tensors) if about else None


def load_kept_state(backend: Backend, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The inverse, on the same number of ranks. The layout has the checkpoint's frozen set already."""
    params = {n: p for p, n in _names(backend).items()}
    for k, item in enumerate(about["kept"]):
        mine = {name.removeprefix(f"{k}/"): t for name, t in tensors.items() if name.startswith(f"{k}/")}
        if isinstance(backend, Zero0Backend):
            state = {key.removeprefix("state/"): t for key, t in mine.items() if key.startswith("state/")}
            param = params[item["param"]]
            backend._kept[param] = (mine.get("master"), unpack_state(item, state, param))
        elif isinstance(backend, FlatBackend):
            pieces = {params[name]: [Segment(*s) for s in segments] for name, segments in item["pieces"].items()}
            kept = _Kept(PackedLayout(pieces, tuple(item["sizes"])))
            kept.tensors = mine
            kept.step = dict.fromkeys(pieces) | {params[n]: _step_from_json(s) for n, s in item["steps"].items()}
            backend._kept.update(dict.fromkeys(pieces, kept))


def _counts(backend: FlatBackend, index: int) -> bool:
    """Whether this group is stepped and has been."""
    return bool(backend.active(index)) and "step" in backend.base_optimizer().state.get(backend.master(index), {})


def _names(backend: Backend) -> dict[Parameter, str]:
    return {p: n for n, p in backend.engine.module.named_parameters()}


def _is_flat(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _step_to_json(step: Any) -> dict[str, Any]:
    """torch's optimizers count in a scalar tensor, DeepSpeed's in a number."""
    if isinstance(step, Tensor):
        return {"value": step.item(), "dtype": str(step.dtype).removeprefix("torch."), "device": step.device.type}
    return {"value": step}


def _step_from_json(saved: Mapping[str, Any]) -> Any:
    if "dtype" not in saved:
        return saved["value"]
    # A count beside the weights (fused, capturable) goes to this rank's own device.
    return torch.tensor(saved["value"], dtype=getattr(torch, saved["dtype"]), device=saved["device"])


# --- universal checkpoints ----------------------------------------------------------------------------------------------------------


def emptied_groups(backend: Backend, frozen: Sequence[Parameter]) -> list[int]:
    """Parameter groups of which nothing is active with these parameters frozen and which DeepSpeed still steps (the placeholder)."""
    gone = set(frozen)
    return [] if isinstance(backend, Zero3Backend) else [i for i, group in enumerate(backend.groups) if gone.issuperset(group)]


@torch.no_grad()
def load_frozen_weights(backend: Backend, folder: Path) -> None:
    """Frozen weights and buffers out of the model files that ds_to_universal has copied.

    A universal load (runtime/engine.py, _load_checkpoint) reads zero/<name>/ for what the optimizer holds and skips the module's own
    state, so that everything else silently stays as it was initialised.
    """
    module = backend.engine.module
    pattern = "zero_pp_rank_*_mp_rank_00_model_states.pt" if isinstance(backend, Zero3Backend) else "mp_rank_00_model_states.pt"
    states = read_model_states(folder, pattern)
    for name, buffer in module.named_buffers():
        if name in states[0]["module"]:
            buffer.copy_(states[0]["module"][name])
    for name, param in module.named_parameters():
        if param.requires_grad:
            continue
        if not isinstance(backend, Zero3Backend):
            param.copy_(states[0]["module"][name])
            continue
        shard = _shard_of(torch.cat([s["frozen_param_fragments"][name].view(-1) for s in states]), param)
        param.ds_tensor.data.copy_(shard.view_as(param.ds_tensor))


def _shard_of(full: Tensor, param: ZeroParam) -> Tensor:
    """This rank's part of a flat parameter; the padding of another number of ranks is cut off, that of this one put on."""
    size, rank = param.partition_numel(), dist.get_rank()
    part = full[: param.ds_numel][rank * size : (rank + 1) * size]
    return torch.cat([part, part.new_zeros(size - part.numel())])
