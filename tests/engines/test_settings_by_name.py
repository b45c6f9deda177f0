"""Single settings by name, the same in each way in: they take precedence over the config, and a misspelt one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import run_worker


@pytest.mark.distributed(1)
def test_settings_by_name(tmp_path: Path) -> None:
    found = json.loads((run_worker("settings_by_name", {}, tmp_path, ranks=1) / "found.json").read_text())
    assert list(found) == ["initialize", "attach", "attach_torch", "prepare"]
    for way, got in found.items():
        assert got["settings"] == [3, 9, 7, {}], way  # the policy manual has no settings
        assert "smartfrz.polcy" in got["refused"] and "policy" in got["refused"], (way, got)
