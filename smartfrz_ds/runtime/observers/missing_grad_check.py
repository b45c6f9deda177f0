"""Checks after a freeze that every active parameter still gets a gradient.

A graph that was cut by mistake raises no error: DeepSpeed fills missing gradients with zeros, and momentum and weight decay keep moving the
weights. So the first step after each freeze is checked before the optimizer takes it. A parameter that this batch does not use gets no
gradient either, which is not a mistake; `GraphEvidence` distinguishes the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils.hooks import RemovableHandle

from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.errors import MissingGradients
from smartfrz_ds.model.forward_mode import ForwardMode
from smartfrz_ds.model.hooks import ModuleHook, PluginTime

from .graph_evidence import GraphEvidence

RECORDED = 3  # number of steps after the start that are recorded
PATIENCE = 10  # consecutive checks of a model in which gradients come and go; also steps to wait for an unused parameter

Doubt = Literal["raise", "warn", "off"]


class GradientCheck:
    """Compares the step after a freeze with recorded steps before it.

    The first `RECORDED` steps and every step that ends in a freezing stage are recorded, with all their micro-batches. A parameter
    is *regular* if it got a gradient in every recorded step, on every rank. It is *missing* if it is regular and active and, in the checked
    step, gets a gradient on no rank. A missing parameter
      - is unused if no rank's forward used it: no verdict, and the check continues in later steps until it was used once;
      - was cut off if it ran upstream of a module that got gradients although none of its inputs requires grad: an error;
      - is in doubt if it ran otherwise, probably in a task's head whose loss this batch does not use: a warning, once.
    If gradients came and went in recorded steps (layers dropped at random, routing), the same must be seen in `PATIENCE` checks in a row.

    Args:
        model: The model.
        names: Name of each parameter in the model.
        ranks: The collectives of all ranks. A check costs one small reduction.
        everywhere: Names of the parameters of all ranks if each has only a part of the model (a pipeline); the same on every rank.
        mode: The mode of the current forward.
        doubt: The setting `gradient_check`.
        warn: Shows a message to the user.
        time: Counts the seconds of the hooks, if given.

    Attributes:
        armed: Whether the current step is recorded or checked.
    """

    def __init__(
        self,
        model: Module,
        names: Mapping[Parameter, str],
        ranks: Collectives,
        everywhere: Sequence[str] | None = None,
        *,
        mode: ForwardMode,
        doubt: Doubt = "warn",
        warn: Callable[[str], None],
        time: PluginTime | None = None,
    ) -> None:
        self._names = names
        self._everywhere = list(names.values() if everywhere is None else everywhere)
        self._ranks = ranks
        self._evidence = GraphEvidence(model, mode, time)
        self._hook = ModuleHook(self._note, time)
        self._doubt, self._warn = doubt, warn
        self._warned = False
        self.armed = False
        self._got: set[Parameter] = set()
        self._seen: dict[Parameter, int] = {}
        self._records = 0
        self._handles: list[RemovableHandle] = []
        self._checking = False
        self._rounds: dict[str, int] = {}
        self._unused = 0  # number of checks in which the only finding was an unused parameter; 0: none is waited for

    def arm(self, active: Sequence[Parameter], *, check: bool) -> None:
        """Watch the coming step. Call at a step boundary.

        Args:
            active: Parameters that train.
            check: Whether to compare the step with recorded ones, or only to record it.
        """
        self._unused = 0
        self._arm(active, check=check)

    def _arm(self, active: Sequence[Parameter], *, check: bool) -> None:
        self.disarm()
        self._checking = check
        if self._doubt == "off" or (check and self._records == 0):
            return  # frozen before the first step: nothing to compare with
        self.armed = True
        watched = [p for p in active if p.requires_grad]
        self._handles = [p.register_post_accumulate_grad_hook(self._hook) for p in watched]
        self._evidence.start(watched, record=not check)

    def record_start(self, active: Callable[[], Sequence[Parameter]], *, stage_follows: bool) -> None:
        """Arm for the steps that are recorded; called at each step boundary."""
        if not self.armed and (stage_follows or self._records < RECORDED):
            self._arm(active(), check=bool(self._unused))

    def moved(self, model: Module, names: Mapping[Parameter, str], active: Sequence[Parameter]) -> None:
        """Follow a move of parameters between ranks: nothing is known about those that came. A running check continues."""
        checks = self.armed and self._checking
        self.disarm()
        self._names = names
        self._evidence.take(model)
        self._seen = {p: n for p, n in self._seen.items() if p in names}
        if checks:
            self._arm(active, check=True)

    def forget(self, params: Sequence[Parameter]) -> None:
        """Discard the records of parameters that train again after a thaw: they are out of date."""
        for param in params:
            self._seen.pop(param, None)

    def saw(self, params: Iterable[Parameter]) -> None:
        """Note parameters that got a gradient but run no hook."""
        if self.armed:
            self._got.update(params)

    def runs(self, module: Module) -> None:
        """Note a module that is about to run and that has no hook of this check."""
        if self.armed:
            self._evidence.runs(module)

    def before_step(self, active_now: Callable[[], Sequence[Parameter]], layers: Sequence[str]) -> None:
        """Check or record the step. Call after all its micro-batches, before the optimizer. Collective while a check is running.

        Args:
            active_now: Returns the parameters that train.
            layers: The layers that were frozen, for the message.

        Raises:
            MissingGradients: Parameters were cut off. Raised on all ranks, with their names.
        """
        if not self.armed:
            return
        # Parameters that the user has switched off since should not get a gradient.
        active, got, checking = [p for p in active_now() if p.requires_grad], set(self._got), self._checking
        self.disarm()
        if not checking:
            self._record(got, active)
            return
        live, own = set(active), {name: p for p, name in self._names.items()}
        here = [own.get(name) for name in self._everywhere]  # None: a parameter of another rank, which judges it
        irregular = any(0 < self._seen.get(p, 0) < self._records for p in live)
        absent = live - got
        cut = self._evidence.cut_off(absent, got)
        blind = self._evidence.blind and bool(got)
        told = self._ranks.all_reduce_min(
            [
                *(float(p is None or (p in live and self._seen.get(p, 0) == self._records)) for p in here),
                *(float(p is None or p not in got) for p in here),
                *(float(p is None or not (blind or self._evidence.ran(p))) for p in here),
                *(float(p is None or p not in cut) for p in here),
                float(not irregular),
            ]
        )
        columns = [told[i * len(here) : (i + 1) * len(here)] for i in range(4)]
        rows = [row for row in zip(self._everywhere, *columns, strict=True) if row[1] and row[2]]  # regular and without a gradient
        missing = {own[name] for name, *_ in rows if name in own}
        lost = [name for name, _, _, idle, whole in rows if not idle and not whole]
        doubtful = [name for name, _, _, idle, whole in rows if not idle and whole]
        unused = [name for name, _, _, idle, _ in rows if idle]
        self._record(got | missing, active)  # a missing one stays regular, so that it is checked again
        self._rounds = {name: self._rounds.get(name, 0) + 1 for name in (*lost, *doubtful)}
        patience = 1 if told[-1] else PATIENCE
        if any(self._rounds[name] >= patience for name in lost):
            raise MissingGradients(_cut_text(layers, [*lost, *doubtful]))
        ripe = [name for name in doubtful if self._rounds[name] >= patience]
        if ripe:
            self._tell_doubt(layers, ripe)
        again = bool(lost) or (bool(doubtful) and not ripe)
        if not again:
            self._unused = self._unused + 1 if unused else 0
        if again or 0 < self._unused < PATIENCE:
            self._arm(active, check=True)

    def _tell_doubt(self, layers: Sequence[str], names: Sequence[str]) -> None:
        text = (
            f"after freezing {list(layers)}, {len(names)} active parameters were used in a forward but got no gradient on any rank, though "
            f"they did before: {_listed(names)}. "
        )
        if self._doubt == "raise":
            raise MissingGradients(
                f"{text}The step was not taken. If the loss simply does not use them in this batch, set smartfrz.gradient_check to "
                "'warn' or 'off'"
            )
        if not self._warned:
            self._warned = True
            self._warn(
                f"{text}Training continues: this is correct if the loss does not use them in this batch, and the graph shows no cut. "
                "This warning appears once; smartfrz.gradient_check 'raise' makes it an error, 'off' turns the check off"
            )

    def _record(self, got: set[Parameter], active: Sequence[Parameter]) -> None:
        self._records += 1
        for param in active:
            # A parameter that joins later (thawed) counts from that step.
            before = self._seen.get(param, self._records - 1)
            self._seen[param] = before + (param in got)

    def _note(self, param: Tensor) -> None:
        self._got.add(param)  # type: ignore[arg-type]

    def disarm(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._evidence.stop()
        self._got.clear()
        self.armed = False


def _cut_text(layers: Sequence[str], names: Sequence[str]) -> str:
    return (
        f"after freezing {list(layers)}, {len(names)} active parameters got no gradient on any rank, though they did before: "
        f"{_listed(names)}. The step was not taken: they were used in the forward, but the graph from the loss to them is cut. "
        "A usual cause is reentrant activation checkpointing that began after the freeze, or whose regions have changed since the start: "
        "give each layer a region of its own, or use use_reentrant=False"
    )


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:20])}{', …' if len(names) > 20 else ''}"
