"""Optimizers with one state entry per parameter: the common part of ZeRO-0's bare optimizer and of every run without DeepSpeed.

Such an optimizer may hold parameters that the user froze before the start. They stay in the group that the user chose, and return to it
when the user thaws them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from .base import Backend
from .cost import Cost
from .memory import MemoryNeed
from .param_order import insert_in_order
from .state_layout import tensors_in


class EntryBackend(Backend):
    """A subclass fills a parameter group anew in `_regroup`."""

    def __init__(self, engine: Any, lists: Sequence[Sequence[Parameter]]) -> None:
        """Initialize.

        Args:
            engine: The engine.
            lists: The optimizer's parameters group by group, including those that the user froze.
        """
        super().__init__(engine)
        self._groups = [[p for p in params if p.requires_grad] for params in lists]
        self._order = [list(params) for params in lists]
        self._added: set[Parameter] = set()  # those of `_order` that the optimizer was not given

    @property
    def groups(self) -> list[list[Parameter]]:
        return self._groups

    @abstractmethod
    def _regroup(self, frozen: set[Parameter]) -> None:
        """Make this the frozen set, and let the optimizer's groups hold the others of `_order`."""

    def _undo_entries(
        self, freeze: Sequence[Parameter], thaw: Sequence[Parameter], tables: Iterable[tuple[MutableMapping[Any, Any], Iterable[Any]]]
    ) -> Callable[[], None]:
        """Return the action that brings back these parameters and the optimizer's groups as they are now, without a copy of anything.

        Args:
            freeze: Parameters that are about to leave.
            thaw: Parameters that are about to return.
            tables: Dictionaries that the change is about to edit, each with the keys concerned.
        """
        frozen, kept = set(self.frozen), self.kept_entries()
        params = [(p, p.data, p.grad, p.requires_grad) for p in (*freeze, *thaw)]
        entries = [(table, {key: table[key] for key in keys if key in table}, list(keys)) for table, keys in tables]

        def undo() -> None:
            for table, before, keys in entries:
                for key in keys:
                    table.pop(key, None)
                table.update(before)
            for param, data, grad, trains in params:
                param.data, param.grad = data, grad
                param.requires_grad_(trains)
            self.set_kept_entries(kept)
            self._regroup(frozen)

        return undo

    def change_cost(self, out: Collection[Parameter], *, keep: bool) -> Cost:
        out = set(out)
        return Cost(copied_bytes=self._copied_bytes(out - self.frozen, self.frozen - out))

    def _copied_bytes(self, freeze: Iterable[Parameter], thaw: Iterable[Parameter]) -> int:
        """Return the bytes that a change copies on this rank; it communicates nothing."""
        whole = sum(p.nbytes for p in freeze if p.untyped_storage().nbytes() != p.nbytes)
        return whole + 2 * sum(p.nbytes for p in thaw)  # two moments, as large as the weights

    @abstractmethod
    def _held(self, params: Sequence[Parameter]) -> list[Any]:
        """Return the optimizer's data for each of these active parameters: its state, and its master weight if there is one."""

    def memory_need(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter], *, keep: bool) -> MemoryNeed:
        """Return the need, including state that the next step creates. Released state is held until the last vote, so it frees nothing."""
        need = MemoryNeed()
        for param, held in zip(freeze, self._held(freeze), strict=True):
            need += MemoryNeed.at(param.device, self._copied_bytes([param], ()))
            need += MemoryNeed(host=sum(t.nbytes for t in tensors_in(held) if t.device.type != "cpu") if keep else 0)
        active = self.trained()
        each = next((_bytes_each(p, held) for p, held in zip(active, self._held(active), strict=True) if _bytes_each(p, held)), 0.0)
        for param in thaw:
            home = _here(param)
            need += MemoryNeed.at(home.device, self._returning_bytes(param, home, round(each * home.numel())))
        return need

    def _returning_bytes(self, param: Parameter, home: Tensor, new: int) -> int:
        """Return the bytes that the return of a parameter allocates on its device.

        Args:
            param: The parameter.
            home: This rank's part of it.
            new: Bytes of fresh state.
        """
        if param not in self._kept:
            return new
        return sum(t.nbytes for t in tensors_in(self._kept[param]) if t.device != home.device)

    def given_group(self, param: Parameter) -> int | None:
        if param in self._added:
            return None
        return next((index for index, params in enumerate(self._order) if any(p is param for p in params)), None)

    def adopt(self, params: Mapping[Parameter, int], order: Mapping[Parameter, int]) -> None:
        super().adopt(params, order)
        for param, index in params.items():
            if self.given_group(param) is None:
                self._added.add(param)
                insert_in_order(self._order[index], param, order)
        self._regroup(self.frozen)

    def disown(self, params: Collection[Parameter]) -> None:
        super().disown(params)
        gone = self._added.intersection(params)
        self._added -= gone
        for listed in self._order:
            listed[:] = [p for p in listed if p not in gone]
        self._regroup(self.frozen)


def _here(param: Parameter) -> Tensor:
    """Return this rank's part of a parameter."""
    inside = getattr(param, "_local_tensor", None)  # torch/distributed/tensor/_api.py: DTensor
    return inside if isinstance(inside, Tensor) else param


def _bytes_each(param: Parameter, held: Any) -> float:
    """Return the bytes of state for each element of a parameter; 0 if there is none yet."""
    count = _here(param).numel()
    return sum(t.nbytes for t in tensors_in(held) if t.ndim > 0) / count if count else 0.0
