"""Shared set-up: tests run on one thread and on the accelerator of helpers.py, like their ranks. And what the markers mean."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import helpers

UNIT = Path(__file__).parent / "unit"


@pytest.hookimpl(tryfirst=True)  # before pytest selects by -m
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Mark the tests in unit/ that start no ranks, and skip those that need GPUs which are not there."""
    for item in items:
        if UNIT in item.path.parents and item.get_closest_marker("distributed") is None:
            item.add_marker(pytest.mark.unit)
        if needed := gpus_needed(item):
            import torch  # here: collecting the other tests does without

            found = 0 if helpers.ACCELERATOR == "cpu" else torch.accelerator.device_count()
            if found < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU{'s' * (needed > 1)}, found {found}"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    helpers.ranks_allowed = item.get_closest_marker("unit") is None


def gpus_needed(item: pytest.Item) -> int:
    """The number of GPUs that a test needs: 1 with `gpu`, n with `multigpu(n)`, else 0."""
    several = item.get_closest_marker("multigpu")
    if several is not None:
        return int(several.args[0])
    return int(item.get_closest_marker("gpu") is not None)
