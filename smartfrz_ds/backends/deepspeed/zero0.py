"""ZeRO stage 0: one state entry per parameter. The bare torch optimizer, or DeepSpeed's FP16_UnfusedOptimizer around it.

Touched in DeepSpeed 0.19.8:
  runtime/engine.py            engine.optimizer, engine.basic_optimizer, micro_steps
  runtime/fp16/unfused_optimizer.py   fp16_groups, fp32_groups, overflow_checker
  runtime/utils.py             CheckOverflow.params
  ops/adam/fused_adam.py       one step count a group, kept in the state of its last parameter
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from deepspeed.ops.adam import FusedAdam
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor
from torch.nn import Parameter

from smartfrz_ds.backends.base import Released, Sampler, SampleRequest
from smartfrz_ds.backends.deepspeed.flat.step_counts import GroupCounts
from smartfrz_ds.backends.entries import EntryBackend
from smartfrz_ds.backends.state_layout import Overrides, pack_state, scalars_beside, to_device, to_host, unpack_state
from smartfrz_ds.backends.transaction import Transaction
from smartfrz_ds.errors import FreezeError

from .base import DeepSpeedBackend
from .weight_state import EntryState, WeightState


class Zero0Backend(DeepSpeedBackend, EntryBackend):
    """Drops and restores state entries in place; nothing is communicated."""

    name = "ZeRO-0"

    def __init__(self, engine: Any) -> None:
        self.wrapper: FP16_UnfusedOptimizer | None = engine.optimizer if isinstance(engine.optimizer, FP16_UnfusedOptimizer) else None
        self._optimizer: torch.optim.Optimizer = self.wrapper.optimizer if self.wrapper else engine.optimizer
        # unfused_optimizer.py: fp16_groups holds the trainable model parameters, fp32_groups their masters, pairwise.
        super().__init__(engine, self.wrapper.fp16_groups if self.wrapper else [g["params"] for g in self._optimizer.param_groups])
        self._master: dict[Parameter, Tensor] = {}
        if self.wrapper:
            for low, high in zip(self.wrapper.fp16_groups, self.wrapper.fp32_groups, strict=True):
                self._master.update(zip(low, high, strict=True))
        self._counts = GroupCounts(self._optimizer) if isinstance(self._optimizer, FusedAdam) else None
        self._overrides = Overrides(self._optimizer)

    def base_optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    @property
    def moves_weights(self) -> bool:  # type: ignore[override] # as `_detach_from_training` does
        return any(p.data.untyped_storage().nbytes() != p.data.nbytes for group in self.groups for p in group)

    def masters(self) -> list[Tensor]:
        return list(self._master.values())

    def sampler(self, requests: Sequence[SampleRequest], numel: int) -> Sampler:
        sampler = Sampler(numel)
        if self.is_sampling_rank:  # every rank holds everything; one is enough
            for r in requests:
                sampler.add(self._master.get(r.param, r.param), r.elements, r.slots)
        return sampler

    def change(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter], *, keep: bool, tx: Transaction) -> Released:
        before = self.optimizer_bytes()
        if self._counts:
            self._counts.level()
        state, params = self._optimizer.state, [*freeze, *thaw]
        keys = [self._master.get(p, p) for p in params]
        tables: list[tuple[dict[Any, Any], Sequence[Any]]] = [(state, keys), (self._master, params)]
        with tx.step("take the parameters out", undo=self._undo_entries(freeze, thaw, tables)):
            for param in freeze:
                self._release(param, keep)
        with tx.step("put the parameters back", undo=lambda: self._drop_new_masters(thaw)):
            for param in thaw:
                self._restore(param)
        with tx.step("regroup"):
            self._regroup((self.frozen | set(freeze)) - set(thaw))
        return Released(before - self.optimizer_bytes(), 0)

    def _held(self, params: Sequence[Parameter]) -> list[Any]:
        masters = [self._master.get(p) for p in params]
        return [(m, self._optimizer.state.get(p if m is None else m, {})) for p, m in zip(params, masters, strict=True)]

    def _returning_bytes(self, param: Parameter, home: Tensor, new: int) -> int:
        kept = self._kept.get(param)
        if self.wrapper is None or kept is None:
            return super()._returning_bytes(param, home, new)
        return super()._returning_bytes(param, home, new) + (4 * home.numel() if home.device.type == "cpu" else 0)

    def _drop_new_masters(self, thaw: Sequence[Parameter]) -> None:
        """Drop the state of masters that `_restore` made."""
        for param in thaw:
            master = self._master.pop(param, None)
            if master is not None:
                self._optimizer.state.pop(master, None)

    def _regroup(self, frozen: set[Parameter]) -> None:
        self.frozen = frozen
        self._overrides.before()
        for i, order in enumerate(self._order):
            live = [p for p in order if p not in self.frozen]
            if self.wrapper:
                self.wrapper.fp16_groups[i] = live
                # The torch group's list and the wrapper's are one object (unfused_optimizer.py, __init__).
                self.wrapper.fp32_groups[i][:] = [self._master[p] for p in live]
            else:
                self._optimizer.param_groups[i]["params"] = live
        self._overrides.after()
        if self.wrapper:
            self.wrapper.overflow_checker.params = [p for group in self.wrapper.fp16_groups for p in group]

    def _release(self, param: Parameter, keep: bool) -> None:
        master = self._master.pop(param, None)
        state = self._optimizer.state.pop(param if master is None else master, {})
        if keep:
            self._kept[param] = (None if master is None else master.detach().cpu(), to_host(state))
        _detach_from_training(param)

    def _restore(self, param: Parameter) -> None:
        master, state = self._kept.pop(param, (None, {}))
        param.requires_grad_(True)
        key: Tensor = param
        if self.wrapper:
            source = param.data if master is None else master
            key = self._master[param] = source.to(device=param.device, dtype=torch.float32, copy=True).requires_grad_(True)
        if state:
            self._optimizer.state[key] = to_device(state, param, scalars_beside=scalars_beside(self._optimizer))

    def group_lists(self) -> list[list[list[Parameter]]]:
        return [self.groups, self._order]  # a bare optimizer may hold parameters that the user froze

    def weight_state(self, weight: Parameter) -> WeightState:
        return EntryState(self._optimizer, weight)

    # --- checkpoints ------------------------------------------------------------------------------------------------------------

    @property
    def shares_counts(self) -> bool:
        return self._counts is not None

    def state_extras(self) -> dict[str, Any]:
        return {"levelled": self._counts is not None and self._counts.levelled}

    def load_state_extras(self, saved: Mapping[str, Any], *, universal: bool) -> None:
        if self._counts is not None:
            self._counts.loaded(levelled=saved.get("levelled", False))

    def kept_state(self, only: Collection[Parameter] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        names = {p: n for p, n in self.names().items() if only is None or p in only}
        about: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for param, (master, state) in self._kept.items():
            if param not in names or (packed := pack_state(state)) is None:
                continue
            k = len(about)
            about.append({"param": names[param]} | packed[0])
            tensors |= {f"{k}/state/{key}": v for key, v in packed[1].items()}
            if master is not None:
                tensors[f"{k}/master"] = master
        return ({"kept": about}, tensors) if about else None

    def load_kept_state(self, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        params = {n: p for p, n in self.names().items()}
        for k, item in enumerate(about["kept"]):
            mine = {name.removeprefix(f"{k}/"): t for name, t in tensors.items() if name.startswith(f"{k}/")}
            state = {key.removeprefix("state/"): t for key, t in mine.items() if key.startswith("state/")}
            param = params[item["param"]]
            self._kept[param] = (mine.get("master"), unpack_state(item, state, param))

    def verify(self) -> None:
        super().verify()
        if not self.wrapper:
            return
        for low, high, group in zip(self.wrapper.fp16_groups, self.wrapper.fp32_groups, self._optimizer.param_groups, strict=True):
            if group["params"] is not high or len(low) != len(high):
                raise FreezeError("FP16_UnfusedOptimizer: the masters and the optimizer's parameters no longer match")


def _detach_from_training(param: Parameter) -> None:
    """Make `param` a plain constant of the model that shares no storage with any flat buffer."""
    param.grad = None
    param.requires_grad_(False)
    # One view would keep a whole flat buffer alive.
    if param.data.untyped_storage().nbytes() != param.data.nbytes:
        param.data = param.data.clone()
