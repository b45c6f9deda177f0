"""The start on the second of two GPUs: every tensor that meets the process group is on the group's device, which is not the current one.

Background: `deepspeed.init_distributed` binds the process group to cuda:LOCAL_RANK, and the current device stays cuda:0 until the engine's
constructor sets it. What is exchanged in between was made on the current device, which NCCL refuses on every rank but the first; with
gloo nothing shows. No GPU is needed here: torch's FakeTensorMode makes tensors that have a CUDA device and no memory, its "fake" process
group answers for the other rank, and the all-gather is watched for the devices that it gets.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import smartfrz_ds
from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.distributed.devices import collective_device, exchange_device, own_random_numbers
from smartfrz_ds.distributed.failures import compare_before_start

OWN = torch.device("cuda", 1)


class Met(Exception):
    """Stands for the first collective, with the device of its tensors."""


@contextmanager
def second_of_two(backend: str, bound: torch.device | None) -> Iterator[None]:
    """This process as rank 1 of a fake group of two. backend: as for init_process_group, with "fake" for what moves the bytes."""
    dist.init_process_group(backend, store=FakeStore(), rank=1, world_size=2)
    dist.group.WORLD.bound_device_id = bound
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, of which the first is the current one; LOCAL_RANK says that the second is this process's."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    accelerator = get_accelerator()
    monkeypatch.setattr(accelerator, "current_device_name", lambda: "cuda:0")
    monkeypatch.setattr(accelerator, "device_name", lambda index=None: "cuda" if index is None else f"cuda:{index}")


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_gather(everyone: Tensor, mine: Tensor, group: Any = None) -> None:
        assert everyone.device == mine.device
        raise Met(mine.device)

    for name in ("all_gather_single", "all_gather_into_tensor"):  # torch has renamed it
        monkeypatch.setattr(dist, name, all_gather, raising=False)
    # torch's own way to exchange objects, which takes the current device
    monkeypatch.setattr(
        dist, "all_gather_object", lambda *_, **__: all_gather(torch.empty(1, device="cuda:0"), torch.empty(1, device="cuda:0"))
    )


def first_device(action: Any) -> torch.device:
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(Met) as met:
        action()
    return met.value.args[0]


def start_deepspeed() -> None:
    compare_before_start(nn.Linear(2, 2), FreezeConfig(), {"train_batch_size": 2}, deepspeed_version="0.19.8")


def start_torch() -> None:
    model = nn.Linear(2, 2)
    smartfrz_ds.attach_torch(model, torch.optim.AdamW(model.parameters()), {"policy": "manual"})


def disagree() -> None:
    Collectives(collective_device()).gather_objects("a text")


@pytest.mark.parametrize("bound", [OWN, None], ids=["bound", "not bound"])
@pytest.mark.parametrize("start", [start_deepspeed, start_torch, disagree], ids=lambda f: f.__name__)
@pytest.mark.usefixtures("two_gpus", "watched")
def test_first_collective(start: Any, bound: torch.device | None) -> None:
    with second_of_two("cuda:fake", bound):
        assert first_device(start) == OWN


@pytest.mark.parametrize("backend", ["cpu:fake,cuda:fake", "fake"])
@pytest.mark.parametrize("bound", [OWN, None], ids=["bound", "not bound"])
@pytest.mark.usefixtures("two_gpus", "watched")
def test_a_group_with_a_cpu_backend_takes_the_cpu(backend: str, bound: torch.device | None) -> None:
    """The CPU is right whatever the current device is, and asks for no GPU's memory."""
    with second_of_two(backend, bound):
        assert first_device(start_deepspeed).type == "cpu"


def test_gloo_and_no_group() -> None:
    assert collective_device() == torch.device("cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.group.WORLD.bound_device_id = OWN  # DeepSpeed binds whatever the backend is
        assert collective_device() == torch.device("cpu")
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("two_gpus")
def test_what_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    with second_of_two("cuda:fake", None):
        with FakeTensorMode():
            placed = [torch.empty(1), torch.empty(1, device="cuda:1")]
        monkeypatch.setenv("LOCAL_RANK", "0")
        assert collective_device(placed) == OWN  # where the model is
        assert collective_device() == torch.device("cuda", 0)
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert collective_device() == OWN
        # Each process sees one GPU only, its own: LOCAL_RANK is not an index of it.
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        assert collective_device() == torch.device("cuda", 0)
        # No launcher that sets LOCAL_RANK (torch.multiprocessing.spawn): the script has set its device.
        monkeypatch.delenv("LOCAL_RANK")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        assert collective_device() == OWN


PACKAGE = Path(smartfrz_ds.__file__).parent
CUDA_ALONE = {
    "backends/readers.py": "looks for CUDA graphs, which no other accelerator has under these names",
    "cli/doctor.py": "reports on torch's CUDA build and the driver",
}


def test_devices_are_asked_through_the_accelerator() -> None:
    """XPU, NPU and HPU have no torch.cuda: DeepSpeed's get_accelerator(), torch.accelerator or torch.get_device_module reach all."""
    kinds = {"cuda", "xpu", "npu", "hpu", "mtia", "mps"}
    found = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            owner = node.value if isinstance(node, ast.Attribute) else None
            module = isinstance(owner, ast.Name) and owner.id == "torch" and node.attr in kinds  # torch.cuda
            method = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in kinds  # tensor.cuda()
            imported = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.cuda")
            if module or method or imported:
                found.setdefault(str(file.relative_to(PACKAGE)), []).append(node.lineno)
    assert found.keys() == CUDA_ALONE.keys(), found


def test_an_exchange_goes_over_a_device_that_the_group_knows() -> None:
    """NCCL, like the groups of other accelerators, takes no host memory, and gloo alone may take no other."""
    host, gpu = torch.device("cpu"), OWN
    for backend, device, expected in [
        ("cuda:fake", host, gpu),
        ("cuda:fake", gpu, gpu),
        ("cpu:fake", gpu, host),
        ("cpu:fake,cuda:fake", host, host),
        ("cpu:fake,cuda:fake", gpu, gpu),
    ]:
        with second_of_two(backend, gpu):
            assert exchange_device(device) == expected, (backend, device)


def test_random_numbers_touch_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    touched = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: touched.append(device) or torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    before = torch.get_rng_state()
    with own_random_numbers(torch.device("cuda", 5)):
        torch.rand(3)
    assert touched == [5]
    with own_random_numbers(torch.device("cpu")):
        torch.rand(3)
    assert touched == [5] and torch.equal(torch.get_rng_state(), before)
