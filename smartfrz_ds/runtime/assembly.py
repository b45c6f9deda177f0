"""Making the parts of a run, and the one list of its observers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from smartfrz_ds.backends.base import Backend
from smartfrz_ds.config.settings import FreezeConfig, digest
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.model.activation_checkpointing import RecomputeBoundary
from smartfrz_ds.model.flops import FlopTally
from smartfrz_ds.model.forward_mode import ForwardMode
from smartfrz_ds.model.freeze_modules import check_tied
from smartfrz_ds.model.run_state import RunState
from smartfrz_ds.runtime.observers.adapters import (
    EngineLayout,
    FlagWatch,
    FlopCount,
    GradientWatch,
    KeptState,
    OrderWatch,
    RecomputeWatch,
    Recording,
    StatusLines,
)
from smartfrz_ds.runtime.observers.guard import GuardedRun
from smartfrz_ds.runtime.observers.kept_frozen import KeptFrozen
from smartfrz_ds.runtime.observers.metric_means import MetricMeans
from smartfrz_ds.runtime.observers.prefix_cache import CacheWatch
from smartfrz_ds.runtime.observers.protocol import StepObserver
from smartfrz_ds.runtime.observers.readers import Readers
from smartfrz_ds.runtime.rules.kept_active import find_kept_active
from smartfrz_ds.runtime.rules.user_frozen import UserFrozen
from smartfrz_ds.signals.history import History
from smartfrz_ds.signals.lr_forecast import current_lr, total_steps_of
from smartfrz_ds.signals.snapshots import Snapshots

from .changes.freezer import Freezer
from .changes.pauses import Pauses
from .changes.stage_moves import StageMoves
from .freeze_state import FreezeState
from .freezing_stage import FreezingStages
from .journal import Journal
from .policy_stage import PolicyStage
from .run_context import RunContext


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of one run.

    Attributes:
        run: The shared state.
        users: Layers that the user froze.
        kept_active: Layers that `keep_active` names.
        policy: The policy and its inputs.
        freezer: Changes the frozen set.
        stages: Holds the freezing stages.
        freeze_state: Saves and loads the freeze state.
        kept: Keeps frozen parameters frozen.
        tally: Counts FLOPs.
        recording: Takes snapshots.
        guard: Undoes mistaken freezes, None where not configured.
        moves: Moves layers between pipeline stages, None without a pipeline.
        cache: Skips the forward of frozen layers, None where it is switched off.
        readers: Waits for other readers of the engine's memory; has the user's callbacks.
        observers: All observers, in the order of their work.
    """

    run: RunContext
    users: UserFrozen
    kept_active: frozenset[str]
    policy: PolicyStage
    freezer: Freezer
    stages: FreezingStages
    freeze_state: FreezeState
    kept: KeptFrozen
    tally: FlopTally
    recording: Recording
    guard: GuardedRun | None
    moves: StageMoves | None
    cache: CacheWatch | None
    readers: Readers
    observers: Sequence[StepObserver]


def assemble(
    model: nn.Module,
    backend: Backend,
    config: FreezeConfig,
    *,
    scheduler: Any,
    monitor: Any,
    probe_batch: Any,
    version: str,
    defer_policy: bool,
) -> Parts:
    """Create the parts of a run. Collective. The order in this function is the order in which they hook the model.

    Args:
        model: As in `Controller`.
        backend: As in `Controller`.
        config: As in `Controller`.
        scheduler: As in `Controller`.
        monitor: As in `Controller`.
        probe_batch: As in `Controller`.
        version: As in `Controller`.
        defer_policy: As in `Controller`.

    Raises:
        ValueError: The settings do not fit the model or the engine.
        RanksDisagree: The ranks differ in settings, package version or layers.
    """
    layers = backend.find_layers(model, config.layers)
    check_tied(layers, config.tied)
    users = UserFrozen(model, layers, backend)
    run = RunContext(
        config=config,
        model=model,
        layers=layers,
        backend=backend,
        ranks=Collectives(backend.device),
        state=RunState(tuple(layer.name for layer in layers)),
        total_steps=total_steps_of(scheduler) if config.total_steps == "auto" else config.total_steps,
    )
    run.time.watch_device(backend.device)
    kept_active = find_kept_active(run)
    snapshots, history = Snapshots(layers, backend, sample_size=config.sample_size, seed=config.seed), History(config.window)
    tally = FlopTally(layers)
    waits_for: tuple[str, ...] = config.schedule.metrics if config.policy == "schedule" else ()
    if config.policy == "attention" and config.attention.mode == "budget":
        waits_for = ("loss",)
    means = MetricMeans(run, waits_for) if waits_for else None
    policy = PolicyStage(
        run,
        snapshots,
        history,
        tally,
        kept_active=kept_active,
        users=users,
        metrics=means,
        scheduler=scheduler,
        probe_batch=probe_batch,
        deferred=defer_policy,
    )
    run.ranks.assert_same(f"settings {digest(config)}, package {version}, layers {run.names}", "settings, package versions or layers")
    policy.try_probe()
    run.journal = Journal(run, layers, monitor=monitor, saved=lambda: tally.saved_fraction)
    status = StatusLines(run, tally)
    # It compares in the first forward, then removes its hooks. A pipeline's order is its list of layers; "any" asks for none.
    order = None if backend.is_pipeline or config.order == "any" else OrderWatch(run)
    flops = FlopCount(run, tally, lambda: flags.cost)
    mode = ForwardMode(model, run.time)
    gradients = GradientWatch(run, policy, mode)
    # In a pipeline the schedule keeps the boundary open, and reentrant checkpointing is refused.
    boundary = RecomputeBoundary(() if backend.is_pipeline else layers, on_late=gradients.check_late, mode=mode, time=run.time)
    kept = KeptFrozen(backend.forward_module(model), backend)
    flags = FlagWatch(run, kept)
    guard = None if config.guard is None else GuardedRun(run, config.guard, lambda mistake: stages.take_back(mistake))
    recording = Recording(run, policy, snapshots, history)
    observers: list[StepObserver] = []
    pauses = Pauses(run)
    freezer = Freezer(run, users, pauses, observers, kept.restore_flags)
    stages = FreezingStages(run, policy, freezer, observers)
    pipeline = backend.pipeline(run.ranks, config.pipeline, config.tied)
    moves = None if pipeline is None else StageMoves(run, pipeline, freezer, pauses)
    readers = Readers(run)
    cache = None if config.cache.mode == "off" else CacheWatch(run, boundary, kept.restore_flags)

    # The order of the work before and after a step, in a change of the layout and at the end of freezing.
    ordered: list[StepObserver | None] = [
        status,  # after a step: takes the time first; its line is the last thing of all (step_ended)
        run.journal,  # after a step: the run has trained
        order,
        RecomputeWatch(boundary),  # layout: the boundary moves behind the frozen prefix
        flags,  # after a step: flags that other code has set; layout: hooks on frozen parameters
        EngineLayout(run),  # layout: the schedule of a pipeline, prefetching
        flops,  # after a step: measures and counts
        gradients,  # before a step: may raise, before anything else is done; layout: arms; step_ended: arms for recorded steps
        policy,  # before a step: learning rates of layers; after it: gradient sums
        means,  # after a step: the metrics that a policy waits for
        guard,  # after a step: may thaw; layout: watches a freeze
        KeptState(run),  # after a step: drops released state that is too old
        recording,  # after a step: the snapshot, which the freezing stage that follows sees
        cache,  # layout: the prefix is another one; after a step: does it pay?
        moves,  # layout: the stages are looked at again, after the freezing stage
        readers,  # before a change: other code that reads what it touches; after it: the user's callbacks, last of all
    ]
    observers.extend(observer for observer in ordered if observer is not None)
    run.state.lr = current_lr(backend.base_optimizer())
    return Parts(
        run=run,
        users=users,
        kept_active=kept_active,
        policy=policy,
        freezer=freezer,
        stages=stages,
        freeze_state=FreezeState(run, users, freezer, policy, moves, observers),
        kept=kept,
        tally=tally,
        recording=recording,
        guard=guard,
        moves=moves,
        cache=cache,
        readers=readers,
        observers=observers,
    )
