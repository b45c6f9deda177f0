"""What only a GPU shows. `./tests/run.sh --gpu` runs these and the exactness matrix (engines/test_exact.py) on the GPUs of this machine.

None of this has run on a GPU yet. The same checks run on CPUs in integrations/test_launchers.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import run_worker

CHECKS = [
    *(["zero", str(stage), "--dtype", dtype] for stage in range(4) for dtype in ("fp32", "bf16")),  # memory against memory_need
    *(["zero", str(stage), "--offload"] for stage in (1, 2, 3)),  # page-locked host memory
    ["fsdp2"],  # fused AdamW, compiled blocks, thaw with kept state
    ["8bit", "--dtype", "bf16"],
    ["pipeline"],  # the clock with events
]


def check(words: list[str], folder: Path, ranks: int) -> None:
    run_worker("gpu_check", [words], folder, ranks=ranks)
    (row,) = json.loads((folder / "rows.0.json").read_text())
    print(row)
    assert f"{ranks} x {torch.accelerator.current_accelerator()}" in row


@pytest.mark.gpu
@pytest.mark.distributed(1)
@pytest.mark.parametrize("words", CHECKS, ids=" ".join)
def test_on_one_gpu(words: list[str], tmp_path: Path) -> None:
    check(words, tmp_path, 1)


@pytest.mark.gpu
@pytest.mark.distributed(2)
def test_two_ranks_share_a_gpu_over_gloo(tmp_path: Path) -> None:
    if torch.accelerator.device_count() > 1:
        pytest.skip("two GPUs are here: test_on_two_gpus")
    check(["zero", "2"], tmp_path, 2)


@pytest.mark.multigpu(2)
@pytest.mark.distributed(2)
@pytest.mark.parametrize("words", CHECKS, ids=" ".join)
def test_on_two_gpus(words: list[str], tmp_path: Path) -> None:
    check(words, tmp_path, 2)
