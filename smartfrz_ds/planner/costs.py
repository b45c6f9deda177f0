"""Costs of layers and of a cluster, measured (a JSON file) or estimated from the shape of a GPT."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Cost of one layer on one device. All values must be finite and >= 0.

    Attributes:
        forward: Seconds per micro-batch.
        backward_input: Seconds per micro-batch for the gradient of the layer's input.
        backward_weight: Seconds per micro-batch for the gradients of its weights.
        optimizer: Seconds of its update, once per step.
        weights: Number of weights that train while the layer is active.
        output_bytes: Bytes sent to the next stage per micro-batch if the pipeline is cut behind the layer; its
            gradient is as large.
        activation_bytes: Bytes kept for its backward per micro-batch while the layer is active.

    Raises:
        ValueError: A value is negative or not finite.
    """

    forward: float
    backward_input: float
    backward_weight: float
    optimizer: float = 0.0
    weights: int = 0
    output_bytes: int = 0
    activation_bytes: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _check(name, value, math.isfinite(value) and value >= 0, "a finite number >= 0")


@dataclass(frozen=True, kw_only=True)
class Link:
    """A connection between ranks.

    Attributes:
        latency: Seconds of the smallest message or collective, >= 0.
        bandwidth: Bytes per second that a rank sends, > 0.
    """

    latency: float = 0.0
    bandwidth: float = math.inf

    def __post_init__(self) -> None:
        _check("latency", self.latency, math.isfinite(self.latency) and self.latency >= 0, "a finite number of seconds >= 0")
        _check("bandwidth", self.bandwidth, self.bandwidth > 0, "bytes/s > 0")

    def seconds(self, count: float) -> float:
        """Return the seconds in which one message of `count` bytes is sent."""
        return self.latency + count / self.bandwidth


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one rank sends to the other replicas of its stage in a step, with ring algorithms.

    Attributes:
        reduced: Bytes of gradients.
        gathered: Bytes of weights.
        collectives: Minimum number of times that the latency is paid.
    """

    reduced: float = 0.0
    gathered: float = 0.0
    collectives: int = 0

    @property
    def total(self) -> float:
        """Bytes of gradients and weights."""
        return self.reduced + self.gathered


@dataclass(frozen=True, kw_only=True)
class Tied:
    """A weight that several layers use (TiedLayerSpec).

    Attributes:
        layers: Positions of the layers, at least 2.
        nbytes: Bytes of the weight's gradient.
    """

    layers: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The cluster on which a step runs.

    Attributes:
        replicas: Data-parallel copies of each stage, >= 1.
        zero: ZeRO stage (2 and 3 only without a pipeline, as in DeepSpeed).
        between_stages: Link from a stage to the next.
        between_replicas: Link from a rank to the other replicas of its stage.
        gradient_bytes: Bytes of one element of a gradient, also when it is reduced.
        weight_bytes: Bytes of one weight, also when it is gathered.
        state_bytes: Bytes of optimizer state per weight (12: fp32 master weight and two moments), shared by the
            replicas under ZeRO.
        replicated_frozen: ZeRO-3 only: frozen weights are whole on every rank and no longer gathered ("zero3":
            {"frozen": "replicated"}).
        overlap: Without a pipeline: communication is hidden behind computation as far as possible ("overlap_comm"). A
            pipeline engine reduces after its last backward, so nothing is hidden there.
        norm: Whether all stages synchronize between the reduction and the update. Clipping, ZeRO and bf16 do; fp32
            without both does not.
        tied: Weights used by several layers.
        tied_frozen: `"tied": "freeze"`: the whole weight freezes with its front use.

    Raises:
        ValueError: `replicas` or `zero` is out of range.
    """

    replicas: int = 1
    zero: int = 0
    between_stages: Link = field(default_factory=Link)
    between_replicas: Link = field(default_factory=Link)
    gradient_bytes: int = 2
    weight_bytes: int = 2
    state_bytes: int = 12
    replicated_frozen: bool = False
    overlap: bool = False
    norm: bool = True
    tied: tuple[Tied, ...] = ()
    tied_frozen: bool = False

    def __post_init__(self) -> None:
        _check("replicas", self.replicas, self.replicas >= 1, "an integer >= 1")
        _check("zero", self.zero, self.zero in (0, 1, 2, 3), "0, 1, 2 or 3")

    def traffic(self, active: int, frozen: int, micro_batches: int) -> Traffic:
        """Compute the traffic between the replicas of one stage, per step and rank.

        Gradients are all-reduced, also under ZeRO-1 and 2 (stage_1_and_2.py, `use_multi_rank_bucket_allreduce`, on by
        default); under ZeRO-2 in each micro-batch. ZeRO-1 and 2 gather the updated weights once. ZeRO-3 gathers all
        weights for each forward and the active ones again for each backward, and reduce-scatters the gradients of
        each micro-batch.

        Args:
            active: Weights of the stage that train.
            frozen: Weights of the stage that do not train.
            micro_batches: Micro-batches per step.
        """
        share = (self.replicas - 1) / self.replicas
        if not share:
            return Traffic()
        gradients, kept = share * self.gradient_bytes * active, share * self.weight_bytes * active
        if self.zero == 3:
            standing = 0.0 if self.replicated_frozen else share * self.weight_bytes * frozen
            gathers = (int(active + standing > 0) + int(active > 0)) * micro_batches
            return Traffic(
                reduced=gradients * micro_batches,
                gathered=(2 * kept + standing) * micro_batches,
                collectives=gathers + int(active > 0) * micro_batches,
            )
        reductions = micro_batches if self.zero == 2 else 1
        return Traffic(
            reduced=2 * gradients * reductions,
            gathered=kept if self.zero else 0.0,
            collectives=int(active > 0) * (reductions + int(self.zero > 0)),
        )

    def memory(self, costs: Sequence[LayerCost], frozen: int) -> list[float]:
        """Return the memory that each layer takes on its rank, without activations.

        A frozen layer only keeps its weights.

        Args:
            costs: Costs of the layers, front to back.
            frozen: Number of frozen front layers.

        Returns:
            Bytes of each layer on its rank, shared by the replicas as the ZeRO stage says.
        """
        return [sum(self.held_bytes(c.weights, 0 if i < frozen else c.weights)) for i, c in enumerate(costs)]

    def held_bytes(self, weights: int, active: int) -> tuple[float, float, float]:
        """Return the bytes of weights, gradients and optimizer state on a rank.

        Args:
            weights: Number of weights of its stage.
            active: How many of them train.
        """

        def share(zero: int) -> int:
            return self.replicas if self.zero >= zero else 1

        return weights * self.weight_bytes / share(3), active * self.gradient_bytes / share(2), active * self.state_bytes / share(1)

    def exchange_seconds(self, traffic: Traffic, micro_batches: int, forward: float, backward: float) -> float:
        """Return the seconds by which traffic lengthens a step.

        Args:
            traffic: The traffic of one step.
            micro_batches: Micro-batches per step.
            forward: Seconds of a micro-batch's forward on this rank.
            backward: Seconds of a micro-batch's backward on this rank.
        """
        link = self.between_replicas
        waiting = traffic.collectives * link.latency + traffic.total / link.bandwidth
        if not self.overlap:
            return waiting
        if self.zero == 3:
            return max(0.0, waiting - micro_batches * (forward + backward))
        reducing = waiting - traffic.gathered / link.bandwidth - (link.latency if traffic.gathered else 0.0)
        hidden = min(reducing, backward * (micro_batches if self.zero == 2 else 1))
        return waiting - hidden


def check_frozen(costs: Sequence[LayerCost], frozen: int) -> None:
    """Check that at least one layer trains.

    Args:
        costs: Costs of the layers, front to back.
        frozen: Number of frozen front layers.

    Raises:
        ValueError: There is no layer, or `frozen` is not in [0, number of layers).
    """
    if not costs:
        raise ValueError("costs: got no layer; allowed: at least one")
    _check("frozen", frozen, 0 <= frozen < len(costs), f"an integer from 0 to {len(costs) - 1}, so that at least one layer trains")


def layer_backward(costs: Sequence[LayerCost], frozen: int) -> list[float]:
    """Return the seconds of each layer's backward while the first layers are frozen.

    Frozen layers take none. The first active layer does not compute the gradient of its input, which nothing in front
    of it needs.

    Args:
        costs: Costs of the layers, front to back.
        frozen: Number of frozen front layers.

    Returns:
        Seconds per micro-batch, one value per layer.
    """
    return [0.0 if i < frozen else c.backward_weight if i == frozen else c.backward_weight + c.backward_input for i, c in enumerate(costs)]


def load_costs(file: Path) -> list[LayerCost]:
    """Load the layers of a JSON file.

    The format is {"layers": [{"forward": seconds, "backward_input": …, "backward_weight": …, …}, …]} with the keys of
    `LayerCost`. An entry may have "count", the number of consecutive layers like this one, and "name", which is
    ignored.

    Raises:
        ValueError: Names the file, entry, key and what is allowed.
    """
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: not a JSON file: {error}") from None
    entries = read.get("layers") if isinstance(read, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'{file}: allowed: an object with "layers", a list of at least one layer')
    return [cost for index, entry in enumerate(entries) for cost in _entry(f"{file}: layers[{index}]", entry)]


def estimate_costs(
    *,
    layers: int,
    hidden: int,
    vocabulary: int,
    sequence: int,
    micro_batch: int,
    flops: float,
    memory_bandwidth: float = 1.5e12,
    update_bytes: int = 30,
    shards: int = 1,
    recompute: bool = False,
) -> list[LayerCost]:
    """Estimate the costs of a GPT: embeddings, `layers` blocks with 12·hidden² weights each, head.

    Args:
        layers: Number of blocks, >= 1.
        hidden: Width, >= 1.
        vocabulary: Number of tokens in the vocabulary, >= 1.
        sequence: Tokens per sequence, >= 1.
        micro_batch: Sequences per micro-batch, >= 1.
        flops: FLOP/s that a device achieves in matrix products, > 0. Elementwise work is not counted.
        memory_bandwidth: Bytes per second, > 0.
        update_bytes: Bytes read and written by the update of one weight (30: bf16 weight, fp32 gradient, master and
            two moments).
        shards: Ranks that share an update (ZeRO), >= 1.
        recompute: Activation checkpointing: a block's backward runs its forward again, and the block only keeps its
            input; otherwise it keeps 17 times as much (Korthikanti et al. 2022, arXiv 2205.05198, without the
            attention scores).

    Raises:
        ValueError: Names the argument.
    """
    whole = {"layers": layers, "hidden": hidden, "vocabulary": vocabulary, "sequence": sequence, "micro_batch": micro_batch}
    for name, value in whole.items() | {("shards", shards)}:
        _check(name, value, value >= 1, "an integer >= 1")
    for name, speed in (("flops", flops), ("memory_bandwidth", memory_bandwidth)):
        _check(name, speed, math.isfinite(speed) and speed > 0, "a number > 0")
    tokens = sequence * micro_batch
    output = 2 * tokens * hidden  # bf16

    def cost(weights: int, products: float, attention: float, again: bool) -> LayerCost:
        forward = (products + attention) / flops
        return LayerCost(
            forward=forward,
            backward_input=(products + 2 * attention) / flops,
            backward_weight=products / flops + (forward if again else 0.0),
            optimizer=update_bytes * weights / shards / memory_bandwidth,
            weights=weights,
            output_bytes=output,
            activation_bytes=output * (1 if again or not attention else 17),
        )

    block = cost(12 * hidden**2, 2 * tokens * 12 * hidden**2, 4 * tokens * sequence * hidden, recompute)
    head = cost(hidden * vocabulary, 2 * tokens * hidden * vocabulary, 0.0, False)
    return [cost((vocabulary + sequence) * hidden, 0.0, 0.0, False), *[block] * layers, head]


def _entry(where: str, entry: Any) -> list[LayerCost]:
    names = {f.name for f in fields(LayerCost)}
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: got {entry!r}; allowed: an object with {', '.join(sorted(names))}")
    for key, value in entry.items():
        if key not in names | {"name", "count"}:
            raise ValueError(f"{where}: unknown key {key!r}; allowed: {', '.join(sorted(names | {'name', 'count'}))}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _check(f"{where}.{key}", value, key == "name" or (number and math.isfinite(value) and value >= 0), "a finite number >= 0")
        if key in ("weights", "output_bytes", "activation_bytes"):
            _check(f"{where}.{key}", value, value == int(value), "an integer >= 0")
    for key in ("forward", "backward_input", "backward_weight"):
        if key not in entry:
            raise ValueError(f"{where}: {key!r} is missing; allowed: seconds >= 0")
    count = entry.get("count", 1)
    _check(f"{where}.count", count, count == int(count) and count >= 1, "an integer >= 1")
    return [LayerCost(**{key: value for key, value in entry.items() if key in names})] * int(count)


def _check(name: str, value: object, fine: bool, allowed: str) -> None:
    if not fine:
        raise ValueError(f"{name}: got {value!r}; allowed: {allowed}")
