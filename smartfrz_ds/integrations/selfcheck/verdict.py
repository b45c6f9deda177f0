"""The verdicts on a version, and their cache on disk."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from smartfrz_ds._version import __version__

from .case import Case

Kind = Literal["tested", "self-checked", "allowed", "refused"]


@dataclass(frozen=True)
class Verdict:
    """The verdict on the installed versions, for one kind of engine.

    Attributes:
        kind: "tested"; "self-checked"; "allowed": not checked, as the user wished; "refused".
        text: What was found, for a warning or an error; "" for a tested version.
        seconds: Duration of the self-check; 0 without one.
        cached: Whether it comes from the cache.
        complete: Whether the self-check came to its end, so that its result may be cached.
    """

    kind: Kind
    text: str = ""
    seconds: float = 0.0
    cached: bool = False
    complete: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return JSON data, for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Verdict:
        """Rebuild from the output of `to_json`."""
        return cls(**data)


def cache_folder() -> Path:
    """Return the folder of the cache: SMARTFRZ_CACHE_DIR, else smartfrz_ds in XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("SMARTFRZ_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smartfrz_ds"


def key_of(case: Case, versions: Mapping[str, str], sources: Iterable[Path]) -> str:
    """Return the name of a verdict in the cache: a digest of everything that decides it.

    Args:
        case: The kind of engine.
        versions: Versions by the name of the package.
        sources: Folders whose Python files count: this package's, and DeepSpeed's runtime.
    """
    about = {"case": case.to_json(), "versions": dict(versions), "own": __version__, "python": sys.version}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for folder in sources:
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


def read(key: str, say: Callable[[str], None]) -> Verdict | None:
    """Return a cached verdict; None if there is none that can be read. say: takes a line about a file that is damaged."""
    path = _path(key)
    try:
        data = json.loads(path.read_text())
        found = Verdict.from_json({**data["verdict"], "cached": True})
        if data["key"] != key or found.kind not in ("self-checked", "refused") or not found.text:
            raise ValueError("not a verdict")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        say(f"the cached self-check {path} cannot be used ({type(error).__name__}: {error}); it is run again")
        return None
    return found


def write(key: str, verdict: Verdict, say: Callable[[str], None]) -> None:
    """Store a verdict, in one piece. say: takes a line if that fails."""
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"key": key, "verdict": verdict.to_json()}))
        part.replace(path)
    except OSError as error:
        say(f"the self-check's result cannot be stored ({error}), so the next start runs it again; SMARTFRZ_CACHE_DIR names another folder")


def _path(key: str) -> Path:
    return cache_folder() / f"selfcheck-{key}.json"
