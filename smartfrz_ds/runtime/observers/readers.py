"""Other code that reads the engine's memory when the layout changes: it is waited for, refused, or called afterwards."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from smartfrz_ds.backends.readers import count_graphs, graphed_modules, shared, wait_for_saves, watch_saves
from smartfrz_ds.backends.state_layout import state_tensors
from smartfrz_ds.runtime.run_context import RunContext

from .protocol import LayoutChange, StepObserver

Callback = Callable[[tuple[str, ...]], object]

_REMEDY = (
    "register a callback that {does}, controller.on_layout_change(fn), on the ranks concerned (an empty one, where the layers that freeze "
    "are not used there)"
)


class Readers(StepObserver):
    """Waits for saves that a change would disturb, refuses a change that would invalidate what others hold, calls the user's callbacks.

    Saves are those of `torch.distributed.checkpoint.async_save`. CUDA graphs, and weights that are shared with other processes, are refused
    until a callback is registered, which makes them anew.
    """

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._callbacks: OrderedDict[int, Callback] = OrderedDict()
        if not watch_saves():
            run.journal.warn(
                "saves of torch.distributed.checkpoint.async_save can't be seen in this version of torch: wait for their futures before a "
                "layer freezes"
            )

    def add(self, callback: Callback) -> RemovableHandle:
        """Call `callback` after each change.

        Returns:
            A handle with `remove()`.
        """
        handle = RemovableHandle(self._callbacks)
        self._callbacks[handle.id] = callback
        return handle

    def refusal(self, *, moves: bool = False) -> str:
        """Return why the layout can't change now; "" where it can.

        Args:
            moves: Whether layers move to other ranks.
        """
        if self._callbacks:
            return ""
        run = self._run
        found = []
        if modules := graphed_modules(run.model):
            found.append(f"modules are CUDA graphs (make_graphed_callables: {_some(modules)}): {_REMEDY.format(does='records them again')}")
        elif count := count_graphs():
            found.append(
                f"this process holds {count} CUDA graph{'s' * (count > 1)}, which would go on with the memory and the optimizer's step of "
                f"the previous layout: {_REMEDY.format(does='records them again')}"
            )
        if moves or run.backend.moves_weights:
            held = {p for group in run.backend.groups for p in group}
            weights = {name: p.data for name, p in run.model.named_parameters() if p in held}
            if names := shared(weights):
                found.append(f"weights are shared with other processes ({_some(names)}): {_REMEDY.format(does='sends them again')}")
        return "; ".join(found)

    def before_change(self, change: LayoutChange) -> None:
        if why := self.refusal(moves=change.kind == "move"):
            raise RuntimeError(f"{change.kind}: {why}")
        wait_for_saves(self._live, self._run.journal.note)

    def _live(self) -> Iterator[Tensor]:
        run = self._run
        yield from chain((run.backend.stored(p) for p in run.model.parameters()), run.model.buffers())
        yield from chain(run.backend.masters(), state_tensors(run.backend.base_optimizer().state))

    def after_change(self, change: LayoutChange) -> None:
        run, errors = self._run, []
        for callback in list(self._callbacks.values()):
            try:
                callback(run.frozen)
            except Exception as error:
                errors.append(error)
        if not run.ranks.all_reduce_sum([float(bool(errors))])[0]:
            return
        told = run.ranks.gather_objects([f"{type(error).__name__}: {error}" for error in errors])
        listed = "; ".join(f"rank {rank}: {text}" for rank, texts in enumerate(told) for text in texts)
        what = f"the {change.kind} at step {run.step}, which stays in force on every rank"
        raise RuntimeError(f"a callback of on_layout_change raised after {what}: {listed}") from (errors[0] if errors else None)


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
