"""One change of the layout: everything is checked on all ranks first, then all change, then it is looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn import Parameter

from smartfrz_ds.backends.base import Backend, Released
from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.model.freeze_modules import freeze_modules, thaw_modules
from smartfrz_ds.model.layers import Layer


@dataclass(frozen=True, kw_only=True)
class Change:
    """From one frozen set to another. gone, back: names of layers that freeze and thaw; freeze, thaw: parameters that leave the optimizer
    and that return to it."""

    gone: frozenset[str]
    back: frozenset[str]
    freeze: tuple[Parameter, ...]
    thaw: tuple[Parameter, ...]


def plan_change(
    backend: Backend,
    ranks: Collectives,
    layers: Sequence[Layer],
    *,
    before: set[str],
    after: set[str],
    leaving: Sequence[Parameter],
    check: Callable[[], None],
) -> Change:
    """What must happen so that exactly the layers `after` are frozen. Collective; changes nothing.

    leaving: the parameters that are out of the optimizer then. check: raises ValueError where the set is not allowed.

    Raises:
        ValueError, RuntimeError: it can't be done, on every rank, whichever rank found out.
    """
    try:
        check()
        target = dict.fromkeys(leaving)
        freeze = [p for p in target if p not in backend.frozen]
        thaw = [p for layer in layers for p in (*layer.params, *layer.copies) if p in backend.frozen and p not in target]
        backend.check(freeze, thaw)
    except (ValueError, RuntimeError) as error:
        ranks.raise_if_any_failed(str(error), type(error))
        raise
    ranks.raise_if_any_failed("", ValueError)
    return Change(gone=frozenset(after - before), back=frozenset(before - after), freeze=tuple(freeze), thaw=tuple(thaw))


def carry_out(
    change: Change, backend: Backend, ranks: Collectives, model: nn.Module, layers: Sequence[Layer], config: FreezeConfig, *, keep: bool
) -> tuple[Released, int]:
    """Do it. Collective. Returns what this rank released, and the bytes that all ranks released. An error in here leaves it half-done."""
    released = backend.change(change.freeze, change.thaw, keep=keep)
    for layer in layers:
        if layer.name in change.gone:
            freeze_modules(layer, config.frozen_mode, config.tied)
        elif layer.name in change.back:
            thaw_modules(layer, model.training)
    backend.verify()
    return released, ranks.sum(released.bytes)
