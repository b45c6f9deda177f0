"""The verdict on a version for one engine: asked of the tested versions, the user, the cache, and last the self-check."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import smartfrz_ds
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.distributed.failures import shortest_timeout
from smartfrz_ds.telemetry.voice import LOGGER, make_audible

from . import start, verdict
from .case import Case
from .verdict import Verdict

Untested = Literal["check", "allow", "refuse"]


def judge(
    ranks: Collectives,
    untested: str | None,
    case: Callable[[], Case],
    setting: Untested,
    *,
    versions: Mapping[str, str],
    library: Path | None,
) -> Verdict:
    """Judge the installed versions for an engine. Collective if they are untested.

    Args:
        ranks: The collectives of all ranks.
        untested: What is untested, in words; None for a tested version.
        case: Returns the kind of engine; called on rank 0.
        setting: `smartfrz.untested_versions`.
        versions: The installed versions, by package.
        library: Folder of the library's code that the verdict depends on; None: only on its version.

    Returns:
        The verdict, the same on every rank.

    Raises:
        ValueError: The version is refused. Raised on every rank.
    """
    if untested is None:
        return Verdict("tested")
    if setting == "allow":
        return Verdict("allowed", f'{untested}; continuing unchecked because smartfrz.untested_versions is "allow"')
    if setting == "refuse":
        raise ValueError(f'{untested}. Install a tested one, or set smartfrz.untested_versions to "check" to have this one checked')

    def on_rank_0() -> dict[str, object]:
        make_audible()
        limit = shortest_timeout()
        return self_check(untested, case(), versions, library, limit=None if limit is None else 0.8 * limit).to_json()

    found = Verdict.from_json(ranks.from_rank0(on_rank_0))
    if found.kind == "refused":
        raise ValueError(found.text)
    return found


def self_check(
    untested: str,
    case: Case,
    versions: Mapping[str, str],
    library: Path | None,
    *,
    limit: float | None = None,
    say: Callable[[str], None] | None = None,
) -> Verdict:
    """Return the verdict of the cache or of a self-check, which takes some seconds. Not collective.

    Args:
        untested: What is untested, in words.
        case: The kind of engine.
        versions: As in `judge`.
        library: As in `judge`.
        limit: Longest duration in seconds, if the default is too long.
        say: Takes a line of progress. Default: the log.
    """
    say = say or (lambda line: LOGGER.log(logging.INFO, "smartfrz: %s", line))
    if (before := known(case, versions, library, say)) is not None:
        say(f"self-check of {_named(versions)} ({case}): {before.kind}, from the cache")
        return before
    say(f"{untested}: checking it with a toy model ({case}) in processes of its own, once for these versions …")
    seconds = min(float(os.environ.get("SMARTFRZ_SELFCHECK_SECONDS", start.SECONDS)), limit if limit is not None else float("inf"))
    began = time.monotonic()
    ended = start.run(case, seconds)
    took = time.monotonic() - began
    found = _verdict(untested, case, ended, took)
    say(f"self-check of {_named(versions)} ({case}): {found.kind} after {took:.0f} s")
    if found.complete:
        verdict.write(_key(case, versions, library), found, say)
    return found


def known(case: Case, versions: Mapping[str, str], library: Path | None, say: Callable[[str], None]) -> Verdict | None:
    """Return the verdict that the cache has, if any. Arguments as in `self_check`."""
    return verdict.read(_key(case, versions, library), say)


def _key(case: Case, versions: Mapping[str, str], library: Path | None) -> str:
    return verdict.key_of(case, versions, [Path(smartfrz_ds.__file__).parent, *([library] if library is not None else [])])


def _verdict(untested: str, case: Case, ended: start.Ended, seconds: float) -> Verdict:
    if ended.wrong == []:
        text = (
            f"{untested}. A self-check of it passed: with a toy model ({case}), freeze, step, thaw, save and load did what plain torch does"
        )
        if case.unchecked:
            text += f". Not checked: {'; '.join(case.unchecked)}"
        return Verdict("self-checked", text, seconds)
    what = (
        f"failed with {case}: {'; '.join(ended.wrong)}" if ended.wrong is not None else f"with {case} did not come to its end: {ended.why}"
    )
    text = (
        f"{untested}, and its self-check {what}. Install a tested version, use another option, or set smartfrz.untested_versions to "
        '"allow" to train with it all the same'
    )
    return Verdict("refused", text, seconds, complete=ended.wrong is not None)


def _named(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())
