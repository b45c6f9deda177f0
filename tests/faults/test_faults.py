"""Faults across hosts: every rank that survives ends soon, with an error that says what to do, and the run resumes exactly.

The ranks are on two hosts (hosts.py) where those can be made, else two processes on this one; no launcher ends the survivors. Faults that
one rank finds by itself are in test_checkpoint.py and test_chaos.py; docs/faults.md has the whole table.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TESTS, environment, free_port
from hosts import PORT, Host, both, finish, refusal, two_hosts
from reference.oracle import Cell, Net, reference
from safetensors.torch import load_file

from smartfrz_ds._version import __version__
from smartfrz_ds.checkpoint.files import complete_tags

CELL = Cell("faults", 1, steps=8, width=32)
# Seconds of the process group's timeout: short where the fault is found by it alone, brief where nothing is computed meanwhile.
LONG, SHORT, BRIEF = 40.0, 8.0, 2.0
SLACK = 20.0  # seconds that start and end may take besides, on a busy machine


def fault(name: str, *, rank: int = 1, timeout: float = LONG, resumes: bool = True, kind: str = "") -> dict[str, Any]:
    """kind: ddp or fsdp2, where the run is one without DeepSpeed."""
    folder = f"{kind} {name}".strip().replace(" ", "-")
    base = {"folder": folder, "cell": dataclasses.asdict(CELL), "rank": rank, "step": 5, "timeout": timeout, "kind": kind}
    run = base | {"name": folder, "fault": name}
    return {"runs": [run, base | {"name": f"{folder}-again", "fault": "", "timeout": LONG}] if resumes else [run]}


# In the middle of a run of 8 steps that freezes after steps 2, 4 and 6 and saves after every second.
FAULTS = {
    "": fault("", resumes=False),
    "dies": fault("dies"),
    "dies deciding": fault("dies deciding", rank=0),
    "fails freezing": fault("fails freezing"),
    "dies freezing": fault("dies freezing"),
    "script raises": fault("script raises", rank=0),
    "hangs": fault("hangs", timeout=SHORT),
    "link down": fault("link down", timeout=SHORT),
    "disk full": fault("disk full", resumes=False),
    "policy fails": fault("policy fails", rank=0, resumes=False),
    "other version": fault("other version", resumes=False),
    "other settings": fault("other settings", resumes=False),
    "other stage": fault("other stage", resumes=False),
    "other model": fault("other model", resumes=False),
    "port taken": fault("port taken", timeout=BRIEF, resumes=False),
    "fsdp2 dies": fault("dies", kind="fsdp2"),
}
MORE_FAULTS = {
    "ddp dies": fault("dies", kind="ddp"),
    "fsdp2 dies deciding": fault("dies deciding", rank=0, kind="fsdp2"),
    "fsdp2 dies saving": fault("dies saving", kind="fsdp2"),
    "fsdp2 hangs": fault("hangs", timeout=SHORT, kind="fsdp2"),
    "ddp dies deciding": fault("dies deciding", rank=0, kind="ddp"),
    "ddp hangs": fault("hangs", timeout=SHORT, kind="ddp"),
    "ddp other model": fault("other model", timeout=SHORT, resumes=False, kind="ddp"),
}


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host] | None]:
    if refusal():
        yield None
    else:
        with two_hosts() as made:
            yield made


@pytest.fixture(scope="module")
def folder(hosts: tuple[Host, Host] | None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where worker_faults.py has written what came of all faults."""
    return happened(FAULTS, hosts, tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def more(hosts: tuple[Host, Host] | None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return happened(MORE_FAULTS, hosts, tmp_path_factory.mktemp("more"))


def happened(faults: dict[str, Any], hosts: tuple[Host, Host] | None, out: Path) -> Path:
    runs = [run for name, fault in faults.items() if hosts or name != "link down" for run in fault["runs"]]
    for number, run in enumerate(runs):
        run["port"] = PORT + number if hosts else free_port()
    (out / "job.json").write_text(json.dumps(runs))
    command = [sys.executable, "-u", str(TESTS / "workers" / "worker_faults.py"), str(out / "job.json"), str(out)]
    address = hosts[0].address if hosts else "127.0.0.1"
    started = []
    for rank in (0, 1):
        env = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(PORT)}
        if hosts:
            started.append(hosts[rank].start(command, env))
        else:
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(command, env=environment() | env, stdout=pipe, stderr=subprocess.STDOUT, text=True))
    finish(hosts or (), started, timeout=400)
    return out


def ended(folder: Path, name: str, rank: int) -> tuple[int, float, str]:
    """Exit code, seconds from start to end, output."""
    how = json.loads((folder / f"{name}.{rank}.json").read_text())
    return how["code"], how["seconds"], (folder / f"{name}.{rank}.out").read_text()


def expected(seen: dict[str, Any]) -> torch.Tensor:
    plan = {step: ["freeze", layers] for step, layers in seen["frozen_at"].items()}
    return reference(dataclasses.replace(CELL, plan=plan)).weights[-1]


def check_end(folder: Path, name: str, run: str) -> dict[str, Any]:
    """The run ended well, with the weights of a single process that froze the same layers at the same steps."""
    for rank in (0, 1):
        code, _, output = ended(folder, run, rank)
        assert code == 0, output[-4000:]
    seen = json.loads((folder / f"{run}.0.saw").read_text())
    final = load_file(folder / name / "final.safetensors")
    assert torch.equal(torch.cat([final[n].view(-1) for n, _ in Net(CELL.width).named_parameters()]), expected(seen))
    return seen


def test_undisturbed(folder: Path) -> None:
    seen = check_end(folder, "", "")
    assert list(seen["frozen_at"]) == ["2", "4", "6"] and len(seen["frozen"]) == 5


# Who survives, and the step of which its error speaks.
LOST = {"dies": (0, 5), "script raises": (1, 5), "dies deciding": (1, 6), "hangs": (0, 5), "link down": (0, 5)}


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", LOST)
def test_a_lost_rank(folder: Path, hosts: Any, name: str) -> None:
    """Its survivor ends within the timeout and names the step and the checkpoint to go on from; the run started again ends exactly."""
    if name == "link down" and not hosts:
        pytest.skip(refusal())
    run = name.replace(" ", "-")
    survivor, step = LOST[name]
    code, seconds, output = ended(folder, run, survivor)
    assert code == 1 and seconds < (SHORT if name in ("hangs", "link down") else LONG) + SLACK, output[-4000:]
    note = output.splitlines()[-1]
    assert note.startswith(f"smartfrz: rank {survivor} lost contact") and f"{step} steps into the run" in note
    assert note.endswith(f"{folder / run}/checkpoints/global_step4")
    assert check_end(folder, run, f"{run}-again")["start"] == 4


@pytest.mark.distributed(2)
def test_a_rank_fails_in_the_middle_of_a_freeze(folder: Path) -> None:
    own, others = (ended(folder, "fails-freezing", rank) for rank in (1, 0))
    for code, seconds, output in (own, others):
        assert code == 1 and seconds < LONG
        assert "FreezeError: freeze failed at step 6 after it had started" in output and "checkpoints/global_step4" in output
    assert "no room for the new layout" in own[2]
    assert check_end(folder, "fails-freezing", "fails-freezing-again")["start"] == 4


@pytest.mark.distributed(2)
def test_a_rank_dies_in_the_middle_of_a_freeze(folder: Path) -> None:
    code, seconds, output = ended(folder, "dies-freezing", 0)
    assert code == 1 and seconds < LONG, output[-4000:]
    assert "FreezeError: freeze failed at step 6 after it had started" in output and "checkpoints/global_step4" in output
    assert check_end(folder, "dies-freezing", "dies-freezing-again")["start"] == 4


@pytest.mark.distributed(2)
def test_a_disk_is_full_on_one_host(folder: Path) -> None:
    """All ranks raise, at once, with the file's name; a script that goes on trains on, and its next checkpoint is whole."""
    texts = [ended(folder, "disk-full", rank)[2] for rank in (0, 1)]
    file = f"{folder}/disk-full/checkpoints/global_step6/zero_pp_rank_1_mp_rank_00_optim_states.pt could not be written"
    assert f"OSError: {file}" in texts[1]
    assert f"RuntimeError: nothing was changed: rank 1 could not go on: {file}" in texts[0]
    assert complete_tags(folder / "disk-full" / "checkpoints") == ["global_step8", "global_step4", "global_step2"]
    assert check_end(folder, "disk-full", "disk-full")["start"] == 0


@pytest.mark.distributed(2)
def test_a_policy_that_fails_on_rank_0(folder: Path) -> None:
    seen = check_end(folder, "policy-fails", "policy-fails")
    assert list(seen["frozen_at"]) == ["2", "4"]
    assert "failed at step 6, nothing was frozen: no idea" in ended(folder, "policy-fails", 0)[2]


DIFFERENT = {
    "other version": ("package versions", [f"smartfrz_ds {__version__}", "smartfrz_ds 0.0.1"]),
    "other settings": ("smartfrz settings", ["rank 0: settings", "rank 1: settings"]),
    "other stage": ("DeepSpeed settings", ['"stage": 1', '"stage": 3']),
    "other model": ("models", ["Net with 34 parameters", "Net with 28 parameters"]),
}


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", DIFFERENT)
def test_ranks_that_differ_all_raise_before_they_start(folder: Path, name: str) -> None:
    about, words = DIFFERENT[name]
    for rank in (0, 1):
        code, seconds, output = ended(folder, name.replace(" ", "-"), rank)
        line = output.splitlines()[-1]
        assert code == 1 and seconds < LONG
        assert f"RanksDisagree: the ranks have different {about}" in line and all(word in line for word in words), line


# --- without DeepSpeed -----------------------------------------------------------------------------------------------------------------

# Who survives, what it was doing, the step then, and the checkpoint that it names. DDP meets the others in the forward after a freeze, when
# it makes its buckets anew.
LOST_IN_TORCH = {
    "fsdp2 dies": (0, "forward", 5, 4),
    "ddp dies": (0, "forward", 5, 4),
    "fsdp2 dies deciding": (1, "the optimizer's step", 6, 4),
    "fsdp2 dies saving": (0, "save", 6, 4),
    "fsdp2 hangs": (0, "forward", 5, 4),
    "ddp dies deciding": (1, "the optimizer's step", 6, 4),
    "ddp hangs": (0, "forward", 5, 4),
}


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAULTS else pytest.mark.slow) for n in LOST_IN_TORCH])
def test_a_lost_rank_without_deepspeed(request: pytest.FixtureRequest, name: str) -> None:
    folder = request.getfixturevalue("folder" if name in FAULTS else "more")
    run = name.replace(" ", "-")
    survivor, doing, step, saved = LOST_IN_TORCH[name]
    code, seconds, output = ended(folder, run, survivor)
    assert code == 1 and seconds < (SHORT + SLACK if "hangs" in name else SLACK), output[-4000:]
    last = output.splitlines()[-1]
    assert last.startswith(f"smartfrz: rank {survivor} lost contact") and f"in {doing}, {step} steps into the run" in last, last
    way_back = "controller.restore and your own load resume from the last complete checkpoint"
    assert last.endswith(f"{way_back}, {folder / run}/checkpoints/step-{saved}"), last
    assert check_end(folder, run, f"{run}-again")["start"] == saved


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_another_model_in_ddp(more: Path) -> None:
    """DDP itself compares the models, when it is made."""
    for rank in (0, 1):
        code, seconds, output = ended(more, "ddp-other-model", rank)
        assert code == 1 and seconds < SLACK and "DDP expects same model across all ranks" in output, output[-4000:]


@pytest.mark.distributed(2)
def test_the_port_is_taken(folder: Path) -> None:
    """Rank 0 says so at once. The other meets somebody who doesn't answer, and gives up (torch waits for more than one timeout there)."""
    code, seconds, output = ended(folder, "port-taken", 0)
    assert code == 1 and "EADDRINUSE" in output and seconds < SLACK
    code, seconds, output = ended(folder, "port-taken", 1)
    assert code == 1 and "timed out after" in output and seconds < 3 * BRIEF + SLACK


# --- with the launchers that people use ------------------------------------------------------------------------------------------------


def torchrun(hosts: Sequence[Host], node: int, out: Path, *more: str) -> list[str]:
    command = [str(Path(sys.executable).with_name("torchrun")), "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(node)]
    where = ["--master_addr", hosts[0].address, "--master_port", str(PORT + 900)]
    script = [str(TESTS / "workers" / "worker_restart.py"), str(out)]
    return [*command, *where, *more, *script]


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_sigterm_to_the_launcher_of_one_node(hosts: tuple[Host, Host] | None, tmp_path: Path) -> None:
    """As a cluster's scheduler does it. The other node's rank ends with the error of a lost rank, its launcher with an exit code."""
    if not hosts:
        pytest.skip(refusal())
    started = [hosts[node].start(torchrun(hosts, node, tmp_path), {"WAITS": "1"}) for node in (0, 1)]
    end = time.monotonic() + 120
    while not (tmp_path / "waiting.1").exists() and time.monotonic() < end:
        time.sleep(0.1)
    os.kill(hosts[1].find("torchrun")[0], signal.SIGTERM)
    first, second = finish(hosts, started, timeout=90, check=False)
    assert first.returncode and second.returncode
    assert "smartfrz: rank 0 lost contact" in first.stdout and "global_step4" in first.stdout, first.stdout[-4000:]
    finish(hosts, [hosts[node].start(torchrun(hosts, node, tmp_path)) for node in (0, 1)], timeout=120)
    check_restart(tmp_path)


# Without it torch 2.13's torchrun gives a second start the first one's store, with the addresses of dead ranks, and the new ones hang.
RESTARTS = {"DIES": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def check_restart(folder: Path) -> None:
    seen = json.loads((folder / "seen.json").read_text())
    assert seen["start"] == 4
    final = load_file(folder / "final.safetensors")
    assert torch.equal(torch.cat([final[n].view(-1) for n, _ in Net(CELL.width).named_parameters()]), expected(seen))


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_torchrun_brings_a_run_back(tmp_path: Path) -> None:
    """A rank kills itself once, in step 6; --max-restarts starts both again, and they end with the weights of the undisturbed run."""
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    done = subprocess.run(
        [*command, str(TESTS / "workers" / "worker_restart.py"), str(tmp_path)],
        env=environment() | RESTARTS,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    check_restart(tmp_path)


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_torchrun_brings_a_run_back_on_two_hosts(hosts: tuple[Host, Host] | None, tmp_path: Path) -> None:
    """As launch/slurm.sbatch starts it: the other host's launcher starts its rank again, too."""
    if not hosts:
        pytest.skip(refusal())
    meet = ["--rdzv-id", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].name}:{PORT + 800}", "--max-restarts", "3"]
    command = [str(Path(sys.executable).with_name("torchrun")), "--nnodes", "2", "--nproc_per_node", "1", *meet]
    both(hosts, [[*command, str(TESTS / "workers" / "worker_restart.py"), str(tmp_path)]] * 2, timeout=200, env=RESTARTS)
    check_restart(tmp_path)
