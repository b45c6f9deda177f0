"""Frozen ZeRO-3 parameters that stay gathered on every rank: they never change, so they need never be gathered again.

Touched in DeepSpeed 0.19.8 (runtime/zero): Parameter.ds_status, ds_persist, partition, all_gather (partition_parameters.py);
partition_all_parameters of this engine's DeepSpeedZeRoOffload and its persistent_parameters (parameter_offload.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor

from .base import ZeroParam


class Replicas:
    """The parameters that are kept whole. The shard stays too: checkpoints read it.

    In every mode a small parameter that DeepSpeed keeps gathered between steps (stage3_param_persistence_threshold) stays gathered, and
    is not gathered again after each step. `frozen` is "sharded", "replicated" or "auto".
    """

    def __init__(self, zero: Any, frozen: Literal["sharded", "replicated", "auto"]) -> None:
        self.zero = zero
        self.frozen = frozen
        self.params: dict[ZeroParam, tuple[bool, Callable[..., Any]]] = {}  # -> its ds_persist and its partition before
        self._persistent = dict.fromkeys(zero.persistent_parameters)
        self._partition_all = zero.parameter_offload.partition_all_parameters
        # An attribute of this one object: step() and load_checkpoint partition everything through it.
        zero.parameter_offload.partition_all_parameters = self._partition_all_but_replicas

    def gathered_by(self, frozen: set[ZeroParam], released: Mapping[ZeroParam, int]) -> int:
        """Return the bytes of whole parameters that `update` would gather between two steps, when only small ones are gathered."""
        new = [p for p in self._choose(frozen, released) if p not in self.params]
        return sum(_whole_bytes(p) for p in new if p.ds_status == ZeroParamStatus.NOT_AVAILABLE)

    def bring_back(self, before: set[ZeroParam]) -> None:
        """Make exactly these parameters the replicas, as they were before an `update`. Collective where something must be gathered."""
        self._make(dict.fromkeys(sorted(before, key=lambda p: p.ds_id)))

    def update(self, frozen: set[ZeroParam], released: Mapping[ZeroParam, int]) -> int:
        """Decide which parameters of this frozen set are kept whole, and gather or release them. Collective if any must be gathered.

        Args:
            frozen: All frozen parameters.
            released: Optimizer bytes that freezing each of them released on this rank; the same on all ranks.

        Returns:
            Bytes of the gathered parameters, whole.
        """
        return self._make(self._choose(frozen, released))

    def _make(self, wanted: dict[ZeroParam, None]) -> int:
        for param in [p for p in self.params if p not in wanted]:
            self._let_go(param)
        new = [p for p in wanted if p not in self.params]
        missing = [p for p in new if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        if missing:
            missing[0].all_gather(param_list=missing)
        for param in new:
            self.params[param] = (param.ds_persist, param.partition)
            param.ds_persist = True
            # DeepSpeed gives each parameter a `partition` of its own; the coordinator releases through it.
            param.partition = partial(self._partition, param)
        persistent = [p for p in self._persistent if p not in self.params]
        self.zero.persistent_parameters[:] = persistent
        return sum(_whole_bytes(p) for p in missing)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Hide the replicas during a save, which is the block: only their shards are written. Without communication."""
        whole: dict[ZeroParam, Tensor] = {p: p.data for p in self.params if p.ds_status == ZeroParamStatus.AVAILABLE}
        for param in whole:
            param.data = torch.empty(0, dtype=param.dtype, device=param.device)  # as free_param does
            param.ds_status = ZeroParamStatus.NOT_AVAILABLE
        try:
            yield
        finally:
            for param, data in whole.items():
                param.data, param.ds_status = data, ZeroParamStatus.AVAILABLE

    def leave(self) -> None:
        """Return every parameter to DeepSpeed's control, so that another engine may take the model."""
        for param in list(self.params):
            self._let_go(param)
        self.zero.persistent_parameters[:] = self._persistent

    def _choose(self, frozen: set[ZeroParam], released: Mapping[ZeroParam, int]) -> dict[ZeroParam, None]:
        ordered = sorted(frozen, key=lambda p: p.ds_id)
        chosen = dict.fromkeys(p for p in ordered if p in self._persistent)
        room = sum(released.values())
        for param in ordered:
            if param in chosen or self.frozen == "sharded":
                continue
            if self.frozen == "replicated" or _whole_bytes(param) <= room:
                room -= _whole_bytes(param)
                chosen[param] = None
        return chosen

    def _let_go(self, param: ZeroParam) -> None:
        param.ds_persist, param.partition = self.params.pop(param)
        if param not in self._persistent and param.ds_status == ZeroParamStatus.AVAILABLE:
            param.partition()

    def _partition(self, param: ZeroParam, param_list: Any = None, has_been_updated: bool = False, **kwargs: Any) -> None:
        """Replace `param.partition`: a replica stays whole, unless the user has changed it (GatheredParameters).

        If DeepSpeed's own partition is called through another parameter of a list, it frees a replica; its next use gathers it again.
        """
        _, original = self.params[param]
        if has_been_updated:
            original(param_list=param_list, has_been_updated=True, **kwargs)
        elif others := [p for p in (param_list if param_list is not None else []) if p not in self.params]:
            original(param_list=others, has_been_updated=False, **kwargs)

    def _partition_all_but_replicas(self) -> None:
        # partition_all_parameters releases AVAILABLE parameters and requires that none is left; for its duration these are not AVAILABLE.
        whole = [p for p in self.params if p.ds_status == ZeroParamStatus.AVAILABLE]
        for param in whole:
            param.ds_status = ZeroParamStatus.NOT_AVAILABLE
        try:
            self._partition_all()
        finally:
            for param in whole:
                param.ds_status = ZeroParamStatus.AVAILABLE


def _whole_bytes(param: ZeroParam) -> int:
    return int(param.ds_numel) * param.ds_tensor.element_size()
