"""Timeouts of process groups with one backend for each kind of device. A group of one process needs no other ranks.

Background: the timeout was looked up by the name of the group's backend, which is a list ("cpu:gloo,cuda:nccl") where a group has several.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from smartfrz_ds.distributed.failures import share_timeout

SHORT, OWN = timedelta(seconds=77), timedelta(seconds=5)


@pytest.fixture(params=["gloo", "cpu:gloo,cuda:gloo", "cpu:gloo"])
def groups(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    dist.init_process_group(request.param, init_method=f"file://{tmp_path}/store", rank=0, world_size=1, timeout=SHORT)
    yield {
        "same": dist.new_group(),
        "gloo": dist.new_group(backend="gloo"),
        "compound": dist.new_group(backend="cpu:gloo,cuda:gloo"),
        "own": dist.new_group(timeout=OWN),
        "compound own": dist.new_group(backend="cpu:gloo,cuda:gloo", timeout=OWN),
    }
    dist.destroy_process_group()


def timeouts(group: Any) -> set[timedelta]:
    return {group._get_backend(torch.device(kind)).options._timeout for kind in group._device_types}


def test_each_backend_takes_the_timeout_of_the_main_group_unless_it_has_its_own(groups: dict[str, Any]) -> None:
    assert timeouts(groups["compound"]) == timeouts(groups["gloo"]) == {timedelta(minutes=30)}, "torch passes it on by itself now"
    share_timeout()
    for name in ("same", "gloo", "compound"):
        assert timeouts(groups[name]) == {SHORT}, name
    for name in ("own", "compound own"):
        assert timeouts(groups[name]) == {OWN}, name
