"""Freezing across two hosts (hosts.py): the same weights as on one, and less on the wire between them.

All of it is slow: on one host test_exact.py, test_pipeline.py and test_scenarios.py show the same, and test_faults.py runs on two hosts.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from helpers import TESTS, run_worker
from hosts import PORT, Host, both, two_hosts
from reference.bounds import distance, noisy, spread
from reference.oracle import Cell, layer_of, reference
from safetensors.torch import load_file
from workers import worker_pipeline

PLAN = {
    "2": ["freeze", ["embeddings", "blocks.0", "blocks.1"]],
    "4": ["freeze", ["blocks.2"]],
    "6": ["thaw", ["blocks.1", "blocks.2"]],
}
CELLS = {f"z{stage}": Cell(f"z{stage}", stage, steps=8, plan=PLAN) for stage in (1, 3)}
PIPELINES = {
    "pipe": {
        "name": "pipe",
        "pp": 2,
        "micro": 2,
        "steps": 6,
        "stage": 1,
        "plan": {
            "2": ["freeze", ["embeddings", "layers.1", "layers.2"]],
            "4": ["freeze", ["layers.3", "layers.4", "layers.5", "layers.6"]],
        },
    }
}
pytestmark = pytest.mark.slow
JOB = {"exact": [dataclasses.asdict(c) for c in CELLS.values()], "pipeline": list(PIPELINES.values())}
# Two million weights in four blocks; the first three freeze.
WIDE = Cell("wire", 1, steps=8, width=290, blocks=4, plan={"4": ["freeze", ["embeddings", "blocks.0", "blocks.1", "blocks.2"]]})
WIRE = {"wire": dataclasses.asdict(WIDE), "megabits": 200}


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as made:
        yield made


def across(hosts: tuple[Host, Host], folder: Path, job: Any, *, slots: int, timeout: float) -> Path:
    """worker_multinode.py under the deepspeed launcher, started on each host, `slots` ranks on each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job))
    (folder / "hostfile").write_text("".join(f"{h.name} slots={slots}\n" for h in hosts))
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    where = ["--hostfile", str(folder / "hostfile"), "--no_ssh", "--master_addr", hosts[0].address, "--master_port", str(PORT)]
    script = [str(TESTS / "workers" / "worker_multinode.py"), str(folder / "job.json"), str(folder)]
    both(hosts, [[deepspeed, *where, "--node_rank", str(n), *script] for n in (0, 1)], timeout=timeout)
    return folder


def read(folder: Path, name: str, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"{name}.{rank}.json").read_text())


@pytest.fixture(scope="module")
def one_each(hosts: tuple[Host, Host], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return across(hosts, tmp_path_factory.mktemp("one-each"), JOB | WIRE, slots=1, timeout=120)


@pytest.mark.distributed(2)
def test_the_hosts_are_two(one_each: Path) -> None:
    assert [read(one_each, "where", rank) for rank in (0, 1)] == [
        {"host": name, "local_rank": "0", "world": 2} for name in ("node-a", "node-b")
    ]


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", CELLS)
def test_two_hosts_with_a_rank_each(one_each: Path, name: str) -> None:
    """Bit for bit the single process's weights after each step, which test_exact.py shows to be those of two ranks on one host."""
    expected = reference(CELLS[name])
    for rank in (0, 1):
        got = load_file(one_each / f"{name}.{rank}.safetensors")
        assert torch.equal(got["weights"], expected.weights)
        assert read(one_each, name, rank)["frozen"] == ["embeddings", "blocks.0"]
    assert (expected.weights[-1] - reference(CELLS[name], freezes=False).weights[-1]).abs().max() > 1e-3


@pytest.mark.distributed(2)
def test_a_pipeline_across_the_wire(one_each: Path) -> None:
    got = load_file(one_each / "pipe.safetensors")["weights"]
    assert torch.equal(got, worker_pipeline.reference(PIPELINES["pipe"], 1)["weights"])
    assert [read(one_each, "pipe", rank)["stage"] for rank in (0, 1)] == [0, 1]
    # from the second freeze on, nothing of backward goes back to the first host
    assert "SendGrad" in read(one_each, "pipe", 1)["counts"][3] and "SendGrad" not in read(one_each, "pipe", 1)["counts"][5]


@pytest.mark.distributed(4)
def test_two_hosts_with_two_ranks_each(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Four ranks add gradients in an order of their own, so one host with four ranks is what they are compared with.

    Among the samples is the oracle with that order reversed: where the ranks' gradients nearly cancel, rounding is a large share of their
    sum, which noise in proportion to the sum does not show.
    """
    wire = across(hosts, tmp_path / "two-each", JOB, slots=2, timeout=180)
    alone = run_worker("multinode", JOB, tmp_path / "alone", ranks=4, timeout=180)
    assert [read(wire, "where", rank)["host"] for rank in range(4)] == ["node-a", "node-a", "node-b", "node-b"]
    for name, cell in CELLS.items():
        expected = reference(cell, world=4).weights
        samples = noisy(lambda noise: reference(cell, world=4, noise=noise).weights)  # noqa: B023
        samples.append(reference(cell, world=4, backwards=True).weights)
        for rank in range(4):
            got, local = (load_file(folder / f"{name}.{rank}.safetensors")["weights"] for folder in (wire, alone))
            assert torch.equal(got, local)
            assert distance(got, expected) <= spread(samples, expected) < 1e-4, "a step is 1e-2"
    got, local = (load_file(folder / "pipe.safetensors")["weights"] for folder in (wire, alone))
    assert torch.equal(got, local)


@pytest.mark.distributed(2)
def test_freezing_saves_what_a_slow_link_costs(one_each: Path) -> None:
    """What is sent falls to the active share, and with it the time of a step; the time is shown and decides nothing."""
    sizes = {n: p.numel() for n, p in WIDE.net().named_parameters()}
    active = sum(n for name, n in sizes.items() if layer_of(name) not in WIDE.plan["4"][1]) / sum(sizes.values())
    for rank in (0, 1):
        saw = read(one_each, "wire", rank)
        before, after = (median(saw["sent"][part]) for part in (slice(1, 4), slice(5, 8)))
        assert abs(after / before - active) < 0.05, (saw["sent"], active)
        slow, fast = (median(saw["seconds"][part]) for part in (slice(1, 4), slice(5, 8)))
        print(
            f"\n{saw['how'] or 'full speed'}, rank {rank}: {before / 1e6:.1f} -> {after / 1e6:.1f} MB sent a step ({after / before:.2f}; "
            f"active share {active:.2f}), {slow:.3f} -> {fast:.3f} s a step ({fast / slow:.2f})"
        )
    if saw["refused"]:
        pytest.skip(f"bytes were counted, but no time on a slow link: this kernel has neither netem nor tbf ({saw['refused']})")
