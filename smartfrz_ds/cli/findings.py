"""What the doctor found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """check: what was looked at. level: "problem": a run fails or hangs; "warning": it may, or something is lost. text: what was found.
    answer: what to do; empty where there is nothing to do."""

    check: str
    level: Level
    text: str
    answer: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)
