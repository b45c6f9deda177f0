"""Free memory as the kernel and its control groups tell it, what a change needs, and what happens where that is too much."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.ones import step
from reference.oracle import Net

import smartfrz_ds
from smartfrz_ds.backends import memory
from smartfrz_ds.backends.memory import FreeMemory, MemoryNeed, free_host_memory, is_worth_returning
from smartfrz_ds.errors import NotEnoughMemory
from smartfrz_ds.runtime.changes.memory_check import Place, short_devices, short_hosts

GIB = 2**30
MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\n"
STAT = "anon 5\ninactive_file {0}\ntotal_inactive_file {0}\nactive_file 7\n"


def host(root: Path, groups: str, files: Mapping[str, str], meminfo: str = MEMINFO) -> Path:
    """A folder that looks like / to free_host_memory. files: below sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    if meminfo:
        (root / "proc/meminfo").write_text(meminfo)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def v2(group: str, limit: str, used: int, cache: int) -> dict[str, str]:
    return {f"{group}memory.max": f"{limit}\n", f"{group}memory.current": f"{used}\n", f"{group}memory.stat": STAT.format(cache)}


def v1(group: str, limit: int, used: int, cache: int) -> dict[str, str]:
    files = {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{used}\n", "memory.stat": STAT.format(cache)}
    return {f"memory/{group}{name}": text for name, text in files.items()}


GROUPS: dict[str, tuple[str, dict[str, str], int]] = {
    "no limit": ("0::/\n", {}, 8 * GIB),
    "v2": ("0::/job\n", v2("job/", str(4 * GIB), 3 * GIB, GIB // 2), GIB + GIB // 2),
    "v2 without a limit of its own": ("0::/a/job\n", v2("a/job/", "max", 3 * GIB, 0) | v2("a/", str(6 * GIB), 4 * GIB, 0), 2 * GIB),
    "v2, the tighter of two": ("0::/a/job\n", v2("a/job/", str(5 * GIB), 4 * GIB, 0) | v2("a/", str(6 * GIB), GIB, 0), GIB),
    "v2, a container": ("0::/../../kubepods/pod\n", v2("", str(3 * GIB), GIB, 0), 2 * GIB),
    "v2, above its limit": ("0::/job\n", v2("job/", str(GIB), 2 * GIB, 0), 0),
    "v1": ("9:cpu:/\n4:cpuset,memory:/docker/x\n", v1("docker/x/", 4 * GIB, 3 * GIB, GIB), 2 * GIB),
    "v1, a container": ("4:memory:/docker/x\n", v1("", 4 * GIB, 3 * GIB, 0), GIB),
    "v1 without a limit": ("4:memory:/\n0::/\n", v1("", 2**63 - 4096, 3 * GIB, 0), 8 * GIB),
    "damaged": ("0::/job\n", v2("job/", "much", GIB, 0), 8 * GIB),
}


@pytest.mark.parametrize("name", GROUPS)
def test_free_host_memory(tmp_path: Path, name: str) -> None:
    groups, files, expected = GROUPS[name]
    assert free_host_memory(host(tmp_path, groups, files)) == expected


def test_nothing_can_be_read(tmp_path: Path) -> None:
    assert free_host_memory(tmp_path) is None
    assert free_host_memory(host(tmp_path, "0::/job\n", v2("job/", str(GIB), 0, 0), meminfo="")) == GIB


def test_this_host() -> None:
    free = free_host_memory()
    assert free is None or 0 < free < 2**50
    assert memory.free_memory(torch.device("cpu")).device is None


def place(machine: str, *, host: int = 0, free: int | None, device: int = 0, left: int | None = None) -> Place:
    return Place(machine, machine, "cuda:0", MemoryNeed(device=device, host=host), FreeMemory(device=left, host=free))


def test_the_ranks_of_a_host_share_its_memory() -> None:
    two = [place("a", host=600, free=1000), place("a", host=600, free=1100)]
    assert short_hosts(two) == ["on host a its 2 ranks, 0 to 1, need 1.2 kB (1,200 bytes) of host memory, free are 1 kB (1,000 bytes)"]
    apart = [place("a", host=600, free=1000), place("b", host=600, free=1000), place("b", host=500, free=1000)]
    assert [text.split(" need")[0] for text in short_hosts(apart)] == ["on host b its 2 ranks, 1 to 2,"]
    assert short_hosts([place("a", host=600, free=None)] * 3) == []
    assert short_hosts([place("a", host=0, free=0)]) == []


def test_each_rank_has_its_own_device() -> None:
    places = [place("a", device=5, left=5, free=0), place("a", device=6, left=5, free=0), place("a", device=7, left=None, free=0)]
    assert short_devices(places) == ["rank 1 (cuda:0 of a) needs 6 bytes, free are 5 bytes"]


def attach(**section: Any) -> tuple[Any, Any, Any]:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, smartfrz_ds.attach_torch(model, optimizer, {"policy": "manual", "order": "any"} | section)


def numel(model: Net, *layers: int) -> int:
    return sum(p.numel() for layer in layers for p in model.blocks[layer].parameters())


def test_what_a_change_needs() -> None:
    """On the CPU a freeze holds nothing twice. A thaw needs fresh moments, where none were kept."""
    model, optimizer, controller = attach()
    step(optimizer)
    backend, params = controller.backend, list(model.blocks[0].parameters())
    assert backend.memory_need(params, (), keep=True) == MemoryNeed()
    controller.freeze(["blocks.0"])
    before = backend.optimizer_bytes()
    need = backend.memory_need((), params, keep=False)
    assert need == MemoryNeed(host=2 * 4 * numel(model, 0))
    controller.thaw(["blocks.0"])
    assert backend.optimizer_bytes() - before == need.host
    controller.detach()


def test_kept_state_is_on_the_host_already() -> None:
    model, optimizer, controller = attach(keep_state=10)
    step(optimizer)
    controller.freeze(["blocks.0"])
    assert controller.backend.memory_need((), list(model.blocks[0].parameters()), keep=True) == MemoryNeed()
    controller.detach()


def test_a_change_without_room_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, controller = attach()
    step(optimizer)
    controller.freeze(["blocks.0", "blocks.1"])
    needed = 2 * 4 * numel(model, 0, 1)
    monkeypatch.setattr(memory, "free_host_memory", lambda: needed - 1)
    monkeypatch.setattr(controller.backend, "change", None)  # not reached
    with pytest.raises(NotEnoughMemory) as refused:
        controller.thaw(["blocks.0", "blocks.1"])
    text = str(refused.value)
    assert text.startswith("not enough memory to thaw blocks.0, blocks.1: on host ") and f"({needed:,} bytes) of host memory" in text
    assert f"({needed - 1:,} bytes)" in text and "Nothing was changed" in text and "fewer layers" in text and "keep_state" not in text
    assert controller.frozen == ("blocks.0", "blocks.1") and [e.kind for e in controller.report().events] == ["freeze"]
    monkeypatch.undo()
    monkeypatch.setattr(memory, "free_host_memory", lambda: needed)
    controller.thaw(["blocks.0", "blocks.1"])
    monkeypatch.setattr(memory, "free_host_memory", lambda: None)  # not known: nothing is refused
    controller.freeze(["blocks.0"])
    controller.thaw(["blocks.0"])
    controller.detach()


def test_a_policy_without_room_goes_on_unfrozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning, no freeze; when there is room, the next stage freezes."""
    policy = {"policy": "linear", "linear": {"start_step": 1, "end_step": 11}, "total_steps": 14, "warmup_steps": 2, "cooldown": 0}
    _, optimizer, controller = attach(**policy, snapshot_interval=1, freeze_interval=2, keep_state=3)
    monkeypatch.setattr(controller.backend, "memory_need", lambda *_, **__: MemoryNeed(host=1001))
    monkeypatch.setattr(memory, "free_host_memory", lambda: 1000)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        while controller.step < 6:
            step(optimizer)
    (warning,) = [str(w.message) for w in seen if w.category is RuntimeWarning]
    assert "a freeze is left out, and training goes on: not enough memory to freeze embeddings" in warning and "keep_state to 0" in warning
    assert controller.frozen == ()
    kinds = [(e.kind, e.step) for e in controller.report().events if e.kind != "warning"]
    assert kinds == [("decision", 2), ("decision", 4), ("decision", 6)]
    monkeypatch.setattr(memory, "free_host_memory", lambda: 1001)
    while controller.step < 8:
        step(optimizer)
    assert "embeddings" in controller.frozen
    controller.detach()


def test_unused_memory_is_returned_only_where_much_was_released() -> None:
    """7 billion parameters on 8 ranks: half of them is 5 GB of a reserved 60 GB; one layer of 32 is 0.3 GB."""
    gigabyte = 10**9
    assert is_worth_returning(5 * gigabyte, 60 * gigabyte)
    assert not is_worth_returning(gigabyte // 3, 60 * gigabyte)
    assert not is_worth_returning(-gigabyte, 60 * gigabyte) and not is_worth_returning(0, None)
    assert is_worth_returning(1, None), "an allocator that says nothing about itself"
