"""What can be known of a run before it starts: the checks that the start, `smartfrz doctor` and `smartfrz check-config` share.

Imports torch only where the settings name a predictor's file or a policy's class.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from smartfrz_ds.config.settings import SECTION, FreezeConfig, is_default
from smartfrz_ds.telemetry.event_log import why_not_a_log

from .intervals import needs_length, resolve, why_never

SET_LENGTH = f"set scheduler.params.total_num_steps or {SECTION}.total_steps; a scheduler or Trainer in the script also sets it"


@dataclass(frozen=True)
class Problem:
    """Something that a user should know before the run.

    Attributes:
        text: What is wrong.
        remedy: What to do.
        certain: The run will stop at its start with this error. False: it starts, but does not do what is expected, or a script may still
            provide what is missing.
    """

    text: str
    remedy: str
    certain: bool = False


def problems_of_files(config: FreezeConfig) -> list[Problem]:
    """Check the files that the settings name: the predictor is one, the log can be written, and a policy's class is one (its module runs).

    Changes nothing on disk.
    """
    found = []
    if config.enabled and config.is_own_policy:
        from smartfrz_ds.policies import make_policy  # here: it needs torch

        try:
            make_policy(config.policy, config.policy_settings, config.policy_object)
        except ValueError as error:
            found.append(Problem(str(error), "docs/policies.md says what a policy of your own needs", certain=True))
    if config.enabled and config.policy == "attention" and config.attention.predictor is not None:
        from smartfrz_ds.predictor.model import load_predictor  # here: it needs torch

        try:
            load_predictor(config.attention.predictor)
        except ValueError as error:
            remedy = f"set {SECTION}.attention.predictor to a file of smartfrz train-predictor, or to null for the shipped predictor"
            found.append(Problem(str(error), remedy, certain=True))
    if config.enabled and config.log_path is not None and (why := why_not_a_log(Path(config.log_path))):
        found.append(Problem(why, "choose another path, or remove the file that is there", certain=True))
    return found


def problems_of_length(config: FreezeConfig, total_steps: int | None) -> list[Problem]:
    """Check that a policy can freeze something in a run of this length.

    Args:
        config: The settings.
        total_steps: The length of the run in steps; None: not known here.
    """
    if not config.enabled or config.policy == "manual":
        return []
    try:
        now = resolve(config, total_steps)
    except ValueError as error:
        return [Problem(line, SET_LENGTH) for line in str(error).splitlines()]
    if total_steps is None and needs_length(config):
        return [Problem(f"the JSON does not set the length of the run, which the policy {config.policy!r} needs", SET_LENGTH)]
    if why := why_never(config, total_steps):
        text, _, what = why.partition(". Set ")
        return [Problem(text, f"set {what}")]
    spaced = not is_default(config, "snapshot_interval") or not is_default(config, "window")
    span = (config.window - 1) * now.snapshot_interval
    if total_steps and spaced and config.policy == "attention" and span > total_steps / 2:
        text = f"a window of snapshots spans {span} steps, more than half of the run ({total_steps} steps)"
        return [Problem(text, "use a smaller snapshot_interval or window")]
    return []
