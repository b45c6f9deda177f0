"""The prefix cache on real 2-rank engines: weights equal those of the same run without it, bit for bit, and the ranks share their rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TESTS, run_worker
from hosts import PORT, two_hosts
from hosts import both as hosts_both
from reference import oracle
from safetensors.torch import load_file

ROWS, EPOCHS, WORLD = 32, 4, 2
STEPS = ROWS // WORLD // oracle.BATCH  # of an epoch, on each rank

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "z0": {"kind": "deepspeed", "stage": 0},
    "z1": {"kind": "deepspeed", "stage": 1, "accumulation": 2},
    "z2": {"kind": "deepspeed", "stage": 2},
    "z2-bf16": {"kind": "deepspeed", "stage": 2, "dtype": "bf16"},
}
ON = {"mode": "on", "memory": "16MiB"}


def results(cases: list[dict[str, Any]], folder: Path) -> dict[str, list[tuple[torch.Tensor, dict[str, Any]]]]:
    run_worker("prefix_cache", cases, folder, ranks=WORLD)
    names = [(case["name"], rank) for case in cases for rank in range(WORLD)]
    read = {
        (n, r): (load_file(folder / f"{n}.{r}.safetensors")["weights"], json.loads((folder / f"{n}.{r}.json").read_text()))
        for n, r in names
    }
    return {case["name"]: [read[case["name"], rank] for rank in range(WORLD)] for case in cases}


@pytest.mark.distributed(2)
def test_equal_and_shared_by_the_ranks(tmp_path: Path) -> None:
    """Each epoch deals all rows out anew: with a rank's own rows alone, hardly a batch would hit."""
    cases = [{"name": f"{n}-{m}", **e, "cache": {"mode": "off"} if m == "off" else ON} for n, e in ENGINES.items() for m in ("off", "on")]
    found = results(cases, tmp_path)
    for name in ENGINES:
        for rank in range(WORLD):
            (off, nothing), (on, facts) = found[f"{name}-off"][rank], found[f"{name}-on"][rank]
            assert torch.equal(off, on), name
            assert len({w.sum().item() for w in on}) > STEPS  # it trains
            assert nothing["hits"] == 0 and facts["rows"] == ROWS, facts
            assert facts["hits"] == STEPS * (EPOCHS - 1) - 1, (name, facts)  # one is compared


@pytest.mark.distributed(2)
def test_hit_rates_that_differ_between_ranks(tmp_path: Path) -> None:
    """Rank 1 never sees a row again; rank 0's rows come back, though all that it could have got from rank 1 is missing."""
    cases = [
        {"name": f"{n}-{m}", **ENGINES[n], "noise": 1, "cache": {"mode": "off"} if m == "off" else ON}
        for n in ("ddp", "z2")
        for m in ("off", "on")
    ]
    found = results(cases, tmp_path)
    for name in ("ddp", "z2"):
        for rank in range(WORLD):
            assert torch.equal(found[f"{name}-off"][rank][0], found[f"{name}-on"][rank][0])
        assert found[f"{name}-on"][1][1]["hits"] == 0


def check_two_hosts(folder: Path) -> None:
    """With `HostSampler` all batches of the later epochs hit, on each host with rows of its own; with `DistributedSampler` hardly any."""
    for sampler in ("host", "plain"):
        for rank in range(WORLD):
            off, on = (load_file(folder / f"{sampler}-{mode}.{rank}.safetensors")["weights"] for mode in ("off", "on"))
            assert torch.equal(off, on), sampler
            facts = json.loads((folder / f"{sampler}-on.{rank}.json").read_text())
            assert facts["hosts"] == [0, 1]
            if sampler == "host":
                assert facts["hits"] == STEPS * (EPOCHS - 1) - 1 and facts["rows"] == ROWS // WORLD, facts
            else:  # a batch is complete with a probability of 1/16, 3/16 and 41/100 in the later epochs
                assert facts["hits"] < STEPS * (EPOCHS - 1) / 2, facts


TWO_HOSTS = [
    {"name": f"{sampler}-{mode}", **ENGINES["z2"], "sampler": sampler, "cache": {"mode": "off"} if mode == "off" else ON}
    for sampler in ("host", "plain")
    for mode in ("off", "on")
]


@pytest.mark.distributed(2)
def test_samples_that_stay_on_their_host(tmp_path: Path) -> None:
    """Two ranks with a store each, as if they were on two hosts."""
    run_worker("prefix_cache", [case | {"apart": True} for case in TWO_HOSTS], tmp_path, ranks=WORLD)
    check_two_hosts(tmp_path)


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_two_hosts(tmp_path: Path) -> None:
    """Two network namespaces with a rank each: their host names tell the ranks apart."""
    (tmp_path / "job.json").write_text(json.dumps(TWO_HOSTS))
    script = [str(TESTS / "workers" / "worker_prefix_cache.py"), str(tmp_path / "job.json"), str(tmp_path)]
    with two_hosts() as pair:
        meet = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", pair[0].address, "--master_port", str(PORT)]
        command = [[str(Path(sys.executable).with_name("torchrun")), *meet, "--node_rank", str(node), *script] for node in range(2)]
        hosts_both(pair, command, timeout=150)
    check_two_hosts(tmp_path)
