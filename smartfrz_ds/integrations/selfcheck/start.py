"""Starts the processes of a self-check and waits for them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .case import Case

#: Longest duration of a self-check, in seconds; SMARTFRZ_SELFCHECK_SECONDS sets another.
SECONDS = 240.0
_RANKS = 2
# What launchers, schedulers and torch set for the ranks of a run: a process that finds them takes itself for one of those ranks.
_OF_LAUNCHERS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "NODE_RANK", "GROUP_RANK"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"),
)
_PREFIXES = ("TORCHELASTIC_", "OMPI_", "PMI_", "PMIX_", "SLURM_", "MPI_", "MV2_", "ACCELERATE_", "DLTS_", "AZ_", "NCCL_", "TORCH_NCCL_")


@dataclass(frozen=True)
class Ended:
    """How the processes ended.

    Attributes:
        wrong: What the check found wrong; None if it did not come to its end.
        why: Why not; "" if it did.
    """

    wrong: list[str] | None
    why: str = ""


def run(case: Case, seconds: float) -> Ended:
    """Run the self-check of one kind of engine in processes of its own.

    Args:
        case: The kind of engine.
        seconds: The time limit.
    """
    folder = Path(tempfile.mkdtemp(prefix="smartfrz-selfcheck-"))
    try:
        (folder / "case.json").write_text(json.dumps({"case": case.to_json(), "seconds": seconds}))
        output = (folder / "output").open("wb")
        with output:
            processes = [
                subprocess.Popen(
                    [sys.executable, "-m", f"{__package__}.toy", str(folder), str(rank)],
                    env=environment(folder, rank),
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for rank in range(_RANKS)
            ]
            in_time = _wait(processes, seconds)
        return _result(folder, in_time, seconds)
    except OSError as error:
        return Ended(None, f"it could not be started ({type(error).__name__}: {error})")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(processes: list[subprocess.Popen[bytes]], seconds: float) -> bool:
    """Wait for the processes, and end what is left of them. Returns whether they ended by themselves."""
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            codes = [process.poll() for process in processes]
            if None not in codes:
                return True
            if any(codes):  # the other one waits for a rank that has ended; it may be about to say why itself
                deadline = min(deadline, time.monotonic() + 2.0)
            time.sleep(0.02)
        return any(process.poll() is not None for process in processes)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _result(folder: Path, in_time: bool, seconds: float) -> Ended:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return Ended(list(json.loads((folder / "result.json").read_text())["wrong"]))
    errors = [path.read_text() for rank in range(_RANKS) if (path := folder / f"error.{rank}").exists()]
    if errors:
        # of two ranks, the one that failed by itself: the other lost contact
        lines = [error.strip().splitlines()[-1] for error in errors]
        own = next((line for line in lines if "gloo" not in line.lower() and "peer" not in line.lower()), lines[0])
        return Ended(None, own)
    if not in_time:
        return Ended(None, f"it did not end within {seconds:.0f} s")
    last = (folder / "output").read_text(errors="replace").strip().splitlines()[-1:]
    return Ended(None, last[0] if last else "its processes ended without a word")


def environment(folder: Path, rank: int) -> dict[str, str]:
    """Return the environment of a process: this one's, without what a launcher has set, on the CPU, with the same packages."""
    kept = {k: v for k, v in os.environ.items() if k not in _OF_LAUNCHERS and not k.startswith(_PREFIXES)}
    return kept | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "RANK": str(rank),  # deepspeed.init_distributed reads them although there is a group
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(_RANKS),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),
        **({"GLOO_SOCKET_IFNAME": "lo"} if Path("/sys/class/net/lo").exists() else {}),
    }
