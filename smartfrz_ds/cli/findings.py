"""The result of one check of the doctor."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One result of a check.

    Attributes:
        check: Name of the check.
        level: "ok"; "warning": a run may fail, or something is lost; "problem": a run fails or hangs.
        text: The result.
        answer: What to do; "" where nothing needs to be done.
    """

    check: str
    level: Level
    text: str
    answer: str = ""

    def to_json(self) -> dict[str, str]:
        """Return a JSON-serializable dict."""
        return asdict(self)
