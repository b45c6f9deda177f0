"""What the tests share: launching real ranks, and the single process with plain torch that everything is compared with."""

from __future__ import annotations

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from rank_pool import RankPool

from smartfrz_ds.integrations import build_locks

TESTS = Path(__file__).parent
ROOT = TESTS.parent

ACCELERATOR = os.environ.setdefault("DS_ACCELERATOR", "cpu")
"""Of the tests and of every rank that they start: "cpu", or "cuda" with `./tests/run.sh --gpu`. This is the only place that decides."""

ranks_allowed = True
"""False while a test marked `unit` runs (conftest.py): such a test starts no ranks."""


class RanksFailed(AssertionError):
    """A launched job ended with an error or ran out of time; the message carries its output."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment() -> dict[str, str]:
    """The environment of a launched rank: the test's own, so that what chooses the kernels (ATEN_CPU_CAPABILITY, MKL_CBWR,
    ONEDNN_MAX_CPU_ISA, OMP_NUM_THREADS) is the same in a rank as in the oracle."""
    return os.environ | {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # this environment's ninja: two versions don't know each other's logs, and would build DeepSpeed's ops anew in turns
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep),
        "PYTHONFAULTHANDLER": "1",
        # every tensor of a megabyte is mapped on its own, so that resident memory shows what is freed
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
    }


def launch(
    script: str | Path,
    *arguments: str,
    ranks: int = 2,
    timeout: float = 300,
    module: bool = False,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run `script` with the real deepspeed launcher on `ranks` ranks, its output merged into stdout.

    A port that somebody takes between choosing and binding gets a second and a third try. On a time-out every rank is asked for its
    stack (faulthandler) before it is killed. On a machine that has more to do than it has processors, the time-out is longer.
    """
    _check_ranks_allowed()
    build_locks.clear()
    timeout = _patient(timeout)
    deepspeed = Path(sys.executable).with_name("deepspeed")
    for _ in range(3):
        port = free_port()
        command = [str(deepspeed), "--num_accelerators", str(ranks), "--master_port", str(port)]
        command += (["--module"] if module else []) + [str(script), *arguments]
        process = subprocess.Popen(
            command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 6)  # SIGABRT: faulthandler prints every thread's stack
            try:
                output, _ = process.communicate(timeout=15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                output, _ = process.communicate()
            raise RanksFailed(f"{script} {arguments}: no end after {timeout} s\n{output[-8000:]}") from None
        finally:
            _drop_shared_memory(port)
        if process.returncode and "EADDRINUSE" in output:
            continue
        break
    if check and process.returncode:
        raise RanksFailed(f"{script} {arguments}: exit code {process.returncode}\n{output[-8000:]}")
    return subprocess.CompletedProcess(command, process.returncode, output, "")


def run_worker(name: str, job: object, folder: Path, *, ranks: int = 2, timeout: float = 300) -> Path:
    """Run tests/workers/worker_NAME.py on `ranks` ranks with `job` (JSON) and give back the folder that it wrote to.

    The ranks come from the session's pool (rank_pool.py).
    """
    _check_ranks_allowed()
    folder.mkdir(parents=True, exist_ok=True)
    job_file = folder / "job.json"
    job_file.write_text(json.dumps(job))
    script = TESTS / "workers" / f"worker_{name}.py"
    build_locks.clear()
    output = folder / "output.txt"
    for _ in range(3):
        output.write_text("")
        port = free_port()
        try:
            code = pool().run(script, (str(job_file), str(folder)), ranks=ranks, port=port, timeout=_patient(timeout), output=output)
        finally:
            _drop_shared_memory(port)
        text = output.read_text(errors="replace")
        if not (code and "EADDRINUSE" in text):
            break
    if code:
        why = f"no end after {_patient(timeout):.0f} s" if code == -1 else f"exit code {code}"
        raise RanksFailed(f"{script} {job_file}: {why}\n{text[-8000:]}")
    return folder


@functools.cache
def pool() -> RankPool:
    """The session's pool of ranks, started when it is first asked for."""
    made = RankPool(environment(), ROOT)
    atexit.register(made.close)
    return made


def _check_ranks_allowed() -> None:
    assert ranks_allowed, "a test in tests/unit that starts n ranks is marked distributed(n)"


def _patient(timeout: float) -> float:
    """A time-out that is longer on a machine that has more to do than it has processors."""
    return timeout * min(4.0, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))


def _drop_shared_memory(port: int) -> None:
    """DeepSpeed's CPU communication op leaves 69 MB a rank in shared memory (ops/csrc cpu/comm/shm.cpp) under the port's name."""
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        left.unlink(missing_ok=True)
