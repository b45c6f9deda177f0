"""Several torch optimizers as one: a list of them, or a container that steps them one after the other (torchtitan's OptimizersContainer).

The container itself may be a torch optimizer whose own groups and state are unused: the real ones are those of the optimizers in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer

# Attributes in which containers hold their optimizers: torchtitan and others; Megatron's ChainedOptimizer.
_CONTENTS = ("optimizers", "chained_optimizers")
_ALLOWED = (
    "Allowed: a torch optimizer such as AdamW or SGD, one in Accelerate's or Lightning's wrapper, or several of them in a list or a "
    "container"
)


class SeveralOptimizers(torch.optim.Optimizer):
    """The part of an optimizer that the controller needs, over several optimizers. It is never stepped itself.

    A step is a round in which each of them steps once: hooks before the step run before the first of a round, hooks after the step after
    the last. Groups are numbered consecutively, in the order of the optimizers.

    Args:
        optimizers: The torch optimizers.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        # Not torch's constructor: it would create groups and hooks of its own.
        self.optimizers = tuple(optimizers)
        self.defaults: dict[str, Any] = {}
        self.found_inf: Tensor | None = None  # maximum over the round of the value that torch/amp/grad_scaler.py sets on a fused optimizer
        self.ignores: Callable[[torch.optim.Optimizer], bool] = lambda optimizer: False  # whether a step does not count
        self.incomplete: Callable[[], None] = lambda: None  # called if a round ended before all had stepped
        self._stepped: set[int] = set()  # in this round, by their number
        self._ignored: set[int] = set()
        self._before: list[Callable[..., Any]] = []
        self._after: list[Callable[..., Any]] = []
        self._handles: list[Any] = []
        for number, optimizer in enumerate(self.optimizers):
            begins, ends = partial(self._begins, number), partial(self._ends, number)
            self._handles += [optimizer.register_step_pre_hook(begins), optimizer.register_step_post_hook(ends)]
            optimizer.smartfrz_several = self  # type: ignore[attr-defined]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all optimizers, in order."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """The state of all optimizers, read-only: writes to this dict are lost."""
        return {param: entries for optimizer in self.optimizers for param, entries in optimizer.state.items()}

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> Any:
        """Register a hook with torch's signature, to be called once per round, before it."""
        return _Entry(self._before, hook)

    def register_step_post_hook(self, hook: Callable[..., Any]) -> Any:
        """Register a hook with torch's signature, to be called once per round, after it."""
        return _Entry(self._after, hook)

    def register_load_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> Any:
        """Register a hook with torch's signature, to be called with each optimizer that loads."""
        return _Handles([optimizer.register_load_state_dict_pre_hook(hook, prepend) for optimizer in self.optimizers])

    def let_go(self) -> None:
        """Remove all hooks and attributes from the optimizers."""
        _Handles(self._handles).remove()
        for optimizer in self.optimizers:
            vars(optimizer).pop("smartfrz_several", None)

    def _begins(self, number: int, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.ignores(optimizer):
            self._ignored.add(number)
            return
        if number in self._stepped:  # a GradScaler has skipped another optimizer, or they take turns
            self._stepped.clear()
            self.incomplete()
        if not self._stepped:
            self.found_inf = None
            for hook in list(self._before):
                hook(self, args, kwargs)

    def _ends(self, number: int, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if number in self._ignored:
            self._ignored.discard(number)
            return
        self._stepped.add(number)
        found = getattr(optimizer, "found_inf", None)
        if isinstance(found, Tensor):
            self.found_inf = found.clone() if self.found_inf is None else torch.maximum(self.found_inf, found.to(self.found_inf.device))
        if len(self._stepped) == len(self.optimizers):
            self._stepped.clear()
            for hook in list(self._after):
                hook(self, args, kwargs)


class _Entry:
    """A hook in a list of hooks."""

    def __init__(self, hooks: list[Callable[..., Any]], hook: Callable[..., Any]) -> None:
        self._hooks, self._hook = hooks, hook
        hooks.append(hook)

    def remove(self) -> None:
        if self._hook in self._hooks:
            self._hooks.remove(self._hook)


class _Handles:
    """Handles of hooks that are removed together."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def single(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    """Return the optimizers that hold groups and state: those of a SeveralOptimizers, else the optimizer itself."""
    return optimizer.optimizers if isinstance(optimizer, SeveralOptimizers) else (optimizer,)


def bare_optimizer(optimizer: object) -> torch.optim.Optimizer:
    """Return the torch optimizer inside wrappers such as Accelerate's; for a container or a list, its optimizers as one.

    Raises:
        ValueError: Not a torch optimizer, or one that freezing does not support.
    """
    found = _unwrapped(optimizer)
    _refuse_by_name(found)
    contents = _contents(found)
    if contents is None:
        if not isinstance(found, torch.optim.Optimizer):
            raise ValueError(f"attach_torch takes a torch optimizer, got {type(optimizer).__name__}. {_ALLOWED}")
        return found
    inner = [bare_optimizer(x) for x in contents]
    if any(isinstance(x, SeveralOptimizers) for x in inner):
        raise ValueError(f"attach_torch: got {type(found).__name__} with containers of optimizers in it. {_ALLOWED}")
    return inner[0] if len(inner) == 1 else _together(inner)


def _unwrapped(optimizer: object) -> object:
    found = optimizer
    while isinstance(inner := getattr(found, "optimizer", None), torch.optim.Optimizer):
        found = inner
    return found


def _contents(found: object) -> list[Any] | None:
    """Return the optimizers in a container or a list; None for a single one."""
    if isinstance(found, SeveralOptimizers):
        return None
    if isinstance(found, Mapping):
        found = list(found.values())
    if isinstance(found, list | tuple):
        if not found:
            raise ValueError(f"attach_torch: got an empty {type(found).__name__} of optimizers. {_ALLOWED}")
        return list(found)
    for name in _CONTENTS:
        held = getattr(found, name, None)
        held = list(held.values()) if isinstance(held, Mapping) else held
        if isinstance(held, list | tuple) and held and all(isinstance(_unwrapped(x), torch.optim.Optimizer) for x in held):
            return list(held)
    return None


def _together(inner: list[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    if len({id(x) for x in inner}) < len(inner):
        raise ValueError("attach_torch: the same optimizer is in the container twice")
    known = [getattr(x, "smartfrz_several", None) for x in inner]
    if known[0] is not None and all(x is known[0] for x in known) and len(known[0].optimizers) == len(inner):
        return known[0]  # a second attach_torch of the same optimizers
    if any(x is not None or hasattr(own, "smartfrz") for x, own in zip(known, inner, strict=True)):
        raise ValueError(
            "attach_torch: some of these optimizers have a controller already; allowed: controller.detach() first, or the same container "
            "again"
        )
    params = [p for x in inner for group in x.param_groups for p in group["params"]]
    if len(set(params)) < len(params):
        raise ValueError("attach_torch: two optimizers of the container hold the same parameter; allowed: one optimizer for each")
    return SeveralOptimizers(inner)


def _refuse_by_name(found: object) -> None:
    name = type(found).__name__
    why = ""
    if isinstance(found, torch.optim.LBFGS):
        why = "evaluates the loss several times a step, and keeps one state for all weights"
    elif isinstance(found, ZeroRedundancyOptimizer):
        why = "spreads its state over the ranks; FSDP2 (fully_shard) does that and freezes"
    elif name == "_NamedOptimizer":  # torch/distributed/optim/named_optimizer.py
        why = "numbers its parameters once; give attach_torch the torch optimizer that it was made of, and make the plain one step"
    elif "inbackward" in name.lower() or "layerwisedummy" in name.lower():
        why = "steps its parameters during backward; set early_step_in_backward (or its like) off"
    elif hasattr(found, "_per_group_state_lists"):  # distributed_shampoo
        why = "holds its parameters and their state in lists of its own, beside the groups"
    if why:
        raise ValueError(f"smartfrz_ds does not work with {name}: it {why}. Allowed: an optimizer such as AdamW or SGD")


def refuse_in_backward(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer of parameters that are stepped in backward.

    Raises:
        ValueError: Some parameter is.

    Source: torch/distributed/optim/apply_optimizer_in_backward.py.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if any(hasattr(p, "_in_backward_optimizers") for p in params):
        raise ValueError(
            "smartfrz_ds does not work with an optimizer that runs in backward (_apply_optimizer_in_backward); allowed: optimizer.step() "
            "after backward"
        )


def refuse_step_within_backward() -> None:
    """Refuse a step that backward itself has called.

    Raises:
        ValueError: A backward is running.

    Source: torch/_C/_autograd (the current graph task is -1 outside of backward).
    """
    if torch._C._current_graph_task_id() != -1:
        raise ValueError(
            "smartfrz_ds does not work with an optimizer that is stepped within backward (by a hook of a gradient); allowed: "
            "optimizer.step() after backward"
        )
