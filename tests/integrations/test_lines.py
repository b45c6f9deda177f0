"""The lines of a run on two ranks, under the real launcher: the last ones come at the end of the process. See worker_voice.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import TESTS, launch


@pytest.mark.distributed(2)
def test_lines_of_a_deepspeed_run(tmp_path: Path) -> None:
    """One rank speaks, each line comes once, and they tell what the log tells."""
    output = launch(TESTS / "workers" / "worker_voice.py", str(tmp_path)).stdout
    log = tmp_path / "log.jsonl"
    lines = [line.partition("smartfrz: ")[2] for line in output.splitlines() if "[INFO] smartfrz: " in line]
    told = [re.sub(r"(released|allocated) [\d.]+ kB|pause [\d.]+ m?s|predicted [\d.e-]+ m?s", r"\1 …", line) for line in lines]
    first = (
        "on (ZeRO-2, 2 ranks); policy linear; 7 layers (embeddings … head); 12 steps (scheduler WarmupDecayLR); first freezing stage at "
        f"step 2; log {log}"
    )
    froze = ["step 2: froze embeddings (policy linear", "step 4: froze blocks.0 (policy linear"]
    end = "froze embeddings at step 2, blocks.0 at step 4"
    expected = [
        first,
        *froze,
        "step 6: thawed blocks.0 (manual); 1 of 7 layers frozen; allocated …",
        "on (ZeRO-2, 2 ranks); policy manual; 7 layers (embeddings … head); 3 steps (smartfrz.total_steps); no freezing stages: layers "
        f"change only through freeze() and thaw(); log {tmp_path / 'log.2.jsonl'} (another engine of this process writes to {log})",
        f"step 7: moved to step 6 by checkpoint {tmp_path / 'saves' / '6'}; 2 of 7 layers frozen (changed: blocks.0)",
        f"end at step 6 of 12: {end}; 1 thaw; 2 of 7 layers frozen now: embeddings, blocks.0; ",
        first,
        f"goes on at step 6 from checkpoint {tmp_path / 'saves' / '6'}; 2 of 7 layers frozen: embeddings, blocks.0",
        f"the log was cut back to the checkpoint; the part behind it is in {tmp_path / 'log.cut-6.jsonl'}",
    ]
    assert len(told) == len(expected) + 2, told
    for line, begin in zip(told, expected, strict=False):
        assert line.startswith(begin), (line, begin)
    last = sorted(told[len(expected) :])  # which of the two engines ends first is not said
    assert last[0] == "end at step 3 of 3: nothing was frozen: the policy is manual, and freeze() was not called"
    assert last[1].startswith(f"end at step 7 of 12: {end}; 2 of 7 layers frozen now")
