"""A session's pool of ranks: importing DeepSpeed is paid once, and each job gets fresh processes.

With an accelerator other than the CPU every rank is a process of its own from the start: a driver does not survive a fork.

`RankPool` starts one process that imports torch, DeepSpeed, transformers and the package, and waits. For each job it forks the ranks, which
set the environment that the deepspeed launcher would set and run the worker as `__main__`. A fork has all imports and none of an earlier
job's state: no process group, no engine, no hook. The parent never starts a thread of torch's or a process group, which would not survive
a fork. What it imported is frozen for the garbage collector: a rank's `gc.collect()` looks at the rank's own objects only.

Tests of launchers start ranks of their own (`helpers.launch`).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

FORKS = os.environ.get("DS_ACCELERATOR", "cpu") == "cpu"


class RankPool:
    """The client's side; one a test session.

    Args:
        environment: of the ranks.
    """

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            env=environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: Path, arguments: tuple[str, ...], *, ranks: int, port: int, timeout: float, output: Path) -> int:
        """Run `script` on `ranks` ranks, their output merged into the file `output`. Returns the first exit code that is not 0, else 0.

        On a time-out every rank prints its stack (faulthandler) and is killed; the code is -1.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        job = {"script": str(script), "arguments": arguments, "ranks": ranks, "port": port, "timeout": timeout, "output": str(output)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the pool of ranks ended with exit code {self._process.wait()}")
        return int(json.loads(answer)["code"])

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def serve() -> None:
    """The pool's process: reads a job a line from standard input, answers with a line each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not look like an answer
    if FORKS:
        preload()
    gc.collect()
    gc.freeze()
    assert threading.active_count() == 1, threading.enumerate()
    for line in sys.stdin:
        answers.write(json.dumps({"code": run_job(json.loads(line))}) + "\n")
        answers.flush()


def preload() -> None:
    """Load what most workers need, and what DeepSpeed and torch load late: muon and the first optimizer bring torch's compiler."""
    import peft  # noqa: F401
    import torch
    import torch.distributed.fsdp
    from deepspeed.comm.torch import build_shm_op
    from torch.utils import _pytree  # noqa: F401
    from transformers import BertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM, Trainer  # noqa: F401

    import smartfrz_ds

    with contextlib.suppress(ImportError):  # since DeepSpeed 0.17.2
        from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401
    smartfrz_ds.attach, smartfrz_ds.attach_torch  # noqa: B018 - their modules are loaded at the first access
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    build_shm_op()


def run_job(job: dict[str, Any]) -> int:
    """Fork the ranks of a job and wait for them. A rank that fails ends the others, as the launcher does."""
    start = fork_rank if FORKS else start_rank
    children = [start(rank, job) for rank in range(job["ranks"])]
    deadline, code, left = time.monotonic() + job["timeout"], 0, set(children)
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in left:
            left.remove(pid)
            ended = os.waitstatus_to_exitcode(status)
            if ended and (not code or ended < 0 < code):  # a kill is the reason for the errors of the others
                code = ended
                # the others may be about to fail by themselves, with the better message
                deadline = min(deadline, time.monotonic() + 20)
        elif time.monotonic() > deadline:
            code = code or -1
            for child in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGABRT)  # faulthandler prints every thread's stack
            for child in left:
                os.waitpid(child, 0)
            break
        else:
            time.sleep(0.01)
    return code


def fork_rank(rank: int, job: dict[str, Any]) -> int:
    """Fork a rank, and return its process's number."""
    return os.fork() or become_rank(rank, job)


def own_device(rank: int) -> int:
    """The index of a rank's device, which it shares with others where there are fewer."""
    import torch

    return rank % max(1, torch.accelerator.device_count())


def start_rank(rank: int, job: dict[str, Any]) -> int:
    """Start a rank as a process of its own, and return its number. `run_job` waits for it."""
    return os.posix_spawn(sys.executable, [sys.executable, str(Path(__file__)), str(rank), json.dumps(job)], os.environ)


def become_rank(rank: int, job: dict[str, Any]) -> int:
    """In the fork: run the worker, and never return."""
    code = 1
    try:
        os.setpgid(0, 0)
        out = os.open(job["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        numbers = {
            "RANK": rank,
            "LOCAL_RANK": rank if FORKS else own_device(rank),
            "WORLD_SIZE": job["ranks"],
            "LOCAL_WORLD_SIZE": job["ranks"],
            "CROSS_RANK": 0,
        }
        os.environ.update({key: str(number) for key, number in numbers.items()} | {"CROSS_SIZE": "1", "LOCAL_SIZE": str(job["ranks"])})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
        import faulthandler

        faulthandler.enable(file=sys.__stderr__, all_threads=True)
        sys.argv = [job["script"], f"--local_rank={rank}", *job["arguments"]]
        sys.path[0] = str(Path(job["script"]).parent)
        runpy.run_path(job["script"], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        become_rank(int(sys.argv[1]), json.loads(sys.argv[2]))
    serve()
