"""`smartfrz doctor`, fourth part: the verdicts on the installed versions of DeepSpeed and torch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.config.versions import TESTED, untested

from .findings import Finding

_LATER = "smartfrz doctor [CONFIG.json] --self-check runs it now; otherwise the start of a run does, once"


def check_verdicts(raw: Mapping[str, Any] | None, settings: FreezeConfig | None, *, run: bool) -> list[Finding]:
    """Return the verdicts on the installed versions: tested, self-checked, or refused.

    Args:
        raw: A DeepSpeed config, for its kind of engine; None: all ZeRO stages.
        settings: Its settings of this package.
        run: Whether to run self-checks, of tested versions too. Without it, only those in the cache are told.
    """
    import deepspeed
    import torch

    from smartfrz_ds.integrations.selfcheck.case import Case, of_config, of_wrapper

    settings = FreezeConfig() if settings is None else settings
    device = torch.accelerator.current_accelerator() if torch.accelerator.device_count() else None
    on = "cpu" if device is None else device.type
    cases = [Case("deepspeed", stage=s) for s in range(4)] if raw is None else [of_config(raw, frozen=settings.zero3.frozen, device=on)]
    versions = {"deepspeed": deepspeed.__version__, "torch": torch.__version__}
    library = Path(deepspeed.__file__).parent / "runtime"
    found = []
    if (text := untested(**versions)) is None:
        found.append(Finding("deepspeed", "ok", f"DeepSpeed {deepspeed.__version__}: tested"))
        text = f"DeepSpeed {deepspeed.__version__} is a tested version"
        found += _checked("deepspeed", text, cases, versions, library) if run else []
    else:
        wanted = [f"'{package}{TESTED[package]}'" for package in versions if untested(**{package: versions[package]})]
        answer = f"pip install {' '.join(wanted)} is a tested version"
        found += _untested("deepspeed", text, answer, cases, versions, library, settings, run=run)
    if (text := untested(torch=torch.__version__)) is not None:  # DDP and FSDP do without DeepSpeed, and have verdicts of their own
        answer = f"pip install 'torch{TESTED['torch']}' is a tested version"
        wrappers: list[Any] = [of_wrapper(kind, frozen=settings.fsdp.frozen, device=on) for kind in ("ddp", "fsdp2", "fsdp1")]
        found += _untested("torch", text, answer, wrappers, {"torch": torch.__version__}, None, settings, run=run)
    return found


def _untested(
    check: str,
    text: str,
    answer: str,
    cases: Iterable[Any],
    versions: Mapping[str, str],
    library: Path | None,
    settings: FreezeConfig,
    *,
    run: bool,
) -> list[Finding]:
    """Return the findings on an untested version, by the setting `untested_versions`."""
    if settings.untested_versions == "refuse":
        return [Finding(check, "problem", f'{text} and is refused at start: smartfrz.untested_versions is "refuse"', answer)]
    if settings.untested_versions == "allow":
        return [Finding(check, "warning", f'{text} and is used unchecked: smartfrz.untested_versions is "allow"', answer)]
    return _checked(check, text, cases, versions, library, run=run, answer=answer)


def _checked(
    check: str,
    text: str,
    cases: Iterable[Any],
    versions: Mapping[str, str],
    library: Path | None,
    *,
    run: bool = True,
    answer: str = "",
) -> list[Finding]:
    from smartfrz_ds.integrations.selfcheck.judge import known, self_check

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    found, waiting = [], []
    for case in cases:
        verdict = self_check(text, case, versions, library, say=say) if run else known(case, versions, library, say)
        if verdict is None:
            waiting.append(str(case))
        elif verdict.kind == "refused":
            found.append(Finding(check, "problem", verdict.text, answer or "report it: the version is a tested one"))
        else:
            found.append(Finding(check, "warning" if answer else "ok", verdict.text, answer))
    if waiting:
        found.append(Finding(check, "warning", f"{text}, and was not checked here yet ({'; '.join(waiting)})", f"{_LATER}; {answer}"))
    return found
