"""Ranks to which a fault happens. Started by test_faults.py, one process for each rank, without a launcher that would end the survivors.

The process imports what ranks need once, and forks a rank for each run, in step with the other process (files say who is done). A run's
output and how it ended lie in FOLDER/NAME.RANK.out and .json.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.comm.torch import build_shm_op
from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401
from reference import oracle
from reference.torch_models import full as whole
from reference.torch_models import load, save, wrap
from safetensors.torch import save_file
from workers import ranks
from workers.worker_exact import engine_for, full

import smartfrz_ds
from smartfrz_ds.backends.transaction import Transaction
from smartfrz_ds.distributed import failures as faults
from smartfrz_ds.integrations import deepspeed as engine_module

# Freezes after steps 2, 4 and 6 of 8.
SETTINGS: dict[str, Any] = {
    "policy": "linear",
    "linear": {"start_step": 1, "end_step": 5},
    "snapshot_interval": 1,
    "freeze_interval": 2,
    "warmup_steps": 2,
    "cooldown": 0,
}
Happens = Callable[[Any], None]  # gets the engine


def die(_: Any = None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def unplug(_: Any) -> None:
    subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)


def die_deciding(engine: Any) -> None:
    engine.smartfrz._policy_stage.policy.decide = die


def fail_deciding(engine: Any) -> None:
    def decide(_: Any) -> Any:
        raise ArithmeticError("no idea")

    engine.smartfrz._policy_stage.policy.decide = decide


def fail_freezing(engine: Any) -> None:
    def install(*_: Any, **__: Any) -> None:
        raise MemoryError("no room for the new layout")

    engine.smartfrz.backend.install = install


def die_freezing(_: Any) -> None:
    Transaction.vote = die  # type: ignore[method-assign, assignment]


def full_disk(_: Any) -> None:
    """From now on the kernel lets this process write no file of more than 20 kB, which is more than the freeze state has and less than
    the optimizer's state: the beginning is written, the rest refused, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def die_saving(engine: Any) -> None:
    engine.smartfrz.freeze_state.sync = die


def raise_in_step(_: Any) -> None:
    raise ValueError("a bug in somebody's script")


# In the loop, before the step that the run names. What the others do is what is tested.
IN_THE_LOOP: dict[str, Happens] = {
    "dies": die,
    "hangs": stop,
    "link down": unplug,
    "dies deciding": die_deciding,
    "dies saving": die_saving,
    "policy fails": fail_deciding,
    "fails freezing": fail_freezing,
    "dies freezing": die_freezing,
    "disk full": full_disk,
    "script raises": raise_in_step,
}


def other_version() -> None:
    engine_module.__version__ = faults.__version__ = "0.0.1"


def train(run: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    """One rank of one run, as a user would write it."""
    deepspeed.init_distributed(dist_backend=ranks.communication_backend(), timeout=timedelta(seconds=run["timeout"]), verbose=False)
    mine = run["fault"] if run["rank"] == rank else ""
    cell = oracle.Cell(**run["cell"])
    if mine == "other version":
        other_version()
    config: dict[str, Any] = {"smartfrz": SETTINGS | {"total_steps": cell.steps}}
    if mine == "other settings":
        config["smartfrz"]["freeze_interval"] = 3
    if mine == "other stage":
        config["zero_optimization"] = {"stage": 3}
    cell = dataclasses.replace(cell, config=config, blocks=4 if mine == "other model" else cell.blocks)
    engine = engine_for(cell, cell.net())[0]
    engine.load_checkpoint(str(folder / "checkpoints"))
    start = engine.smartfrz.step
    for step in range(start, cell.steps):
        if mine in IN_THE_LOOP and step == run["step"]:
            IN_THE_LOOP[mine](engine)
        x, y = oracle.data(step, 0, rank)
        engine.backward(oracle.loss_of(engine, x, y, cell.dtype))
        engine.step()
        if (step + 1) % 2 == 0:
            try:
                engine.save_checkpoint(str(folder / "checkpoints"))
            except (OSError, RuntimeError):
                if run["fault"] != "disk full":
                    raise
                traceback.print_exc()  # this script goes on training without this checkpoint
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    weights = full(engine.module)
    if rank == 0:
        save_file({n: w.contiguous() for n, w in weights.items()}, folder / "final.safetensors")
    return end_of(engine.smartfrz, start)


def train_torch(run: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    """The same without DeepSpeed."""
    dist.init_process_group(ranks.communication_backend(), timeout=timedelta(seconds=run["timeout"]))
    mine, cell = run["fault"] if run["rank"] == rank else "", oracle.Cell(**run["cell"])
    model = wrap(run["kind"], cell.net() if mine != "other model" else oracle.Net(cell.width, 4))
    params = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(params.values(), lr=oracle.LR, weight_decay=oracle.DECAY)
    scheduler = oracle.schedule(optimizer)
    section = SETTINGS | {"total_steps": cell.steps}
    controller = smartfrz_ds.attach_torch(model, optimizer, section, scheduler=scheduler)
    if saved := sorted((folder / "checkpoints").glob("step-*/.metadata")):
        load(saved[-1].parent, model, optimizer, controller)
        scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": controller.step, "_step_count": controller.step + 1})
    start = controller.step
    for step in range(start, cell.steps):
        if mine in IN_THE_LOOP and step == run["step"]:
            IN_THE_LOOP[mine](SimpleNamespace(smartfrz=controller))
        optimizer.zero_grad()
        oracle.loss_of(model, *oracle.data(step, 0, rank), cell.dtype).backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % 2 == 0:
            save(folder / "checkpoints" / f"step-{step + 1}", model, optimizer, controller)
    weights = whole(run["kind"], model, params)
    if rank == 0:
        save_file({n: w.contiguous() for n, w in weights.items()}, folder / "final.safetensors")
    return end_of(controller, start)


def end_of(controller: Any, start: int) -> dict[str, Any]:
    """Leave the group; what the test asks of a run that came to its end."""
    dist.barrier()
    dist.destroy_process_group()
    events = controller.report().events
    return {
        "start": start,
        "frozen": list(controller.frozen),
        "frozen_at": {e.step: list(e.layers) for e in events if e.kind == "freeze"},
    }


def child(run: dict[str, Any], rank: int, folder: Path) -> None:
    """The forked rank: its end is that of a process of its own."""
    out = os.open(folder / f"{run['name']}.{rank}.out", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= {"MASTER_PORT": str(run["port"])}
    faulthandler.dump_traceback_later(run["timeout"] + 30)
    code = 0
    try:
        saw = (train_torch if run["kind"] else train)(run, rank, folder / run["folder"])
        (folder / f"{run['name']}.{rank}.saw").write_text(json.dumps(saw))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fork(run: dict[str, Any], rank: int, folder: Path) -> None:
    """Fork a rank and see it to its end, or to its time limit."""
    busy = None
    if run["fault"] == "port taken" and rank == 0:
        busy = socket.create_server((os.environ["MASTER_ADDR"], run["port"]))
    (folder / run["folder"]).mkdir(exist_ok=True)
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(run, rank, folder)
    ended = None
    while ended is None:
        found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        seconds = time.monotonic() - began
        if found and not os.WIFSTOPPED(status):
            ended = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        elif found:  # stopped for good: the others must end all the same
            wait_for(folder, f"{run['name']}.{1 - rank}.json", 60)
            os.kill(pid, signal.SIGKILL)
        elif seconds > run["timeout"] + 40:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    if busy is not None:
        busy.close()
    if run["fault"] == "link down":
        wait_for(folder, f"{run['name']}.{1 - rank}.json", 60, but=rank == 0)
        subprocess.run(["ip", "link", "set", "eth0", "up"], check=False)
    (folder / f"{run['name']}.{rank}.json").write_text(json.dumps({"code": ended, "seconds": seconds}))


def wait_for(folder: Path, name: str, seconds: float, *, but: bool = False) -> None:
    end = time.monotonic() + seconds
    while not but and not (folder / name).exists() and time.monotonic() < end:
        time.sleep(0.02)


def main() -> None:
    torch.set_num_threads(oracle.THREADS)
    runs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    # What ranks load late is loaded once, not in every fork; muon_optimizer brings torch's compiler, which takes seconds.
    build_shm_op()
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    for run in runs:
        fork(run, rank, folder)
        wait_for(folder, f"{run['name']}.{1 - rank}.json", 120)


if __name__ == "__main__":
    main()
