"""attach_torch together with what people use beside it. Cases of worker_torch.py; test_torch_together.py says what must come out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from reference import oracle
from reference.bounds import FACTOR, Noisy, distance, no_noise, noisy, spread
from reference.torch_models import full, group_of_one, load, made, refusal, save, settings, whole, wrap
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import smartfrz_ds
from smartfrz_ds.integrations import torch as torch_loop

# What freezes and thaws before which of nine steps: a prefix, one more in the middle, part of the prefix again.
PLAN = {2: ("freeze", ["embeddings", "blocks.0"]), 4: ("freeze", ["blocks.2"]), 6: ("thaw", ["blocks.0"])}
Before = Callable[[], Any]


def train(
    model: Any, optimizer: Any, controller: Any, *, alone: bool = False, numbers: range = range(9), before: Before = lambda: None
) -> None:
    """Nine steps by PLAN. alone: on the batches of both ranks, the last of them rank 0's. before: called before each optimizer step."""
    for step in numbers:
        model.train()
        if step in PLAN:
            getattr(controller, PLAN[step][0])(PLAN[step][1])
        optimizer.zero_grad()
        buffers = [b.clone() for b in model.buffers()]
        for rank in (1, 0) if alone else (dist.get_rank(),):
            for buffer, value in zip(model.buffers(), buffers, strict=True):
                if alone:  # DDP gives all ranks rank 0's
                    buffer.copy_(value)
            loss = oracle.loss_of(model, *oracle.data(step, 0, rank), "fp32")
            (loss / 2 if alone else loss).backward()
        before()
        optimizer.step()


def ended(kind: str, net: nn.Module | None = None, *, before: Callable[[Any], Any] | None = None, **more: Any) -> Tensor:
    """All weights after `train`, in one tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "alone" is a bare model in two processes
        model, optimizer, controller = made(kind, net, **more)
    params = dict(model.named_parameters())
    train(model, optimizer, controller, alone=kind == "alone", before=(lambda: before(model)) if before else lambda: None)
    return flat(full(kind, model, params))


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[n].view(-1) for n in sorted(weights)])


def apart(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def clipped(folder: Path) -> Any:
    """torch.nn.utils.clip_grad_norm_ of what is active."""
    norms: dict[str, list[float]] = {}

    def clip(kind: str, noise: Noisy = no_noise) -> Callable[[Any], None]:
        def before(model: Any) -> None:
            step = len(norms.setdefault(kind, []))
            for p in model.parameters():
                if p.grad is not None and noise is not no_noise:
                    p.grad.copy_(noise(step, p.grad))
            norms[kind].append(float(whole(nn.utils.clip_grad_norm_(model.parameters(), 0.02))))

        return before

    alone, free = ended("alone", before=clip("alone")), ended("alone")
    samples = noisy(lambda noise: ended("alone", before=clip(f"noisy {len(norms)}", noise)))
    found = {kind: distance(ended(kind, before=clip(kind)), alone) for kind in ("ddp", "fsdp2")}
    moved = [abs(a / b - 1) for kind in norms if kind.startswith("noisy") for a, b in zip(norms[kind], norms["alone"], strict=True)]
    return {
        "found": found,
        "bound": spread(samples, alone),
        "without": distance(alone, free),
        "norms": {kind: norms[kind] for kind in ("alone", *found)},
        "norm_bound": FACTOR[torch.float32] * max(moved),
    }


def nonreentrant(folder: Path) -> Any:
    """Blocks under torch.utils.checkpoint(use_reentrant=False), against one process without it."""

    def net() -> oracle.Net:
        made = oracle.Net()
        for block in made.blocks:
            block.forward = _recomputed(block.forward)
        return made

    alone = ended("alone")
    return {kind: apart(ended(kind, net()), alone) for kind in ("ddp", "fsdp2", "fsdp1")}


def _recomputed(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(forward, x, use_reentrant=False)


def normed_net() -> oracle.Net:
    """With BatchNorm in the place of LayerNorm."""
    net = oracle.Net()
    for block in net.blocks:
        block.norm = nn.BatchNorm1d(oracle.WIDTH)
    return net


def batch_norm(folder: Path) -> Any:
    """Running statistics of frozen and active layers; of DDP against one process that keeps rank 0's, as DDP does."""
    found: dict[str, Any] = {}
    for mode in ("eval", "train"):
        for kind in ("alone", "ddp", "fsdp2"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model, optimizer, controller = made(kind, normed_net(), frozen_mode=mode)
            params = dict(model.named_parameters())
            inner = controller.backend.module
            stats = {i: inner.blocks[i].norm.running_mean for i in (0, 1, 2)}
            seen: list[dict[int, Tensor]] = []
            train(model, optimizer, controller, alone=kind == "alone", before=lambda: seen.append(copy.deepcopy(stats)))  # noqa: B023
            found[f"{mode}-{kind}"] = {
                # blocks.0 is frozen before step 2 and thawed before step 6, blocks.2 is frozen before step 4
                "0 frozen": apart(seen[5][0], seen[2][0]), "0 thawed": apart(seen[6][0], seen[5][0]),
                "1 active": apart(seen[5][1], seen[4][1]), "2 frozen": apart(seen[8][2], seen[4][2]),
                "weights": flat(full(kind, model, params)).tolist(),
                "statistics": torch.cat([t.view(-1).double() for t in inner.buffers()]).tolist(),
            }  # fmt: skip
    return found


def tensor_parallel(folder: Path) -> Any:
    """Refused, with FSDP2 on a mesh of two dimensions and without any wrapper."""
    plan = {f"blocks.{i}.up": ColwiseParallel(use_local_output=False) for i in range(5)}

    def both() -> None:
        mesh = init_device_mesh(oracle.DEVICE.type, (1, 2), mesh_dim_names=("data", "tensor"))
        net = parallelize_module(oracle.Net(), mesh["tensor"], plan)
        model = fully_shard(net, mesh=mesh["data"])
        smartfrz_ds.attach_torch(model, torch.optim.AdamW(model.parameters()), settings())

    def bare() -> None:
        net = parallelize_module(oracle.Net(), init_device_mesh(oracle.DEVICE.type, (2,)), plan)
        smartfrz_ds.attach_torch(net, torch.optim.AdamW(net.parameters()), settings())

    return {"with fsdp2": refusal(both), "bare": refusal(bare)}


def save_on_one_rank(where: Path) -> None:
    """Called by the test, before it launches two."""
    with group_of_one():
        model, optimizer, controller = made("fsdp2", keep_state=100)
        train(model, optimizer, controller, alone=True, numbers=range(5))
        save(where, model, optimizer, controller)


def go_on_on_one_rank(where: Path) -> tuple[Tensor, int]:
    """The same, after it. Weights and steps at the end."""
    with group_of_one():
        model, optimizer, controller = made("fsdp2", keep_state=100)
        params = dict(model.named_parameters())
        load(where, model, optimizer, controller)
        train(model, optimizer, controller, alone=True, numbers=range(5, 9))
        return flat(full("fsdp2", model, params)), controller.step


def resized(folder: Path) -> Any:
    """A checkpoint of one rank (ck-one, which the test wrote) goes on on two, and one of two is left for the test to go on with on one."""
    model, optimizer, controller = made("fsdp2")
    params = dict(model.named_parameters())
    train(model, optimizer, controller)
    straight = flat(full("fsdp2", model, params))

    model, optimizer, controller = made("fsdp2", keep_state=100)
    train(model, optimizer, controller, numbers=range(5))
    save(folder / "ck-two", model, optimizer, controller)

    net = oracle.Net()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    model, optimizer, controller = made("fsdp2", net, keep_state=100)
    params = dict(model.named_parameters())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load(folder / "ck-one", model, optimizer, controller)
    train(model, optimizer, controller, numbers=range(5, 9))
    again = flat(full("fsdp2", model, params))
    return {
        "difference": apart(straight, again),
        "said": [str(w.message) for w in said if w.category is RuntimeWarning],
        "weights": straight.tolist(),
        "step": controller.step,
    }


def disagreeing(folder: Path) -> Any:
    """Rank 1 comes with something else than rank 0: what each rank says in attach_torch."""
    other = dist.get_rank() == 1
    said: dict[str, str] = {}

    def narrow() -> oracle.Net:
        net = oracle.Net()
        if other:
            net.blocks[1].up, net.blocks[1].down = nn.Linear(oracle.WIDTH, oracle.WIDTH), nn.Linear(oracle.WIDTH, oracle.WIDTH)
        return net

    def half() -> oracle.Net:
        net = oracle.Net()
        net.inp.requires_grad_(not other)
        return net

    def version() -> None:
        own = torch_loop.__version__
        torch_loop.__version__ = "0.0.1" if other else own
        try:
            made("ddp")
        finally:
            torch_loop.__version__ = own

    def optimizer() -> None:
        model = wrap("fsdp2", oracle.Net())
        kind = torch.optim.SGD if other else torch.optim.AdamW
        smartfrz_ds.attach_torch(model, kind(model.parameters(), lr=0.1), settings())

    def missing_file() -> None:
        (folder / "settings.0.json").write_text('{"smartfrz": {"policy": "manual"}}')
        model = wrap("ddp", oracle.Net())
        smartfrz_ds.attach_torch(model, torch.optim.AdamW(model.parameters()), folder / f"settings.{dist.get_rank()}.json")

    said["version"] = refusal(version)
    said["settings"] = refusal(lambda: made("ddp", seed=1 if other else 0))
    said["a file that is missing"] = refusal(missing_file)
    said["shapes in fsdp2"] = refusal(lambda: made("fsdp2", narrow()))
    said["shapes in fsdp1"] = refusal(lambda: made("fsdp1", narrow()))
    said["frozen by the user"] = refusal(lambda: made("fsdp2", half()))
    said["optimizers"] = refusal(optimizer)
    return said


def unwritable(folder: Path) -> Any:
    """One rank can't write its part of the freeze state; the run goes on and saves elsewhere."""
    model, optimizer, controller = made("fsdp2", keep_state=100)
    train(model, optimizer, controller, numbers=range(3))
    said = []
    for rank in (0, 1):
        blocked = folder / f"blocked-{rank}"
        if dist.get_rank() == rank:
            blocked.write_text("a file where a folder should be")
        where = blocked if dist.get_rank() == rank else folder / f"fine-{rank}-{dist.get_rank()}"
        try:
            controller.save(where / "ck")
        except (OSError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    train(model, optimizer, controller, numbers=range(3, 5))
    controller.save(folder / "ck-unwritable")
    return said


def compiled(folder: Path) -> Any:
    """torch.compile inside and around the wrapper, against one process that is not compiled."""

    def blocks_in_fsdp2() -> Any:
        net = oracle.Net()
        for block in net.blocks:
            block.compile(backend="aot_eager")
        return wrap("fsdp2", net)

    ways: dict[str, Callable[[], Any]] = {
        "in ddp": lambda: DistributedDataParallel(torch.compile(oracle.Net(), backend="aot_eager")),
        "around ddp": lambda: torch.compile(DistributedDataParallel(oracle.Net()), backend="aot_eager"),
        "blocks in fsdp2": blocks_in_fsdp2,
        "around fsdp2": lambda: torch.compile(wrap("fsdp2", oracle.Net()), backend="aot_eager"),
    }
    alone = ended("alone")
    found = {}
    for name, make in ways.items():
        torch.compiler.reset()
        model = make()
        params = dict(model.named_parameters())
        optimizer = torch.optim.AdamW(model.parameters(), lr=oracle.LR, weight_decay=oracle.DECAY)
        controller = smartfrz_ds.attach_torch(model, optimizer, settings())
        train(model, optimizer, controller)
        weights = {n.replace("_orig_mod.", "").removeprefix("module."): whole(p) for n, p in params.items()}
        found[name] = apart(flat(weights), alone)
    return found


ALL = (clipped, nonreentrant, batch_norm, tensor_parallel, resized, disagreeing, unwritable, compiled)
