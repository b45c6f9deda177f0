"""After a freeze: does every active parameter still get a gradient?

A graph that was cut by mistake raises nothing: DeepSpeed fills missing gradients with zeros, and momentum and weight decay go on moving the
weights. So the first step after each freeze is looked at before the optimizer takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from .agree import Ranks

RECORDED = 3  # steps after the start that are recorded
PATIENCE = 10  # checks in a row, for a model in which gradients come and go


class MissingGradients(RuntimeError):
    """Active parameters got no gradient in the first step after a freeze. Raised on all ranks, before the optimizer's step."""


class GradientCheck:
    """Compares the step after a freeze with recorded steps before it.

    names: parameter -> its name in the model. ranks: of the run; one small reduction a check, nothing else is communicated.
    everywhere: the names of the parameters of all ranks, where each has only a part of the model (a pipeline); the same on every rank.

    Recorded are the first `RECORDED` steps and every step that ends in a freezing stage; a step counts with all its micro-batches.
    A parameter is *regular* if it got a gradient in every recorded step, on every rank. Missing is a regular active parameter that, in the
    checked step, gets a gradient on no rank. So weights that were never used, and those that are used now and then, never trip the check.
    Where a recorded step had seen gradients come and go (layers dropped at random, routing), a whole regular layer may be left out by
    chance: there the same parameter must be missing in `PATIENCE` checks in a row.
    """

    def __init__(self, names: Mapping[Parameter, str], ranks: Ranks, everywhere: Sequence[str] | None = None) -> None:
        self._names = names
        self._everywhere = list(names.values() if everywhere is None else everywhere)
        self._ranks = ranks
        self._armed = False
        self._got: set[Parameter] = set()
        self._seen: dict[Parameter, int] = {}
        self._records = 0
        self._handles: list[RemovableHandle] = []
        self._checking = False
        self._rounds: dict[str, int] = {}

    def arm(self, active: Sequence[Parameter], *, check: bool) -> None:
        """Watch the coming step; at a step boundary. check: compare it, else only record it."""
        self.disarm()
        self._checking = check
        if check and self._records == 0:
            return  # frozen before the first step: there is nothing to compare with
        self._armed = True
        self._handles = [p.register_post_accumulate_grad_hook(self._note) for p in active if p.requires_grad]

    def record_start(self, active: Callable[[], Sequence[Parameter]], *, stage_follows: bool) -> None:
        """Called at each step boundary: arms for the steps that are recorded."""
        if not self._armed and (stage_follows or self._records < RECORDED):
            self.arm(active(), check=False)

    def moved(self, names: Mapping[Parameter, str], active: Sequence[Parameter]) -> None:
        """Other parameters live on this rank now: nothing is known yet of those that came. A check that was on goes on."""
        checks = self._armed and self._checking
        self.disarm()
        self._names = names
        self._seen = {p: n for p, n in self._seen.items() if p in names}
        if checks:
            self.arm(active, check=True)

    def forget(self, params: Sequence[Parameter]) -> None:
        """Parameters that train again after a thaw: what is known of them is old."""
        for param in params:
            self._seen.pop(param, None)

    def saw(self, params: Iterable[Parameter]) -> None:
        """These have a gradient, whose hooks don't say so."""
        if self._armed:
            self._got.update(params)

    def before_step(self, active_now: Callable[[], Sequence[Parameter]], layers: Sequence[str]) -> None:
        """To be called when all micro-batches of a step are through, before the optimizer. Collective while a check is on.

        layers: what was frozen, for the message.

        Raises:
            MissingGradients: on all ranks, with the names.
        """
        if not self._armed:
            return
        active, got, checking = active_now(), set(self._got), self._checking
        self.disarm()
        if not checking:
            self._record(got, active)
            return
        live, own = set(active), {name: p for p, name in self._names.items()}
        here = [own.get(name) for name in self._everywhere]  # None: another rank's, which this one leaves to it
        irregular = any(0 < self._seen.get(p, 0) < self._records for p in live)
        regular = [float(p is None or (p in live and self._seen.get(p, 0) == self._records)) for p in here]
        told = self._ranks.least([*regular, *(float(p is None or p not in got) for p in here), float(not irregular)])
        pairs = zip(self._everywhere, told, told[len(here) :], strict=False)
        names = [name for name, known, absent in pairs if known and absent]
        missing = {own[name] for name in names if name in own}
        self._record(got | missing, active)  # a missing one stays regular: it will be asked for again
        self._rounds = {name: self._rounds.get(name, 0) + 1 for name in names}
        patience = 1 if told[-1] else PATIENCE
        if any(rounds >= patience for rounds in self._rounds.values()):
            raise MissingGradients(
                f"after freezing {list(layers)}, {len(names)} active parameters got no gradient on any rank, though they did before: "
                f"{', '.join(names[:20])}{', …' if len(names) > 20 else ''}. No step was taken with this. A usual cause is reentrant "
                "activation checkpointing that began after the freeze, or whose regions have changed since the start: give each layer a "
                "region of its own, or use use_reentrant=False"
            )
        if names:
            self.arm(active, check=True)

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
        self._got.clear()
        self._armed = False
