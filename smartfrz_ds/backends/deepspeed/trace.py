"""The order of modules that ZeRO-3 has recorded, and from which it prefetches weights: one for each kind of forward.

The coordinator records the modules of one forward and its backward, and then gathers ahead in that order. A forward of another order
would make it throw the record away. So the record is put aside while forwards of another kind run, and comes back with the next one of
its own kind.

Touched in DeepSpeed 0.19.8, runtime/zero:
  partitioned_param_coordinator.py   PartitionedParameterCoordinator.is_invalid_trace, is_complete_trace, is_record_trace,
                                     _invalidate_trace, reset_step, the private __trace_mode, __submodule_order, __param_order,
                                     __step_id_module_fetched_for and the cache of __params_to_release; ZeRoTraceMode
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, ZeRoTraceMode
from torch import Tensor, nn

from smartfrz_ds.backends.forward_ways import ForwardKind, ForwardWays

from .base import ZeroParam

_MODE = "_PartitionedParameterCoordinator__trace_mode"
_MODULES = "_PartitionedParameterCoordinator__submodule_order"
_PARAMS = "_PartitionedParameterCoordinator__param_order"
_FETCHED = "_PartitionedParameterCoordinator__step_id_module_fetched_for"


@dataclass
class _Record:
    """What the coordinator knows of the order of modules. The rest of its state is set anew at the start of each forward."""

    mode: Any
    modules: Any
    params: Any
    fetched: Any

    @classmethod
    def of(cls, coordinator: PartitionedParameterCoordinator) -> _Record:
        return cls(*(getattr(coordinator, name) for name in (_MODE, _MODULES, _PARAMS, _FETCHED)))

    @classmethod
    def none(cls) -> _Record:
        """Return that of a coordinator which records the next forward. Collective, in that forward."""
        return cls(ZeRoTraceMode.INVALID, [], [], defaultdict(deque))

    @classmethod
    def unused(cls) -> _Record:
        """Return one that nothing follows and that is not recorded over: the forward gathers when it needs, and asks no other rank."""
        return cls(ZeRoTraceMode.COMPLETE, (), (), defaultdict(deque))

    def give(self, coordinator: PartitionedParameterCoordinator) -> None:
        names = {_MODE: self.mode, _MODULES: self.modules, _PARAMS: self.params, _FETCHED: self.fetched}
        for name, value in names.items():
            setattr(coordinator, name, value)
        _forget_releases()


class Zero3Ways(ForwardWays):
    """Puts the record of the coming forward in place."""

    communicates = True
    # parameter_offload.py: of every module
    own_attributes = frozenset({"ds_id", "ds_grads_remaining", "applied_pre_backward_ref_cnt", "ds_model_granularity"})

    def __init__(self, zero: Any) -> None:
        super().__init__()
        self._zero = zero
        self._kept: dict[str, _Record] = {}
        self._kind: ForwardKind = "complete"
        self._lent = False  # whether the coordinator has a record that is not to be kept
        self._last_complete = _Record.unused()  # of the last complete forwards, whatever was frozen then: forward has the same order

    def before(self, kind: ForwardKind, skipped: Sequence[nn.Module], *, together: bool) -> None:
        coordinator: PartitionedParameterCoordinator = self._zero._get_param_coordinator()
        if kind == self._kind and not self._lent and together:
            return
        if not self._lent:
            if kind == self._kind and (coordinator.is_complete_trace() or not self._kept):
                return  # alone, but this is DeepSpeed's own way as long as no forward of another kind has been
            if together and coordinator.is_record_trace():
                coordinator.reset_step()  # closes the record, which the ranks compare
            self._kept[self._kind] = _Record.of(coordinator)
            if self._kind == "complete" and coordinator.is_complete_trace():
                self._last_complete = self._kept[self._kind]
        self._kind = kind
        record = self._kept.get(kind) or _Record.none()
        self._lent = kind == "probe" or (not together and record.mode != ZeRoTraceMode.COMPLETE)
        # Without a record that it can follow, the coordinator would let go of small weights that else stay gathered, on this rank alone.
        (record if not self._lent else _Record.unused() if kind == "probe" else self._last_complete).give(coordinator)

    def end(self) -> None:
        if self._kind != "complete" or self._lent:
            (self._kept.get("complete") or _Record.none()).give(self._zero._get_param_coordinator())
        self._kept.clear()
        self._kind, self._lent = "complete", False

    def held(self, param: ZeroParam) -> Tensor:
        shard: Any = getattr(param, "ds_tensor", param)
        return shard

    def renew(self) -> None:
        """Record the order of modules again, for all kinds of forwards: other layers are frozen now.

        A frozen prefix only shortens the trace, so DeepSpeed never sees a mismatch and continues to prefetch for a backward that no longer
        happens; and the parameters that it may release are cached by step.
        """
        coordinator = self._zero._get_param_coordinator()
        if self._kind == "complete" and not self._lent and coordinator.is_complete_trace():
            self._last_complete = _Record.of(coordinator)
        self._kept.clear()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        self._kind, self._lent = "complete", False
        _forget_releases()


def _forget_releases() -> None:
    """Forget which parameters may be released at which step: the steps are those of another order of modules."""
    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    for cell in getattr(cached, "__closure__", None) or ():  # instrument_w_nvtx hides the lru_cache in its closure
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
