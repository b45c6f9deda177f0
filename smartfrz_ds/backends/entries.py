"""Optimizers with one state entry a parameter: what ZeRO-0's bare optimizer and every run without DeepSpeed have in common.

Such an optimizer may hold parameters that the user froze before the start. They stay where the user put them, and say where they belong
when the user thaws them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from torch.nn import Parameter

from .base import Backend, insert_in_order
from .cost import Cost


class EntryBackend(Backend):
    """A subclass fills a parameter group anew in `_regroup`."""

    def __init__(self, engine: Any, lists: Sequence[Sequence[Parameter]]) -> None:
        """lists: the optimizer's parameters group by group, those that the user froze too."""
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
        """Bytes that a change copies on this rank; nothing is communicated for it."""
        whole = sum(p.nbytes for p in freeze if p.untyped_storage().nbytes() != p.nbytes)
        return whole + 2 * sum(p.nbytes for p in thaw)  # two moments, as large as the weights

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
