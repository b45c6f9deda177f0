"""Training runs of the registered tasks: the list of runs, and how a run trains, freezes and is branched."""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smartfrz_ds.model.layers import Layer, find_layers

from .nets import NetKind
from .tasks import DataKind, Task, make_task

OptimizerKind = Literal["sgd-cosine", "adamw-constant", "adamw-cosine", "adamw-linear"]
Regime = Literal["scratch", "finetune"]
OPTIMIZERS: tuple[OptimizerKind, ...] = ("sgd-cosine", "adamw-constant", "adamw-cosine", "adamw-linear")
REGIMES: tuple[Regime, ...] = ("scratch", "finetune")
SETTINGS: tuple[tuple[NetKind, DataKind], ...] = (
    ("mlp", "digits"),
    ("mlp", "mnist"),
    ("cnn", "digits"),
    ("cnn", "mnist"),
    ("resnet", "digits"),
    ("resnet", "mnist"),
    ("vit", "digits"),
    ("vit", "mnist"),
    ("bert", "python"),
    ("bert", "news"),
    ("gpt", "python"),
    ("gpt", "news"),
)
LENGTHS = (320, 480, 640)  # steps
MLP_LONGER = 3  # a step of an MLP costs a tenth of the others', and MLPs learn more slowly
SNAPSHOT_EVERY = 2  # steps; coarser spacings are subsampled from these
EVALUATE_EVERY = 20  # steps between two similarity measurements
_PRETRAINING = 200  # steps; more for an MLP, as above
_BATCH = {"digits": 32, "mnist": 32, "python": 16, "news": 16}
_VERSION = 3  # part of every run's identity: increase it if a run with the same fields would give another result


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """One training run of a registered task, fully determined by these fields.

    Attributes:
        net: Kind of the network.
        data: Data set.
        optimizer: Optimizer and learning-rate schedule.
        regime: "scratch" or "finetune".
        seed: Seed of data and weights.
        steps: Optimizer steps, a multiple of EVALUATE_EVERY.
        freezes: Whether layers are frozen at random freezing stages during the run.
    """

    net: NetKind
    data: DataKind
    optimizer: OptimizerKind
    regime: Regime
    seed: int
    steps: int
    freezes: bool = False

    @property
    def name(self) -> str:
        """Name of the run, made of its fields."""
        parts = (self.net, self.data, self.optimizer, self.regime, self.seed, self.steps)
        return "-".join(map(str, parts)) + ("-freezes" if self.freezes else "")

    @property
    def identity(self) -> dict[str, object]:
        """Tags of its recording: the fields and the version of the code that ran it."""
        return {**asdict(self), "version": _VERSION}


def planned_runs(seed: int = 0, *, quick: bool = False) -> list[TaskRun]:
    """Return the runs of a collection: every setting, optimizer and regime once without freezes, and half of them again with freezes.

    Args:
        seed: >= 0; another seed gives other runs of the same kinds.
        quick: Five short runs instead of 96 + 48 runs with three seeds and three lengths.
    """
    if quick:
        small: tuple[tuple[NetKind, OptimizerKind, bool], ...] = (
            ("mlp", "sgd-cosine", False),
            ("mlp", "adamw-cosine", False),
            ("cnn", "sgd-cosine", False),
            ("cnn", "adamw-cosine", False),
            ("mlp", "adamw-constant", True),
        )
        return [
            TaskRun(net=net, data="digits", optimizer=optimizer, regime="scratch", seed=seed * 100, steps=200, freezes=freezes)
            for net, optimizer, freezes in small
        ]
    runs = []
    for s, (net, data) in enumerate(SETTINGS):
        for o, optimizer in enumerate(OPTIMIZERS):
            for r, regime in enumerate(REGIMES):
                k = (s * len(OPTIMIZERS) + o) * len(REGIMES) + r
                for freezes in (False, True)[: 1 + (s + o + r) % 2]:
                    longer = MLP_LONGER if net == "mlp" else 1
                    mixed = (k + freezes) % 3  # seeds and lengths are spread over all settings, independently of each other
                    runs.append(
                        TaskRun(
                            net=net,
                            data=data,
                            optimizer=optimizer,
                            regime=regime,
                            seed=seed * 100 + mixed,
                            steps=longer * LENGTHS[(k // 3 + 2 * freezes) % 3],
                            freezes=freezes,
                        )
                    )
    return runs


class Training:
    """One run of a registered task, step by step. Deterministic in its run on one thread; create it within forked random states."""

    steps_done: int
    frozen: int
    layers: tuple[Layer, ...]
    _loss: Tensor
    optimizer: torch.optim.Optimizer
    peak: float

    def __init__(self, run: TaskRun) -> None:
        assert run.steps % EVALUATE_EVERY == 0
        self.run = run
        seed = int.from_bytes(hashlib.sha256(run.name.encode()).digest()[:4], "big")
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        # Widths vary by up to a factor e^0.35, learning rates by up to e^0.7, in both directions.
        width, lr_factor = (math.exp(x) for x in (torch.rand(2) - 0.5).mul(torch.tensor([0.7, 1.4])).tolist())
        finetune = run.regime == "finetune"
        self.task: Task = make_task(run.net, run.data, run.seed, stage="first" if finetune else "scratch")
        self.net: nn.Module = self.task.network(width)
        self.total, self.lr_factor = _PRETRAINING * (MLP_LONGER if run.net == "mlp" else 1), 1.0
        if finetune:
            self._start()
            for _ in range(self.total):
                self.step()
            self.task = make_task(run.net, run.data, run.seed, stage="then")
        self.total, self.lr_factor = run.steps, lr_factor * (0.3 if finetune else 1.0)
        self._start()

    def step(self) -> float:
        """Take one optimizer step; return its learning rate."""
        lr = self.peak * schedule(self.run.optimizer, self.steps_done / self.total)
        self.optimizer.param_groups[0]["lr"] = lr
        x, y = self.task.batch(_BATCH[self.run.data], self.generator)
        loss = F.cross_entropy(self.net(x).flatten(0, -2), y.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in self.net.parameters() if p.requires_grad], 1.0, foreach=True)
        self.optimizer.step()
        self._loss = loss.detach()
        self.steps_done += 1
        return lr

    @property
    def loss(self) -> float:
        """Loss of the last step's batch, before the step."""
        return float(self._loss)

    def freeze(self, count: int) -> None:
        """Freeze the first `count` layers and their running statistics from now on."""
        for layer in self.layers[self.frozen : count]:
            for p in layer.params:
                p.requires_grad_(False)
                p.grad = None  # torch's optimizers skip such a weight
            for module in layer.modules:
                module.eval()
        self.frozen = max(self.frozen, count)

    def fork(self, *, reorder: int | None = None) -> Training:
        """Return a copy that continues independently with the same data.

        Args:
            reorder: Seed for another order of the data; None: the same order.
        """
        memo = {id(self.task): self.task, id(self.generator): self.generator}
        other = copy.deepcopy(self, memo)
        other.generator = torch.Generator()
        other.generator.set_state(self.generator.get_state())
        if reorder is not None:
            other.generator.manual_seed(reorder)
        return other

    @torch.no_grad()
    def figures(self) -> tuple[float, float]:
        """Return accuracy (0..1) and mean negative log-likelihood (nats) on the held-out test inputs."""
        modes = [(m, m.training) for m in self.net.modules()]
        self.net.eval()
        logits, answer = self.net(self.task.test).flatten(0, -2), self.task.answer.flatten()
        for module, mode in modes:
            module.training = mode
        there = answer != -100
        accuracy = float((logits.argmax(-1) == answer)[there].double().mean())
        return accuracy, float(F.cross_entropy(logits.double(), answer))

    def _start(self) -> None:
        self.steps_done, self.frozen = 0, 0
        self.layers = tuple(x for x in find_layers(self.net) if x.kind != "head")
        if self.run.optimizer == "sgd-cosine":
            self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True)
        else:
            self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
        self.peak = self.optimizer.param_groups[0]["lr"] * self.lr_factor
        self.net.train()


def schedule(optimizer: OptimizerKind, done: float) -> float:
    """Return the learning rate relative to its peak.

    Args:
        optimizer: Optimizer and schedule.
        done: Share of the run that is done, in [0, 1).

    Returns:
        A factor in [0, 1].
    """
    if optimizer == "adamw-constant":
        return 1.0
    if optimizer == "adamw-linear":
        return min(1.0, (done + 1e-3) / 0.1) * min(1.0, (1 - done) / 0.9)
    return 0.5 * (1 + math.cos(math.pi * done))


def freezing_schedule(run: TaskRun, layers: int) -> dict[int, int]:
    """Return, for a run with freezes, step -> number of layers frozen from that step on.

    There are two to four random stages between 15 % and 85 % of the run, each with one to three more layers. Many are
    too early, so that the training set shows the effect of early freezes on the layers behind them.

    Args:
        run: The run.
        layers: Its number of layers.
    """
    if not run.freezes:
        return {}
    draw = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{run.name} freezes".encode()).digest()[:4], "big"))

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    first, last = math.ceil(0.15 * run.steps / EVALUATE_EVERY), int(0.85 * run.steps / EVALUATE_EVERY)
    stages = sorted({pick(first, last) * EVALUATE_EVERY for _ in range(pick(2, 4))})
    plan, frozen = {}, 0
    for step in stages:
        frozen = min(layers - 1, frozen + pick(1, 3))
        plan[step] = frozen
    return plan


def final_figures(values: list[tuple[float, float]]) -> tuple[float, float]:
    """Average the last evaluations of a run (accuracy, loss), because single ones differ by a point near a noisy end."""
    t: Tensor = torch.tensor(values, dtype=torch.float64).mean(0)
    return float(t[0]), float(t[1])
