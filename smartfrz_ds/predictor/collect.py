"""Trains one small network and writes down how its layers moved and how like their final selves they were on the way."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from smartfrz_ds.policies.base import LayerKind

from .similarity import centered_gram, gram_cka
from .tasks import DataKind, Net, NetKind, Task, build, image_task, text_task

OptimizerKind = Literal["sgd-cosine", "adamw-constant", "adamw-cosine", "adamw-linear"]
Regime = Literal["scratch", "finetune"]

SNAPSHOT_EVERY = 2  # steps; coarser spacings are made from these
EVALUATE_EVERY = 20  # steps between two similarity measurements
SAMPLE_SIZE = 256  # weights a layer
_RECORDING_VERSION = 1  # part of the cache key: raise it when a run of the same Run would come out differently
_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of the collection, fully determined by these fields. steps: optimizer steps, a multiple of EVALUATE_EVERY."""

    net: NetKind
    data: DataKind
    optimizer: OptimizerKind
    regime: Regime
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.net}-{self.data}-{self.optimizer}-{self.regime}-{self.seed}-{self.steps}"


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What a run left behind.

    kinds: of each layer, front to back. steps: (snapshots,) int64, 0 first. weights: (layers, snapshots, SAMPLE_SIZE) fp32, fixed
    indices (smaller layers repeat). lr_spent: (snapshots,) fp64. lr_total: sum of all learning rates. cka: (evaluations, layers)
    fp64, similarity to the end of the run. cka_steps: (evaluations,) int64, 0 first. accuracy: of the final model, held out, 0..1.
    seconds, cpu_seconds: what it took to record, pretraining included.
    """

    run: Run
    kinds: tuple[LayerKind, ...]
    steps: Tensor
    weights: Tensor
    lr_spent: Tensor
    lr_total: float
    cka: Tensor
    cka_steps: Tensor
    accuracy: float
    seconds: float
    cpu_seconds: float


def plan(seed: int, quick: bool) -> list[Run]:
    """The runs of a collection: 2 seeds of every network, data set, optimizer and regime, 112 in all; quick: four short ones."""
    if quick:
        quick_nets: tuple[NetKind, ...] = ("mlp", "vit")
        return [
            Run(net=net, data="digits", optimizer=optimizer, regime="scratch", seed=seed, steps=120)
            for net in quick_nets
            for optimizer in ("sgd-cosine", "adamw-constant")
        ]
    optimizers: tuple[OptimizerKind, ...] = ("sgd-cosine", "adamw-constant", "adamw-cosine", "adamw-linear")
    regimes: tuple[Regime, ...] = ("scratch", "finetune")
    image_nets: tuple[NetKind, ...] = ("mlp", "cnn", "vit")
    image_data: tuple[DataKind, ...] = ("digits", "mnist")
    settings: list[tuple[NetKind, DataKind]] = [(n, d) for n in image_nets for d in image_data] + [("gpt", "text")]
    return [
        Run(net=net, data=data, optimizer=optimizer, regime=regime, seed=seed * 100 + i, steps=steps)
        for net, data in settings
        for optimizer in optimizers
        for regime in regimes
        for i, steps in enumerate((720, 400))
    ]


def record(run: Run) -> Recording:
    """Trains and records. Deterministic in `run` on one thread; leaves the global generator as it was."""
    assert run.steps % EVALUATE_EVERY == 0
    began, cpu_began = time.perf_counter(), time.process_time()
    with torch.random.fork_rng(devices=[]):
        seed = int.from_bytes(hashlib.sha256(run.name.encode()).digest()[:4], "big")
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        # Widths up to a factor e^0.35, learning rates up to e^0.7 from the middle, both ways.
        width, lr_factor = (math.exp(x) for x in (torch.rand(2) - 0.5).mul(torch.tensor([0.7, 1.4])).tolist())
        net = build(run.net, width)
        finetune = run.regime == "finetune"
        if finetune:
            _train(net, _task(run, first=True), run.optimizer, 300, 1.0, generator)
        recording = _record(run, net, _task(run, first=False), lr_factor * (0.3 if finetune else 1.0), generator)
    return replace(recording, seconds=time.perf_counter() - began, cpu_seconds=time.process_time() - cpu_began)


def collect(run: Run, cache: Path | None = None) -> Recording:
    """The recording of a run, from the cache folder when it is there, else made and put there. A damaged file is made anew."""
    if cache is None:
        return record(run)
    path = cache / f"{run.name}-v{_RECORDING_VERSION}.safetensors"
    if path.is_file():
        try:
            return _read(path, run)
        except (SafetensorError, KeyError, ValueError):
            path.unlink()
    recording = record(run)
    _write(recording, path)
    return recording


def _task(run: Run, *, first: bool) -> Task:
    """first: what a fine-tuned network was trained on before (classes 0-4, program text); its run then is on the rest."""
    if run.data == "text":
        return text_task("code" if first else "prose", run.seed)
    if run.regime == "scratch":
        return image_task(run.data, range(10), run.seed)
    return image_task(run.data, range(5) if first else range(5, 10), run.seed)


def _record(run: Run, net: Net, task: Task, lr_factor: float, generator: torch.Generator) -> Recording:
    matrices = [_matrices(layer) for layer in net.layers]
    index = [torch.randint(sum(p.numel() for p in ps), (SAMPLE_SIZE,), generator=generator) for ps in matrices]
    steps, snapshots, spent, cka_steps, grams = [], [], [], [], []

    def observe(step: int, lr_spent: float) -> None:
        if step % SNAPSHOT_EVERY == 0:
            steps.append(step)
            spent.append(lr_spent)
            snapshots.append(torch.stack([torch.cat([p.detach().flatten() for p in ps])[i] for ps, i in zip(matrices, index, strict=True)]))
        if step % EVALUATE_EVERY == 0:
            cka_steps.append(step)
            grams.append(_grams(net, task.probe))

    lr_total = _train(net, task, run.optimizer, run.steps, lr_factor, generator, observe)
    net.eval()
    with torch.no_grad():
        accuracy = float((net(task.probe).argmax(-1) == task.answer).double().mean())
    return Recording(
        run=run,
        kinds=tuple(net.kinds),
        steps=torch.tensor(steps),
        weights=torch.stack(snapshots, 1),
        lr_spent=torch.tensor(spent, dtype=torch.float64),
        lr_total=lr_total,
        cka=torch.tensor([[gram_cka(now, end) for now, end in zip(row, grams[-1], strict=True)] for row in grams], dtype=torch.float64),
        cka_steps=torch.tensor(cka_steps),
        accuracy=accuracy,
        seconds=0.0,
        cpu_seconds=0.0,
    )


def _matrices(layer: nn.Module) -> list[Tensor]:
    """Weights with two or more dimensions: norms and biases move by other rules."""
    return [p for p in layer.parameters() if p.ndim >= 2]


def _grams(net: Net, probe: Tensor) -> list[Tensor]:
    net.eval()
    with torch.no_grad():
        states = net.states(probe)
    net.train()
    if probe.dtype == torch.int64:  # text: two late positions of each sequence are two inputs
        states = [s[:, [15, 31]].flatten(0, 1) for s in states]
    return [centered_gram(s) for s in states]


def _train(
    net: Net,
    task: Task,
    optimizer: OptimizerKind,
    steps: int,
    lr_factor: float,
    generator: torch.Generator,
    observe: _Observe | None = None,
) -> float:
    """Trains for `steps` steps, calls observe before the first and after every one, and returns the sum of all learning rates."""
    if optimizer == "sgd-cosine":
        opt: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)
    else:
        opt = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    peak = opt.param_groups[0]["lr"] * lr_factor
    spent = 0.0
    net.train()
    if observe is not None:
        observe(0, 0.0)
    for step in range(steps):
        lr = peak * _schedule(optimizer, step / steps)
        opt.param_groups[0]["lr"] = lr
        x, y = task.batch(_BATCH, generator)
        loss = F.cross_entropy(net(x).flatten(0, -2), y.flatten())
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        spent += lr
        if observe is not None:
            observe(step + 1, spent)
    return spent


def _schedule(optimizer: OptimizerKind, done: float) -> float:
    """The learning rate over its peak at a share `done` of the run, in [0, 1)."""
    if optimizer == "adamw-constant":
        return 1.0
    if optimizer == "adamw-linear":
        return min(1.0, (done + 1e-3) / 0.1) * min(1.0, (1 - done) / 0.9)
    return 0.5 * (1 + math.cos(math.pi * done))


_TENSORS = ("steps", "weights", "lr_spent", "cka", "cka_steps")
_FIELDS = ("kinds", "lr_total", "accuracy", "seconds", "cpu_seconds")


class _Observe(Protocol):
    """The type of a callback: (step, lr_spent) -> None."""

    def __call__(self, step: int, lr_spent: float, /) -> None: ...


def _write(recording: Recording, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    tensors = {name: getattr(recording, name).contiguous() for name in _TENSORS}
    header = {"run": asdict(recording.run), **{name: getattr(recording, name) for name in _FIELDS}}
    save_file(tensors, partial, metadata={"recording": json.dumps(header)})
    os.replace(partial, path)


def _read(path: Path, run: Run) -> Recording:
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {})["recording"])
        if header["run"] != asdict(run):
            raise ValueError(f"{path} holds another run")
        tensors = {name: file.get_tensor(name) for name in _TENSORS}
    fields = {name: header[name] for name in _FIELDS}
    return Recording(run=run, **(fields | {"kinds": tuple(fields["kinds"])}), **tensors)
