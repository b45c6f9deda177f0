"""Worker processes of `smartfrz bench policies`: each imports DeepSpeed once and does many runs. A dead one is replaced."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import suppress
from pathlib import Path

from smartfrz_ds.distributed.devices import accelerator_for

from .runs import Job

_TAIL = 3000  # characters of a dead worker's output in the message


class Pool:
    """Worker processes that are started when they are first needed, and kept between calls of `run`.

    Args:
        out: Results go to out/runs/NAME.json, the workers' output to out/log/worker-N.txt, pretrained networks to out/cache.
        workers: Number of processes, >= 1.
    """

    def __init__(self, out: Path, workers: int) -> None:
        self._crew = [_Worker(out, number) for number in range(workers)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes, at once if one is at work."""
        for worker in self._crew:
            if worker.idle:
                worker.close()
            else:
                worker.stop()

    def run(self, jobs: Sequence[Job]) -> Generator[tuple[Job, str | None]]:
        """Run jobs in parallel. Closing the iterator early ends the processes.

        Yields:
            Each job when it has ended, with None or its error.
        """
        todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in jobs:
            todo.put(job)
        ended: queue.SimpleQueue[tuple[Job, str | None]] = queue.SimpleQueue()
        crew = self._crew[: len(jobs)]
        threads = [threading.Thread(target=_work, args=(worker, todo, ended), daemon=True) for worker in crew]
        for thread in threads:
            thread.start()
        try:
            for _ in jobs:
                yield ended.get()
        except BaseException:
            for worker in crew:
                worker.stop()
            raise
        finally:
            for thread in threads:
                thread.join(timeout=10)


def result_file(out: Path, job: Job) -> Path:
    """Return the file of a job's result."""
    return out / "runs" / f"{job.name}.json"


def _work(worker: _Worker, todo: queue.SimpleQueue[Job], ended: queue.SimpleQueue[tuple[Job, str | None]]) -> None:
    while not worker.stopped:
        try:
            job = todo.get_nowait()
        except queue.Empty:
            return
        try:
            worker.idle = False
            error = worker.do(job)
        except Exception as failure:  # the consumer waits for this job's end
            error = f"{type(failure).__name__}: {failure}"
        worker.idle = True
        ended.put((job, error))


class _Worker:
    """One process (worker.py) at a time; `do` starts it if there is none."""

    def __init__(self, out: Path, number: int) -> None:
        self._out = out
        self._log = out / "log" / f"worker-{number}.txt"
        self._process: subprocess.Popen[str] | None = None
        self.stopped = False
        self.idle = True

    def do(self, job: Job) -> str | None:
        """Run a job and wait for its end. Returns None or the error."""
        process = self._process
        if process is None:
            self._process = process = self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"job": job.to_json(), "file": str(result_file(self._out, job))}) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)["error"]
        self._process = None
        code = _end(process)
        return f"the worker died with exit code {code}; the end of {self._log}:\n{self._log.read_text(errors='replace')[-_TAIL:]}"

    def close(self) -> None:
        """Close the process's input, which ends it, and wait."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def stop(self) -> None:
        """Terminate the process."""
        self.stopped = True
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()

    def _start(self) -> subprocess.Popen[str]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "smartfrz_ds.bench.policies.worker", str(self._out / "cache")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": accelerator_for(1), "TOKENIZERS_PARALLELISM": "false"}
        with self._log.open("a") as log:  # the process has its own handle
            return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)


def _end(process: subprocess.Popen[str]) -> int:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
    return process.wait()
