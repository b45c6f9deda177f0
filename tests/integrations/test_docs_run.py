"""The Python blocks of README.md and docs/ that need DeepSpeed run as they stand, on two ranks. The others: tests/unit/test_docs.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import run_worker


@pytest.mark.distributed(2)
def test_blocks_that_need_deepspeed_run(tmp_path: Path) -> None:
    run_worker("docs", {}, tmp_path / "run")
    output = (tmp_path / "run" / "output.txt").read_text()
    for page in ("readme", "adding_to_a_script", "checkpoints", "huggingface"):
        assert output.count(f"{page} done") == 2
