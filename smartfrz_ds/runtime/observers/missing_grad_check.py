"""After a freeze: does every active parameter still get a gradient?

A graph that was cut by mistake raises nothing: DeepSpeed fills missing gradients with zeros, and momentum and weight decay go on moving the
weights. So the first step after each freeze is looked at before the optimizer takes it. A parameter that this batch does not use gets no
gradient either, and that is no mistake; `GraphEvidence` tells the two apart.
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

from .graph_evidence import GraphEvidence

RECORDED = 3  # steps after the start that are recorded
PATIENCE = 10  # checks in a row, for a model in which gradients come and go; and steps in which an unused parameter is waited for

Doubt = Literal["raise", "warn", "off"]


class GradientCheck:
    """Compares the step after a freeze with recorded steps before it.

    model: the model; names: parameter -> its name in it. ranks: of the run; one small reduction a check, nothing else is communicated.
    everywhere: the names of the parameters of all ranks, where each has only a part of the model (a pipeline); the same on every rank.
    doubt: the setting `gradient_check`. warn: says a sentence to the user.

    Recorded are the first `RECORDED` steps and every step that ends in a freezing stage; a step counts with all its micro-batches.
    A parameter is *regular* if it got a gradient in every recorded step, on every rank. Missing is a regular active parameter that, in the
    checked step, gets a gradient on no rank. Of those,
      - what no rank's forward has used is unused: no verdict, and the check goes on in later steps until it was used once;
      - what ran, and is upstream of a module that got gradients though nothing that went into it requires grad, was cut off: an error;
      - what ran otherwise is in doubt: a task's head whose loss this batch doesn't take, most likely. A warning, once.
    Where a recorded step had seen gradients come and go (layers dropped at random, routing), the same must be seen in `PATIENCE` checks in
    a row.
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
    ) -> None:
        self._names = names
        self._everywhere = list(names.values() if everywhere is None else everywhere)
        self._ranks = ranks
        self._evidence = GraphEvidence(model, mode)
        self._doubt, self._warn = doubt, warn
        self._warned = False
        self._armed = False
        self._got: set[Parameter] = set()
        self._seen: dict[Parameter, int] = {}
        self._records = 0
        self._handles: list[RemovableHandle] = []
        self._checking = False
        self._rounds: dict[str, int] = {}
        self._unused = 0  # checks in which nothing was wrong but something unused; 0: nothing is waited for

    def arm(self, active: Sequence[Parameter], *, check: bool) -> None:
        """Watch the coming step; at a step boundary. check: compare it, else only record it."""
        self._unused = 0
        self._arm(active, check=check)

    def _arm(self, active: Sequence[Parameter], *, check: bool) -> None:
        self.disarm()
        self._checking = check
        if self._doubt == "off" or (check and self._records == 0):
            return  # frozen before the first step: there is nothing to compare with
        self._armed = True
        watched = [p for p in active if p.requires_grad]
        self._handles = [p.register_post_accumulate_grad_hook(self._note) for p in watched]
        self._evidence.start(watched, record=not check)

    def record_start(self, active: Callable[[], Sequence[Parameter]], *, stage_follows: bool) -> None:
        """Arm for the steps that are recorded; called at each step boundary."""
        if not self._armed and (stage_follows or self._records < RECORDED):
            self._arm(active(), check=bool(self._unused))

    def moved(self, model: Module, names: Mapping[Parameter, str], active: Sequence[Parameter]) -> None:
        """Other parameters live on this rank now: nothing is known yet of those that came. A check that was on goes on."""
        checks = self._armed and self._checking
        self.disarm()
        self._names = names
        self._evidence.take(model)
        self._seen = {p: n for p, n in self._seen.items() if p in names}
        if checks:
            self._arm(active, check=True)

    def forget(self, params: Sequence[Parameter]) -> None:
        """Parameters that train again after a thaw: what is known of them is old."""
        for param in params:
            self._seen.pop(param, None)

    def saw(self, params: Iterable[Parameter]) -> None:
        """Note parameters that have a gradient without a hook that says so."""
        if self._armed:
            self._got.update(params)

    def runs(self, module: Module) -> None:
        """Note a module that is about to run, which the check began too late to see."""
        if self._armed:
            self._evidence.runs(module)

    def before_step(self, active_now: Callable[[], Sequence[Parameter]], layers: Sequence[str]) -> None:
        """To be called when all micro-batches of a step are through, before the optimizer. Collective while a check is on.

        layers: what was frozen, for the message.

        Raises:
            MissingGradients: on all ranks, with the names.
        """
        if not self._armed:
            return
        # What the user has switched off meanwhile is not meant to get a gradient.
        active, got, checking = [p for p in active_now() if p.requires_grad], set(self._got), self._checking
        self.disarm()
        if not checking:
            self._record(got, active)
            return
        live, own = set(active), {name: p for p, name in self._names.items()}
        here = [own.get(name) for name in self._everywhere]  # None: another rank's, which this one leaves to it
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
        self._record(got | missing, active)  # a missing one stays regular: it will be asked for again
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
                f"{text}No step was taken with this. If the loss simply does not use them in this batch, set smartfrz.gradient_check to "
                "'warn' or 'off'"
            )
        if not self._warned:
            self._warned = True
            self._warn(
                f"{text}Training goes on: this is right if the loss does not use them in this batch, and no sign of a cut graph was found. "
                "It is said once; smartfrz.gradient_check 'raise' makes it an error, 'off' turns the check off"
            )

    def _record(self, got: set[Parameter], active: Sequence[Parameter]) -> None:
        self._records += 1
        for param in active:
            # A parameter that joins later (thawed) counts from where it joins.
            before = self._seen.get(param, self._records - 1)
            self._seen[param] = before + (param in got)

    def _note(self, param: Tensor) -> None:
        self._got.add(param)  # type: ignore[arg-type]

    def disarm(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._evidence.stop()
        self._got.clear()
        self._armed = False


def _cut_text(layers: Sequence[str], names: Sequence[str]) -> str:
    return (
        f"after freezing {list(layers)}, {len(names)} active parameters got no gradient on any rank, though they did before: "
        f"{_listed(names)}. No step was taken with this: they were used in the forward, but the way from the loss to them is cut. "
        "A usual cause is reentrant activation checkpointing that began after the freeze, or whose regions have changed since the start: "
        "give each layer a region of its own, or use use_reentrant=False"
    )


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:20])}{', …' if len(names) > 20 else ''}"
