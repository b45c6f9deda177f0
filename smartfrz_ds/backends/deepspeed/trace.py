"""The order of modules that ZeRO-3 records and prefetches by.

Touched in DeepSpeed 0.19.8, runtime/zero/partitioned_param_coordinator.py: is_invalid_trace, _invalidate_trace and the cache of
__params_to_release.
"""

from __future__ import annotations

from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator


def renew_trace(coordinator: PartitionedParameterCoordinator) -> None:
    """Make the coordinator record the order of modules again.

    A frozen prefix only shortens the trace, so DeepSpeed never sees a mismatch and continues to prefetch for a backward that no longer
    happens; and the parameters that it may release are cached by step.
    """
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    for cell in getattr(cached, "__closure__", None) or ():  # instrument_w_nvtx hides the lru_cache in its closure
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
