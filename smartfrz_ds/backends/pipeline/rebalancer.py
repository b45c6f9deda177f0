"""Decides which layers move to other pipeline stages after a freeze: measured costs, one simulated step, the best cut.

Rank 0 decides, based on the measurements of all ranks in training; the bounds are broadcast.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import nn

from smartfrz_ds.backends.cost import Bandwidths
from smartfrz_ds.backends.memory import MemoryNeed
from smartfrz_ds.backends.transaction import Transaction
from smartfrz_ds.config.sections import PipelineSettings
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.planner import Cluster, DoesNotFit, LayerCost, Link, best_cut, simulate
from smartfrz_ds.planner.simulate import are_bounds
from smartfrz_ds.planner.width import Width, better_width

from .parcels import EntryBytes
from .protocol import Pipeline, StageMove
from .timing import EntryTimes

if TYPE_CHECKING:
    from .stage import PipelineStage


class Rebalancer(Pipeline):
    """The rebalancer of one pipeline. All methods are collective, in the same order on every rank.

    Entries are timed in every step only where layers may move by themselves (`rebalance: "on_freeze"`). Otherwise they are timed after a
    change of the layout, or after `rebalance()` of the user, until the costs are known.
    """

    def __init__(self, backend: PipelineStage, ranks: Collectives, settings: PipelineSettings) -> None:
        self._backend, self._ranks, self._settings = backend, ranks, settings
        self._known: dict[int, EntryTimes] = {}
        self._weights: dict[int, tuple[int, int]] = {}  # of each entry: elements that train while it is active, bytes
        self._rates = (0.0, 0.0)  # of an active weight: seconds of its update, bytes of gradient and optimizer state
        self._built: dict[int, nn.Module] = {}  # of the move that was checked last
        self.first_bounds = self.bounds  # as the user's PipelineModule was cut
        self._due = self._always = False
        if settings.rebalance == "on_freeze" and backend.can_move:
            self.measure()

    @property
    def due(self) -> bool:
        """Whether the layout has changed since the last `decide`, so that a move, or fewer stages, may be worth it."""
        return self._due

    @due.setter
    def due(self, value: bool) -> None:
        self._look_for(moves=self._always, wanted=value)

    def _look_for(self, *, moves: bool, wanted: bool) -> None:
        """Set `due`, and time the entries while it is set. moves: whether layers may move; else only fewer stages may be worth it."""
        self._due = wanted and self._backend.can_move and (moves or self._backend.can_be_reshaped)
        if self._due:
            self._backend.time_entries()
        elif not self._always:
            self._backend.stop_timing()

    def measure(self) -> None:
        """Time the entries from now on, until `remove`."""
        self._always = True
        self._backend.time_entries()

    @property
    def bounds(self) -> tuple[int, ...]:
        """Current bounds of the stages, (stages + 1,)."""
        return tuple(self._backend.partition() or ())

    def remove(self) -> None:
        """Remove all hooks."""
        self._backend.stop_timing()

    def decide(self, bandwidths: Bandwidths, *, moves: bool) -> tuple[StageMove | None, Width | None]:
        """Decide whether moving layers is worth it. If some costs are not measured yet, the decision stays due.

        Args:
            bandwidths: Measured bandwidths.
            moves: Whether layers may move.

        Returns:
            The best move, and a number of stages and replicas that would be faster still; None where there is none.
        """
        costs = self.costs()
        told = b""
        if self._ranks.rank == 0 and costs is not None:
            width = None
            try:
                move = self._choose(costs) if moves else None
                if self._backend.can_be_reshaped:
                    width = self._wider(costs, move.bounds if move else self.bounds, bandwidths)
            except Exception as error:  # the others wait for an answer
                move = StageMove(bounds=self.bounds, gain=1.0, problem=f"the layers stay where they are: {type(error).__name__}: {error}")
            told = json.dumps([move and asdict(move), width and asdict(width)]).encode()
        told = self._ranks.broadcast_bytes(told)
        self._look_for(moves=moves, wanted=not told)
        move, width = json.loads(told) if told else (None, None)
        return move and StageMove(**_tuple_of(move, "bounds")), width and Width(**_tuple_of(width, "parts"))

    def check(self, bounds: Sequence[int]) -> None:
        """Check that the stages can get these bounds now. Changes nothing.

        Raises:
            ValueError: The bounds are not possible. Raised on every rank.
            RuntimeError: Not at this time. Raised on every rank.
        """
        options = self._ranks.gather_objects(self._backend.group_options())
        structures = {int(i): told for part in self._ranks.gather_objects(self._backend.structure()) for i, told in part.items()}

        def prepare() -> dict[int, nn.Module]:
            if any(own != options[0] for own in options):
                raise ValueError(
                    "the stages' optimizers have parameter groups of different settings; allowed where layers move: the same everywhere"
                )
            return self._backend.prepare(bounds, structures)

        self._built = self._ranks.run_on_all_ranks(prepare)

    def memory_need(self, bounds: Sequence[int]) -> MemoryNeed:
        """Return the peak memory of a move to these bounds above the level before it, on this rank. Collective; changes nothing."""
        told = self._ranks.gather_objects(self._backend.moving())
        each = max(rate for _, rate in told)
        moving = {i: EntryBytes(weights, round(each * elements)) for entries, _ in told for i, (weights, elements) in entries.items()}
        if not are_bounds(bounds, len(self.bounds) - 1, self.bounds[-1]):
            return MemoryNeed()  # `check` refuses them
        return self._backend.memory_of_move(bounds, moving)

    def move(self, bounds: Sequence[int], tx: Transaction) -> int:
        """Move layers to these bounds, after `check`, within a transaction.

        Returns:
            The bytes that this rank sent.
        """
        built, self._built = self._built, {}
        return self._backend.rebalance(bounds, built, tx)

    def gain(self, bounds: Sequence[int]) -> float:
        """Return the predicted speed-up of a step with these bounds; 1 if costs are unknown."""
        costs = self.costs()
        if costs is None:
            return 1.0
        return self._seconds(costs, self.bounds) / max(self._seconds(costs, bounds), 1e-12)

    def costs(self) -> list[LayerCost] | None:
        """Return the measured seconds and bytes of each entry of the list, the same on every rank; None: not enough was measured.

        A backward that was never measured counts as twice the forward.
        """
        backend = self._backend
        clock, pipe = backend.clock, backend.engine.module
        own = backend.entry_weights()
        active = sum(elements for index, (elements, _) in own.items() if index in backend.computed[0])
        told = self._ranks.gather_objects(
            {
                "times": {} if clock is None else {index: asdict(times) for index, times in clock.times().items()},
                "weights": own,
                "update": None if clock is None else clock.update_seconds,
                "held": 0.0 if not active else (backend.optimizer_bytes() + backend.gradient_bytes()) / active,
            }
        )
        for index in {index for t in told for index in t["times"]}:
            self._merge(index, [EntryTimes(**t["times"][index]) for t in told if index in t["times"]])
        self._weights = {index: tuple(w) for t in told for index, w in t["weights"].items()}
        updates = [t["update"] for t in told if t["update"] is not None]
        # If a freeze has just emptied a stage, its earlier measurements come from the others.
        self._rates = (fmean(updates) if updates else self._rates[0], max([t["held"] for t in told] + [self._rates[1]]))
        entries = range(len(pipe._layer_specs))
        if any(index not in self._known or self._known[index].forward is None for index in entries):
            return None
        return [self._cost(index) for index in entries]

    def _merge(self, index: int, seen: Sequence[EntryTimes]) -> None:
        """Merge the measurements of the replicas of one entry; values that none has measured stay as they were."""
        known = self._known.setdefault(index, EntryTimes())
        if forwards := [t.forward for t in seen if t.forward is not None]:
            known.forward = fmean(forwards)
        for kind in {kind for t in seen for kind in t.backward}:
            known.backward[kind] = fmean([t.backward[kind] for t in seen if kind in t.backward])
        for t in seen:
            # A frozen entry keeps nothing; the bytes that it would keep were measured while it was active.
            known.kept_bytes = t.kept_bytes or known.kept_bytes
            known.output_bytes = t.output_bytes or known.output_bytes

    def _cost(self, index: int) -> LayerCost:
        known = self._known[index]
        forward, elements = known.forward or 0.0, self._weights.get(index, (0, 0))[0]
        of_both, of_weight, of_input = (known.backward.get(kind) for kind in ("both", "weight", "input"))
        if of_both is None and of_weight is not None:
            of_both = 2 * of_weight
        if of_both is None:
            of_both = 2 * forward if of_input is None or index in self._backend.computed[0] else of_input
        if of_weight is None:
            of_weight = of_both / 2 if elements else 0.0
        return LayerCost(
            forward=forward,
            backward_input=max(0.0, of_both - of_weight),
            backward_weight=of_weight,
            optimizer=self._rates[0] * elements,
            weights=elements,
            output_bytes=known.output_bytes or 0,
            activation_bytes=known.kept_bytes or 0,
        )

    def _choose(self, costs: Sequence[LayerCost]) -> StageMove | None:
        """Return the best move, on rank 0; None if there is none."""
        now, first = self.bounds, self._backend.first_entry
        active = self._backend.computed[0]
        memory = [self._weights.get(i, (0, 0))[1] + (c.weights * self._rates[1] if i in active else 0.0) for i, c in enumerate(costs)]
        kept = [float(c.activation_bytes) if i >= first else 0.0 for i, c in enumerate(costs)]
        limit = self._settings.memory_bytes
        backend = self._backend
        try:
            best = best_cut(
                self._thinned(costs),
                len(now) - 1,
                backend.engine.micro_batches,
                first,
                memory if limit is not None else None,
                limit,
                activations_per_layer=kept if limit is not None else None,
                current=now,
                pinned=backend.pinned,
            )
            gain = self._seconds(costs, now) / max(self._seconds(costs, best), 1e-12)
        except DoesNotFit as error:
            return StageMove(bounds=now, gain=1.0, problem=f"smartfrz.pipeline.{error}: the layers stay where they are")
        if tuple(best) == now or gain < self._settings.min_gain:
            return None
        return StageMove(bounds=tuple(best), gain=gain)

    def _wider(self, costs: Sequence[LayerCost], bounds: Sequence[int], bandwidths: Bandwidths) -> Width | None:
        """Return, on rank 0, fewer stages with more replicas, if that is worth it. Links are as fast as the measured exchanges."""
        engine, first = self._backend.engine, self._backend.first_entry
        width = next((p.element_size() for p in engine.module.parameters()), 4)
        link = Link(latency=bandwidths.latency, bandwidth=bandwidths.network)
        cluster = Cluster(
            zero=engine.zero_optimization_stage(),
            between_stages=link,
            between_replicas=link,
            gradient_bytes=width,
            weight_bytes=width,
            state_bytes=12 if width < 4 else 8,  # fp32 has no master weights of its own
        )
        return better_width(
            self._thinned(costs),
            len(self.bounds) - 1,
            engine.grid.get_data_parallel_world_size(),
            engine.micro_batches,
            first,
            current=bounds,
            start=self.first_bounds,
            cluster=cluster,
            memory_limit=self._settings.memory_bytes,
            min_gain=self._settings.min_gain,
        )

    def _seconds(self, costs: Sequence[LayerCost], bounds: Sequence[int]) -> float:
        backend = self._backend
        return simulate(self._thinned(costs), bounds, backend.engine.micro_batches, backend.first_entry).makespan

    def _thinned(self, costs: Sequence[LayerCost]) -> list[LayerCost]:
        """Return the costs for the simulator: a frozen entry behind the first active one has no gradients of weights."""
        active, first = self._backend.computed[0], self._backend.first_entry
        none = {"backward_weight": 0.0, "optimizer": 0.0, "weights": 0, "activation_bytes": 0}
        return [c if i in active or i < first else LayerCost(**(asdict(c) | none)) for i, c in enumerate(costs)]


def _tuple_of(fields: dict[str, Any], key: str) -> dict[str, Any]:
    return fields | {key: tuple(fields[key])}  # JSON knows lists only
