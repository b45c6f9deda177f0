"""The log lines of a run: one for each event, on rank 0, through the logger "smartfrz_ds".

By default Python shows only warnings. Where the user has not configured logging, this package adds a handler of its own: when a controller
is created, never at import. It is removed as soon as the user configures logging.
"""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

from .events import WEIGHTS_ONLY, FreezeEvent
from .words import duration, layer_names, size, some

LOGGER = logging.getLogger("smartfrz_ds")
_FORMAT = "[%(asctime)s] [%(levelname)s] %(message)s"
_ENDING: WeakSet[Any] = WeakSet()


class _Handler(logging.Handler):
    """Writes to the current sys.stderr, as the last-resort handler of `logging` does."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


_OWN = _Handler()
_OWN.setFormatter(logging.Formatter(_FORMAT))


def make_audible() -> None:
    """Show the lines where the user has not configured logging; otherwise leave them to the user's handlers and levels."""
    root = logging.getLogger()
    ours = _OWN in LOGGER.handlers
    if root.handlers or not LOGGER.propagate or any(handler is not _OWN for handler in LOGGER.handlers):
        if ours:  # configured in the meantime: with both handlers each line would appear twice
            LOGGER.removeHandler(_OWN)
            if LOGGER.level == _Level.set_to:
                LOGGER.setLevel(logging.NOTSET)
            _Level.set_to = None
        return
    if not ours:
        LOGGER.addHandler(_OWN)
    if LOGGER.level == logging.NOTSET and root.level == logging.WARNING:  # the user chose no level
        LOGGER.setLevel(logging.INFO)
        _Level.set_to = logging.INFO


class _Level:
    set_to: int | None = None  # the level that this module has set


class Voice:
    """The log lines of one controller.

    Args:
        speaks: Whether this rank writes lines: rank 0 only.
    """

    def __init__(self, speaks: bool) -> None:
        self._speaks = speaks
        if speaks:
            make_audible()

    def say(self, text: str, *, level: int = logging.INFO) -> None:
        """Log one line, on the rank that speaks.

        Args:
            text: The line, without the prefix "smartfrz: ".
            level: Level of the logging module.
        """
        if self._speaks:
            make_audible()
            LOGGER.log(level, "smartfrz: %s", text)

    def at_exit(self, owner: Any) -> None:
        """Call `owner.end()` when the interpreter exits, if the owner still exists."""
        if self._speaks:
            if not _ENDING:
                atexit.unregister(_end_all)
                atexit.register(_end_all)
            _ENDING.add(owner)


def _end_all() -> None:
    for owner in list(_ENDING):
        owner.end()


# --- texts -----------------------------------------------------------------------------------------------------------------------


def start_text(
    *,
    engine: str,
    ranks: int,
    policy: str,
    layers: Sequence[str],
    own: int,
    length: str,
    total_steps: int | None,
    first_stage: int | None,
    log: str,
    dry_run: bool,
) -> str:
    """Return the first line of a run.

    Args:
        engine: Name of the backend.
        ranks: Number of ranks.
        policy: Name of the policy.
        layers: Names of all layers, front to back.
        own: Number of layers that the user froze or that have no weights.
        length: Length of the run as text, with its source.
        total_steps: Length of the run in steps; None where unknown.
        first_stage: Step of the first freezing stage; None where no policy decides.
        log: Location of the log, as text.
        dry_run: Whether the run only records decisions.
    """
    found = f"{some(len(layers), 'layer')} ({layers[0]} … {layers[-1]}" + (f"; {own} without trainable weights)" if own else ")")
    if first_stage is None:
        stage = "no freezing stages: layers change only through freeze() and thaw()"
    elif total_steps is not None and first_stage >= total_steps:
        stage = f"the run ends before the first freezing stage, step {first_stage:,}"
    else:
        stage = f"first freezing stage at step {first_stage:,}"
    mode = ", dry run: decisions only, nothing is frozen" if dry_run else ""
    return f"on ({engine}, {some(ranks, 'rank')}); policy {policy}{mode}; {found}; {length}; {stage}; {log}"


def event_text(event: FreezeEvent, order: Sequence[str], *, policy: str | None) -> str:
    """Return the line of an event; "" for warnings, which are logged elsewhere, and for decisions that change nothing.

    Args:
        event: The event.
        order: All layers, front to back.
        policy: Name of the policy that decided; None where the user called freeze() or thaw().
    """
    at = f"step {event.step:,}"
    now = f"{len(event.frozen)} of {some(len(order), 'layer')} frozen"
    if event.kind in ("freeze", "thaw"):
        did = "froze" if event.kind == "freeze" else "thawed"
        moved = (
            f"released {size(event.bytes_released_total)}"
            if event.bytes_released_total >= 0
            else f"allocated {size(-event.bytes_released_total)}"
        )
        expected = f", predicted {duration(event.predicted_seconds)}" if event.predicted_seconds else ""
        return (
            f"{at}: {did} {layer_names(event.layers, order)} ({_reason(event, order, policy)}); {now}; {moved} of optimizer state over all "
            f"ranks, pause {duration(event.seconds)}{expected}"
        )
    if event.kind == "decision" and event.dry_run and event.layers:
        return f"{at}: dry run, would freeze {layer_names(event.layers, order)} ({_reason(event, order, policy)})"
    if event.kind == "rebalance":
        return f"{at}: {event.message}: a step is predicted to be {event.gain:.2f} times as fast; pause {duration(event.seconds)}"
    if event.kind == "cache":
        return f"{at}: prefix cache: {event.message}"
    if event.kind == "undone":
        return f"{at}: {event.message}; {now}, training goes on"
    if event.kind == "load":
        if event.message.endswith(WEIGHTS_ONLY):
            return f"step {event.from_step:,}: loaded the weights of {event.message.removesuffix(WEIGHTS_ONLY)}; {now}"
        changed = f" (changed: {layer_names(event.layers, order)})" if event.layers else ""
        return f"step {event.from_step:,}: moved to step {event.step:,} by {event.message}; {now}{changed}"
    return ""


def _reason(event: FreezeEvent, order: Sequence[str], policy: str | None) -> str:
    reasons: dict[str, list[str]] = {}
    for name in event.layers:
        if event.reasons.get(name):
            reasons.setdefault(event.reasons[name], []).append(name)
    told = list(reasons.items())
    if len(told) == 1:
        text = told[0][0]
    else:
        text = "; ".join(f"{layer_names(names, order)}: {reason}" for reason, names in told[:2]) + ("; …" if len(told) > 2 else "")
    if text.startswith("guard:"):
        return text
    if policy is None:
        return "manual"
    sure = [event.probabilities[name] for name in event.layers if name in event.probabilities]
    if not text and sure:
        text = f"probability {min(sure):.3f}" + (f" to {max(sure):.3f}" if max(sure) > min(sure) else "")
    return f"policy {policy}: {text}" if text else f"policy {policy}"
