"""The settings that count steps, as numbers: shares such as "10%" take the length of the run. And what follows: when a run can freeze.

Pure functions of the settings and the length of the run (`total_steps`, None: unknown).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smartfrz_ds.config.schedule import with_steps
from smartfrz_ds.config.settings import SECTION, FreezeConfig, is_default
from smartfrz_ds.config.shares import percent_of, steps_of
from smartfrz_ds.predictor.constants import MIN_SNAPSHOTS

from .replay import replayed

# The defaults if the length of the run is unknown: about the values of the default shares in a run of 1250 steps.
_WITHOUT_LENGTH = {"warmup_steps": 100, "freeze_interval": 50, "snapshot_interval": 10}
# A policy's own settings that count steps.
_POLICY_STEPS = ("start_step", "end_step", "interval")


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """The settings of a run that count steps, as numbers of steps. Created with `resolve`.

    Attributes:
        warmup_steps: >= 0.
        snapshot_interval: >= 1, <= freeze_interval.
        freeze_interval: >= 1.
        status_interval: >= 1.
        keep_state: >= 0.
        guard_window: >= 0; 0 without a guard.
        policy: All settings of the chosen policy, as keyword arguments.
        planned: The length of the run if the policy plans with it instead of with steps that the user set, else None.
    """

    warmup_steps: int
    snapshot_interval: int
    freeze_interval: int
    status_interval: int
    keep_state: int
    guard_window: int
    policy: Mapping[str, Any]
    planned: int | None = None

    def is_stage(self, step: int, total_steps: int | None) -> bool:
        """Whether a step ends in a freezing stage. The last step of a run does not: no work is left to save."""
        return step != total_steps and step % self.freeze_interval == 0 and step >= self.warmup_steps

    def first_from(self, step: int) -> int:
        """Return the first step >= `step`, the warm-up over, that ends in a freezing stage, however long the run is."""
        step = max(step, self.warmup_steps, 1)
        return -(-step // self.freeze_interval) * self.freeze_interval

    @property
    def spacing(self) -> dict[str, Any]:
        """The intervals on which a checkpoint depends: "measured" for snapshots and gradients, "policy" for the policy's state."""
        steps = {key: self.policy[key] for key in _POLICY_STEPS if key in self.policy}
        return {"measured": [self.snapshot_interval, self.freeze_interval], "policy": steps | {"planned": self.planned}}


def resolve(config: FreezeConfig, total_steps: int | None, *, provisional: bool = False) -> Intervals:
    """Resolve the settings that count steps, for a run of this length.

    Shares are rounded to whole steps, an interval to at least one. Where a share, or a default, does not fit beside the other interval it
    is raised (`freeze_interval`) or lowered (`snapshot_interval`) to it. Where the length is unknown, the defaults of `warmup_steps`,
    `freeze_interval` and `snapshot_interval` are 100, 50 and 10 steps; with the policy `manual`, which does not use them, any share is.

    Args:
        config: The settings.
        total_steps: The length of the run; None: unknown.
        provisional: Whether shares may be unknown for now: the length of the run will be set later, or nothing will freeze.

    Raises:
        ValueError: A setting is a share, and the length of the run is unknown; lists all of them with key and value.
    """
    problems: list[str] = []

    def number(key: str, value: int | str, unknown: int | None = None) -> int:
        if isinstance(value, int):
            return value
        percent = percent_of(value)
        assert percent is not None, value  # checked by the settings
        if total_steps is not None or percent == 0:
            return steps_of(percent, total_steps or 0)
        if unknown is None and not provisional:
            problems.append(
                f"{SECTION}.{key}: got '{value}', and the length of the run is unknown; allowed: an integer here, or one at "
                f"{SECTION}.total_steps"
            )
        return unknown or 1

    def default(key: str) -> int | None:
        """Return the default in steps of the three settings that are shares by default."""
        return _WITHOUT_LENGTH[key] if is_default(config, key) or config.policy == "manual" else None

    warmup = number("warmup_steps", config.warmup_steps, default("warmup_steps"))
    freeze = number("freeze_interval", config.freeze_interval, default("freeze_interval"))
    snapshot = number("snapshot_interval", config.snapshot_interval, default("snapshot_interval"))
    if snapshot > freeze:
        if isinstance(config.freeze_interval, int) or (
            is_default(config, "snapshot_interval") and not is_default(config, "freeze_interval")
        ):
            snapshot = freeze
        else:
            freeze = snapshot
    status = freeze if config.status_interval is None else number("status_interval", config.status_interval)
    keep = number("keep_state", config.keep_state)
    watch = 0 if config.guard is None else number("guard.window", config.guard.window)
    policy = dict(config.chosen_settings)
    if config.policy == "schedule":
        policy["phases"], wrong = with_steps(replayed(config.schedule), total_steps, provisional=provisional)
        problems += wrong
    shares: set[str] = set() if config.is_own_policy else {key for key in _POLICY_STEPS if isinstance(policy.get(key), str)}
    for key in shares:
        policy[key] = number(f"{config.policy}.{key}", policy[key])
    start, end = policy.get("start_step"), policy.get("end_step")
    if "end_step" in shares and start is not None and end is not None and end <= start and (start == 0 or "start_step" in shares):
        policy["end_step"] = start + 1  # a short run, in which both round to the same step
    if problems:
        raise ValueError("\n".join(problems))
    return Intervals(
        warmup_steps=warmup,
        snapshot_interval=snapshot,
        freeze_interval=freeze,
        status_interval=status,
        keep_state=keep,
        guard_window=watch,
        policy=policy,
        planned=total_steps if not config.is_own_policy and any(policy.get(key, 0) is None for key in _POLICY_STEPS) else None,
    )


def first_stage(config: FreezeConfig, total_steps: int | None) -> int | None:
    """Return the step of the first freezing stage.

    Returns:
        None with the policy `manual`, with `enabled` false, and if the run ends before.

    Raises:
        ValueError: As `resolve`.
    """
    if not config.enabled or config.policy == "manual":
        return None
    now = resolve(config, total_steps, provisional=config.policy == "schedule" and total_steps is None)
    if config.policy == "schedule":
        return first_phase(now)
    first = now.first_from(1)
    return first if total_steps is None or first < total_steps else None


def first_phase(now: Intervals) -> int:
    """Return the step of the first phase of the policy `schedule`, or the first stage if that phase waits for a plateau."""
    begins = [phase.begin for phase in now.policy["phases"][:1]]
    return begins[0] if begins and isinstance(begins[0], int) else now.first_from(1)


def needs_length(config: FreezeConfig) -> bool:
    """Return whether the chosen policy, with these settings, can't work in a run of unknown length."""
    if config.policy == "attention":
        return config.attention.mode == "budget"
    if config.policy == "schedule":
        return any(phase.epoch or percent_of(phase.begin) for phase in config.schedule.phases)
    return config.policy == "freezeout" or any(config.chosen_settings.get(key, 0) is None for key in _POLICY_STEPS)


def why_never(config: FreezeConfig, total_steps: int | None) -> str:
    """Explain why no policy can freeze anything in this run, whatever the layers do, and what to set.

    Returns:
        "" if a policy can freeze, or if none is configured.

    Raises:
        ValueError: As `resolve`.
    """
    if not config.enabled or config.policy in ("manual", "schedule"):  # `resolve` refuses a phase after the end of the run
        return ""
    if config.policy == "attention" and config.window < MIN_SNAPSHOTS:
        return (
            f"the policy 'attention' judges from {MIN_SNAPSHOTS} snapshots on, and {SECTION}.window keeps {config.window}: nothing will "
            f"freeze. Set {SECTION}.window to {MIN_SNAPSHOTS} or more"
        )
    if total_steps is None:
        return ""
    now = resolve(config, total_steps)
    first = now.first_from(1)
    if first >= total_steps:
        return (
            f"the first freezing stage is step {first}, and the run ends at {total_steps}: nothing will freeze. Set {_smaller(config, now)}"
        )
    needed, why = _first_decision(config, now, total_steps)
    if needed >= total_steps:
        return f"{why}, and the run ends at {total_steps}: nothing will freeze. Set {_remedy(config, now)}"
    return ""


def _first_decision(config: FreezeConfig, now: Intervals, total_steps: int) -> tuple[int, str]:
    """Return the first stage at which the policy may name a layer, and the reason in words."""
    if config.policy == "attention":
        stages = config.attention.patience if config.attention.mode == "auto" else 1
        step = now.first_from(MIN_SNAPSHOTS * now.snapshot_interval) + (stages - 1) * now.freeze_interval
        return step, (
            f"the policy 'attention' can freeze at step {step} at the earliest ({MIN_SNAPSHOTS} snapshots, one every "
            f"{now.snapshot_interval} steps, and {stages} freezing stage{'s' * (stages != 1)}, one every {now.freeze_interval})"
        )
    if config.policy == "autofreeze":
        step = now.first_from(1) + now.freeze_interval
        return step, f"the policy 'autofreeze' can freeze at its second stage, step {step}, at the earliest"
    if config.is_own_policy:
        return now.first_from(1), ""
    start = now.policy.get("interval") if config.policy == "pipetransformer" else now.policy.get("start_step")
    if start is None and config.policy in ("late", "weight_drift", "band"):
        start = int(now.policy["share"] * total_steps)
    step = now.first_from(start or 1)
    return (
        step,
        f"the policy {config.policy!r} can freeze at step {step} at the earliest, as its own settings begin at {start or 1}",
    )


def _smaller(config: FreezeConfig, now: Intervals) -> str:
    """Name the settings to change where warm-up and stages leave no room."""
    keys = [
        f"{SECTION}.{key} (now {getattr(now, key)}) to less, or to '{FreezeConfig.model_fields[key].default}' of the run, its default"
        for key in ("warmup_steps", "freeze_interval")
        if not is_default(config, key)
    ]
    return ", and ".join(keys) or "the run to more steps"


def _remedy(config: FreezeConfig, now: Intervals) -> str:
    if config.policy == "autofreeze":
        return _smaller(config, now)
    if config.policy != "attention":
        key = "interval" if config.policy == "pipetransformer" else "start_step"
        return f"{SECTION}.{config.policy}.{key} to an earlier step, or to a share of the run such as '50%'"
    smaller = [
        f"{SECTION}.{key} (now {getattr(now, key)}) to less"
        for key in ("snapshot_interval", "freeze_interval", "warmup_steps")
        if getattr(now, key) > 1
    ]
    return ", ".join(smaller) or "the run to more steps"
