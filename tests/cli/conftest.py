"""The runs of `smartfrz bench policies` that several modules read: made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench_runs import command, write_files


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write_files(tmp_path)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of the whole command on a real engine, and what it returned."""
    folder = tmp_path_factory.mktemp("made")
    return folder / "out", command(write_files(folder), folder / "out")
