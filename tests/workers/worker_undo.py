"""Changes that fail at every point on real engines: each time all ranks must be back where they were. Launched by test_undo.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from reference import oracle
from reference.injected import Injector
from reference.picture import differences, picture
from reference.torch_models import full as whole
from reference.torch_models import settings, wrap
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

import smartfrz_ds
from smartfrz_ds.backends import memory
from smartfrz_ds.errors import ChangeUndone, FreezeError

FIRST, BACK, NEXT, SAVED = ["embeddings", "blocks.0", "blocks.1"], ["blocks.1"], ["blocks.2"], ["blocks.1"]


@dataclass
class Engine:
    """An engine of whatever kind.

    model: with the layers. roots: what belongs to the layout (picture.py). step: trains one step. weights: copies of all weights, whole.
    settle: shards what is gathered, which the next forward needs no matter how it finds it. users: whether the user froze blocks.3.
    """

    model: torch.nn.Module
    controller: Any
    roots: Mapping[str, Any]
    step: Callable[[int], None]
    weights: Callable[[], dict[str, Tensor]]
    close: Callable[[], None]
    users: bool
    settle: Callable[[], None] | None = None


def of_torch(kind: str, cell: oracle.Cell, more: Mapping[str, Any]) -> Engine:
    net, rank = prepared(cell, more), dist.get_rank() if dist.is_initialized() else 0
    model = wrap(kind, net, **more.get("options", {}))
    optimizer = torch.optim.AdamW(oracle.groups_of(list(model.parameters()), list(net.parameters()), cell.groups), lr=oracle.LR)
    controller = smartfrz_ds.attach_torch(model, optimizer, settings(keep_state=cell.keep_state, **more.get("settings", {})))
    params = dict(net.named_parameters())

    def step(number: int) -> None:
        optimizer.zero_grad()
        oracle.loss_of(model, *oracle.data(number, 0, rank), "fp32").backward()
        optimizer.step()

    return Engine(
        model=model,
        controller=controller,
        roots={"model": model, "optimizer": optimizer, "backend": controller.backend},
        step=step,
        weights=lambda: whole(kind, model, params),
        close=controller.detach,
        users=bool(more.get("users")),
        settle=(lambda: [m.reshard() for m in model.modules() if isinstance(m, FSDPModule)]) if kind == "fsdp2" else None,
    )


def of_deepspeed(kind: str, cell: oracle.Cell, more: Mapping[str, Any]) -> Engine:
    from deepspeed.accelerator import get_accelerator
    from workers.worker_exact import engine_for, full

    get_accelerator().is_fp16_supported = lambda: True  # torch computes fp16 on every CPU, see worker_guard.py
    engine = engine_for(cell, prepared(cell, more))[0]
    cast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cell.dtype, torch.float32)

    def step(number: int) -> None:
        x, y = oracle.data(number, 0, dist.get_rank())
        engine.backward(torch.nn.functional.cross_entropy(engine(x.to(cast)).float(), y))
        engine.step()

    return Engine(
        model=engine.module,
        controller=engine.smartfrz,
        roots={"model": engine.module, "base": engine.basic_optimizer, "wrapper": engine.optimizer, "backend": engine.smartfrz.backend},
        step=step,
        weights=lambda: full(engine.module),
        close=engine.destroy,
        users=bool(more.get("users")),
    )


def prepared(cell: oracle.Cell, more: Mapping[str, Any]) -> oracle.Net:
    """The net with a module that the user has put into eval mode, with hooks of the user's, and maybe with a layer that the user froze."""
    net = cell.net()
    if more.get("users"):
        net.blocks[3].requires_grad_(False)
    net.blocks[1].norm.eval()
    net.blocks[1].up.register_forward_pre_hook(users_hook)
    net.blocks[1].register_forward_hook(users_hook)
    return net


def users_hook(*_: Any) -> None:
    return None


class Trial:
    """One engine that trains ten steps, with four changes on the way.

    tries: whether each change is first tried with an error at each of its points, or at each n-th (stride), of each change at others.
    """

    def __init__(self, engine: Engine, injector: Injector, *, tries: bool, stride: int) -> None:
        self.engine, self.injector, self.tries, self.stride = engine, injector, tries, stride
        self.points: dict[str, list[str]] = {}
        self.wrong: list[str] = []

    def train(self) -> dict[str, Tensor]:
        """Return the weights at the end."""
        engine, controller = self.engine, self.engine.controller
        evaluated = engine.model
        self.steps(0, 2)
        self.change("freeze", lambda: controller.freeze(FIRST))
        self.steps(2, 4)
        self.change("thaw", lambda: controller.thaw(BACK))
        self.steps(4, 6)
        evaluated.eval()
        self.change("freeze while evaluating", lambda: controller.freeze(NEXT))
        self.change("thaw while evaluating", lambda: controller.thaw(FIRST[:2]))
        evaluated.train()
        self.steps(6, 7)
        if engine.users:
            self.change("thaw the user's", lambda: controller.thaw(["blocks.3"]))
        self.change("restore", lambda: controller.freeze_state.restore_layout(SAVED))
        self.steps(7, 10)
        assert controller.frozen == tuple(SAVED), controller.frozen
        return engine.weights()

    def steps(self, first: int, last: int) -> None:
        for number in range(first, last):
            self.engine.step(number)

    def change(self, name: str, action: Callable[[], None]) -> None:
        """Let the change fail at one point after another, until there is no further one: then it is carried out."""
        number = len(self.points) % self.stride
        if self.tries and self.engine.settle is not None:  # once from where the last step has left it
            self.injector.arm(10)
            with suppress(ChangeUndone):
                action()
                raise AssertionError(f"{name}: no error at point 10")
        while self.tries:
            before = self.picture()
            # on one rank after the other, then on all of them
            world = self.engine.controller.ranks.count
            struck = number // self.stride % (world + 1)
            mine = struck in (self.engine.controller.ranks.rank, world)
            self.injector.arm(number if mine else None)
            events = len(self.engine.controller.report().events)
            try:
                action()
            except ChangeUndone as error:
                self.check(f"{name}, point {number}", str(error), before, events, range(world) if struck == world else [struck])
                number += self.stride
            else:
                break
        if not self.tries:
            action()
        self.points[name] = list(self.injector.passed)

    def check(self, where: str, said: str, before: Mapping[str, str], events: int, struck: Sequence[int]) -> None:
        """struck: the ranks that were to fail. They number their points by themselves, so that one may fail before the others get there."""
        where = f"{where} ({self.injector.passed[-1]})"
        self.wrong += [f"{where}: {text}" for text in differences(before, self.picture())]
        new = self.engine.controller.report().events[events:]
        reasons = [f"failed and was undone on every rank: rank {rank}: Injected: " for rank in struck]
        if [e.kind for e in new] != ["undone"] or not any(reason in new[0].message and reason in said for reason in reasons):
            self.wrong.append(f"{where}: {said!r}, events {[(e.kind, e.message) for e in new]}")

    def picture(self) -> dict[str, str]:
        engine = self.engine
        if engine.settle is not None:
            engine.settle()
        return picture(**engine.roots, state=engine.controller._run.state)


def run(name: str, kind: str, cell: oracle.Cell, more: Mapping[str, Any], *, lines: bool, stride: int) -> dict[str, Any]:
    """Train with and without errors."""
    make = of_deepspeed if kind == "deepspeed" else of_torch
    ends, trials = [], []
    for tries in (True, False):
        injector = Injector(lines=lines and tries)
        engine = make(kind, cell, more)
        trial = Trial(engine, injector, tries=tries, stride=stride)
        with warnings.catch_warnings(), injector.installed():
            warnings.simplefilter("error", RuntimeWarning)  # of this package
            ends.append(trial.train())
        trials.append(trial)
        engine.close()
    one, other = ends
    return {
        "points": trials[0].points,
        "wrong": trials[0].wrong[:40],
        "different": [n for n in other if not torch.equal(one[n], other[n])],
    }


def stuck() -> str:
    """A freeze that fails on rank 0 and that rank 1 can't undo. Returns the error."""
    engine = of_torch("ddp", oracle.Cell("stuck"), {})
    controller, rank = engine.controller, dist.get_rank()
    engine.step(0)
    controller.last_checkpoint = "checkpoints/step-0"

    def fail() -> None:
        raise ArithmeticError(f"no way on rank {rank}")

    if rank == 0:
        controller.backend.verify = fail
    else:
        controller.backend._undo_entries = lambda *_: fail
    try:
        controller.freeze(FIRST)
    except FreezeError as error:
        return str(error)
    return ""


def no_room() -> dict[str, Any]:
    """Thaws with free host memory for one rank's share, and for both. What each said, and what is frozen at the end."""
    engine = of_torch("ddp", oracle.Cell("no room"), {})
    controller = engine.controller
    engine.step(0)
    controller.freeze(FIRST)
    params = [p for p in engine.model.parameters() if not p.requires_grad]
    need = controller.backend.memory_need((), params, keep=False).host
    said, real = [], memory.free_host_memory
    for free in (2 * need - 1, 2 * need):
        memory.free_host_memory = lambda: free if dist.get_rank() else None  # noqa: B023
        try:
            controller.thaw(FIRST)
        except ValueError as error:
            said.append(f"{type(error).__name__}: {error}")
        finally:
            memory.free_host_memory = real
    engine.step(1)
    return {"need": need, "bytes": sum(p.nbytes for p in params), "said": said, "frozen": controller.frozen}


def main() -> None:
    from workers import ranks

    with ranks.job() as (job, folder):
        if job["cases"]:
            ranks.write(folder, "no room", no_room())
            ranks.write(folder, "stuck", stuck())
        for item in job["cells"]:
            with ranks.case(item["name"]):
                found = run(
                    item["name"], item["kind"], oracle.Cell(**item["cell"]), item["more"], lines=item["lines"], stride=item["stride"]
                )
                ranks.write(folder, item["name"], found)


if __name__ == "__main__":
    main()
