"""The phases of `smartfrz.schedule.from_log`: the freezes and thaws of an earlier run."""

from __future__ import annotations

from glob import escape
from pathlib import Path

from smartfrz_ds.config.schedule import PhaseSettings, ScheduleSettings
from smartfrz_ds.telemetry.events import FreezeEvent
from smartfrz_ds.telemetry.recorded_run import find_log, load_run


def replayed(settings: ScheduleSettings) -> ScheduleSettings:
    """Return the schedule with the phases of its log, if it names one.

    Raises:
        ValueError: The log is missing, damaged, or has no freeze.
    """
    if settings.from_log is None:
        return settings
    return settings.model_copy(update={"phases": phases_of_log(Path(settings.from_log), "smartfrz.schedule.from_log")})


def phases_of_log(log: Path, key: str) -> tuple[PhaseSettings, ...]:
    """Return one phase for each freeze and thaw of the last run in a log; of a dry run, for each decision.

    Args:
        log: The log, or the folder of its run. Steps that were undone by a return to a checkpoint are not in it.
        key: The setting or option that names it, for messages.

    Raises:
        ValueError: It is missing, damaged, or has no freeze.
    """
    try:
        run = load_run(find_log(log))
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: got '{log}', which is not a log of a run ({error}); allowed: the file that log_path names") from error
    decisions = [e for e in run.live if isinstance(e, FreezeEvent) and e.kind == "decision"] if run.dry else run.changes()
    phases = []
    for event in decisions:
        names = tuple(escape(name) for name in event.layers)
        back = event.kind == "thaw"
        if names:
            phases.append(PhaseSettings(begin=event.step, freeze=() if back else names, thaw=names if back else ()))
    if not phases:
        raise ValueError(f"{key}: got '{log}', in which nothing froze; allowed: the log of a run with at least one freeze")
    return tuple(phases)
