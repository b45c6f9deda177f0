"""Writes down how the layers of a training run moved and how like their final selves they were on the way.

The same recorder is used by `smartfrz collect` and by anybody's own script:

    recorder = Recorder(model, probe=held_out_inputs)
    for batch in loader:
        ...                              # forward, backward
        optimizer.step()
        recorder.step(lr=optimizer.param_groups[0]["lr"])
    recorder.save(name="my-run", metric=accuracy)
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from smartfrz_ds.model.layers import Layer, LayerKind, find_layers
from smartfrz_ds.model.sampling import sample_indices, sampled_params

from .similarity import gram_vector, probe_rows

RECORDING_FORMAT, RECORDING_VERSION = "smartfrz-recording", 2
FOLDER_VARIABLE = "SMARTFRZ_RECORDINGS"
"""Environment variable with the folder into which Recorder.save writes; `smartfrz collect --script` sets it."""

NEVER = -1
"""In Recording.frozen_at: the layer trained to the end."""

_TENSORS = ("steps", "weights", "lr_spent", "cka_pairs", "cka_steps", "frozen_at")


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What a run left behind. Only the body: the head, which is never frozen, isn't recorded.

    name: of the run. tags: what it was (network, data, ...), JSON-able; what can be held out in an evaluation.
    layers, kinds: name and kind of each layer, front to back.
    steps: (snapshots,) int64, 0 first. weights: (layers, snapshots, sample_size) fp32, fixed indices (smaller layers repeat).
    lr_spent: (snapshots,) fp64, the sum of the learning rates of all steps so far. lr_total: at the end. total_steps: of the run.
    cka_pairs: (evaluations, evaluations, layers) fp32, similarity of each layer between two evaluations, 1 on the diagonal.
    cka_steps: (evaluations,) int64, 0 first, the end of the run last.
    frozen_at: (layers,) int64, the step after which the layer stood still, NEVER for one that trained to the end.
    metric, loss: of the final model, held out (accuracy 0..1 and mean negative log-likelihood in nats); NaN where nobody said.
    seconds, cpu_seconds: what it took.
    """

    name: str
    tags: Mapping[str, Any]
    layers: tuple[str, ...]
    kinds: tuple[LayerKind, ...]
    steps: Tensor
    weights: Tensor
    lr_spent: Tensor
    lr_total: float
    total_steps: int
    cka_pairs: Tensor
    cka_steps: Tensor
    frozen_at: Tensor
    metric: float
    loss: float
    seconds: float
    cpu_seconds: float

    @property
    def cka(self) -> Tensor:
        """(evaluations, layers) fp64, similarity of each layer to itself at the end of the run."""
        return self.cka_pairs[:, -1].double()


class Recorder:
    """Records a run of any nn.Module, beside its own training loop; changes nothing in it.

    Holds the snapshots and the similarity vectors of the run in host memory: of each layer 4 * sample_size bytes a snapshot, and
    2 * n^2 bytes an evaluation of n probe inputs (100 layers, 128 inputs, 100 evaluations: 330 MB). One process, whole weights.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Any,
        *,
        layers: str | Sequence[str] | Sequence[Layer] = "auto",
        forward: Callable[[nn.Module, Any], Any] | None = None,
        snapshot_interval: int = 10,
        evaluate_interval: int = 50,
        sample_size: int = 256,
        seed: int = 0,
    ) -> None:
        """model: the module that trains, on its device. Made before the first step: the initial weights are recorded.

        probe: a batch of 2 or more held-out inputs, kept for the whole run; a tensor, or whatever forward takes.
        layers: as `smartfrz.layers` ("auto", or patterns), or the layers themselves.
        forward: how the model is called on the probe; None: model(probe), or model(**probe) for a mapping. Runs in eval mode without
        gradients, and the model's mode and the random generators are as before after it.
        snapshot_interval, evaluate_interval: steps, >= 1, the second a multiple of the first. sample_size: weights a layer, >= 1.
        seed: which weights are sampled.
        Raises ValueError for anything else, and for a layer whose output on the probe is no tensor with one row an input.
        """
        for name, value in (("snapshot_interval", snapshot_interval), ("sample_size", sample_size)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, allowed is a whole number >= 1")
        if evaluate_interval < snapshot_interval or evaluate_interval % snapshot_interval:
            raise ValueError(
                f"evaluate_interval: got {evaluate_interval}, allowed is a multiple of snapshot_interval ({snapshot_interval})"
            )
        self.model, self.probe = model, probe
        given = [] if isinstance(layers, str) else [x for x in layers if isinstance(x, Layer)]
        names = layers if isinstance(layers, str) else [x for x in layers if isinstance(x, str)]
        self.layers = tuple(x for x in given or find_layers(model, names) if x.kind != "head" and x.params)
        self.snapshot_interval, self.evaluate_interval = snapshot_interval, evaluate_interval
        self.steps_done, self.lr_spent = 0, 0.0
        self._forward = forward or _call
        self._began = (time.perf_counter(), time.process_time())
        self._samples = [_plan(layer, sample_size, seed) for layer in self.layers]
        self._state = _State(frozen_at=[NEVER] * len(self.layers))
        self._snapshot()
        self._evaluate()

    def step(self, lr: float) -> None:
        """To be called after every optimizer step. lr: the learning rate of this step (of the first group where there are several)."""
        self.steps_done += 1
        self.lr_spent += lr
        if self.steps_done % self.snapshot_interval == 0:
            self._snapshot()
        if self.steps_done % self.evaluate_interval == 0:
            self._evaluate()

    def finish(
        self,
        *,
        name: str,
        tags: Mapping[str, Any] | None = None,
        metric: float = float("nan"),
        loss: float = float("nan"),
    ) -> Recording:
        """The recording of the run that ends here. A last evaluation is made where the run doesn't end on one.

        Raises ValueError for a run with fewer than two evaluations.
        """
        state = self._state
        if state.cka_steps[-1] != self.steps_done:
            self._evaluate()
        if len(state.cka_steps) < 2:
            raise ValueError(f"{name}: a recording needs at least one step, got none")
        began, cpu_began = self._began
        return Recording(
            name=name,
            tags=dict(tags or {}),
            layers=tuple(layer.name for layer in self.layers),
            kinds=tuple(layer.kind for layer in self.layers),
            steps=torch.tensor(state.steps),
            weights=torch.stack(state.weights, 1),
            lr_spent=torch.tensor(state.lr_spent, dtype=torch.float64),
            lr_total=self.lr_spent,
            total_steps=self.steps_done,
            cka_pairs=_pairs(state.vectors),
            cka_steps=torch.tensor(state.cka_steps),
            frozen_at=torch.tensor(state.frozen_at),
            metric=metric,
            loss=loss,
            seconds=time.perf_counter() - began,
            cpu_seconds=time.process_time() - cpu_began,
        )

    def save(self, path: str | Path | None = None, *, name: str, tags: Mapping[str, Any] | None = None, **figures: float) -> Recording:
        """finish, and write_recording to path (.safetensors); None: NAME.safetensors in the folder that the environment variable
        SMARTFRZ_RECORDINGS names, without it in recordings/runs."""
        recording = self.finish(name=name, tags=tags, **figures)
        folder = Path(os.environ.get(FOLDER_VARIABLE, "recordings/runs"))
        write_recording(recording, folder / f"{name}.safetensors" if path is None else Path(path))
        return recording

    def _snapshot(self) -> None:
        state = self._state
        for i, layer in enumerate(self.layers):
            if all(not p.requires_grad for p in layer.params):
                if state.frozen_at[i] == NEVER:
                    state.frozen_at[i] = self.steps_done if not state.steps else state.steps[-1]
            else:
                state.frozen_at[i] = NEVER
        state.steps.append(self.steps_done)
        state.lr_spent.append(self.lr_spent)
        state.weights.append(torch.stack([_read(sample) for sample in self._samples]))

    def _evaluate(self) -> None:
        outputs = probe_outputs(self.model, self.layers, self.probe, self._forward)
        self._state.cka_steps.append(self.steps_done)
        self._state.vectors.append([gram_vector(x) for x in outputs])


def probe_outputs(
    model: nn.Module, layers: Sequence[Layer], probe: Any, forward: Callable[[nn.Module, Any], Any] | None = None
) -> list[Tensor]:
    """The representation of the probe in each layer, (rows, features...) as probe_rows gives it. In eval mode, without gradients.

    A layer without a module of its own (bare parameters) takes the output of the next one.
    Raises ValueError, naming the layer, where its output is no tensor.
    """
    found: dict[int, Tensor] = {}

    def keep(i: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple | list) else output
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"layer {layers[i].name}: its output is a {type(value).__name__}; a recording needs a tensor, or a tuple with one"
                )
            found[i] = value.detach()  # of several modules the last one in the forward pass

        return hook

    handles = [module.register_forward_hook(keep(i)) for i, layer in enumerate(layers) for module in layer.modules]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            (forward or _call)(model, probe)
    finally:
        for module, mode in modes:
            module.training = mode
        for handle in handles:
            handle.remove()
    outputs: list[Tensor] = []
    for i in reversed(range(len(layers))):
        if i not in found and not outputs:
            raise ValueError(f"layer {layers[i].name}: it was not used on the probe")
        outputs.append(probe_rows(found[i]) if i in found else outputs[-1])
    return outputs[::-1]


def write_recording(recording: Recording, path: Path) -> None:
    """Writes one safetensors file, whole or not at all; the numbers and names stand in its metadata as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    tensors = {name: getattr(recording, name).contiguous() for name in _TENSORS}
    fields = {name: getattr(recording, name) for name in Recording.__dataclass_fields__ if name not in _TENSORS}
    header = {"format": RECORDING_FORMAT, "version": RECORDING_VERSION, **fields, "tags": dict(recording.tags)}
    save_file(tensors, partial, metadata={"recording": json.dumps(header)})
    os.replace(partial, path)


def read_recording(path: Path) -> Recording:
    """Raises ValueError, naming the file, when it is missing, damaged or of another version."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["recording"])
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        if (header.pop("format"), header.pop("version")) != (RECORDING_FORMAT, RECORDING_VERSION):
            raise ValueError("another version")
        return Recording(**(header | {"layers": tuple(header["layers"]), "kinds": tuple(header["kinds"])}), **tensors)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        allowed = f"a recording written by smartfrz_ds, version {RECORDING_VERSION}"
        raise ValueError(f"{path}: got no whole recording ({type(error).__name__}: {error}); allowed: {allowed}") from error


@dataclass(kw_only=True)
class _State:
    frozen_at: list[int]
    steps: list[int] = field(default_factory=list)
    lr_spent: list[float] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)  # each (layers, sample_size)
    cka_steps: list[int] = field(default_factory=list)
    vectors: list[list[Tensor]] = field(default_factory=list)  # evaluations x layers, each as gram_vector gives it


def _plan(layer: Layer, sample_size: int, seed: int) -> tuple[list[nn.Parameter], list[Tensor], list[Tensor]]:
    """The parameters of a sample, the positions in each, and the columns where they stand."""
    params = sampled_params(layer)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer.position) % 2**63)
    chosen = sample_indices(sum(p.numel() for p in params), sample_size, generator)
    positions, columns, begin = [], [], 0
    for p in params:
        inside = ((chosen >= begin) & (chosen < begin + p.numel())).nonzero()[:, 0]
        positions.append((chosen[inside] - begin).to(p.device))
        columns.append(inside)
        begin += p.numel()
    return params, positions, columns


def _read(sample: tuple[list[nn.Parameter], list[Tensor], list[Tensor]]) -> Tensor:
    params, positions, columns = sample
    values = torch.empty(sum(len(c) for c in columns))
    for p, at, column in zip(params, positions, columns, strict=True):
        values[column] = p.detach().reshape(-1)[at].float().cpu()
    return values


def _pairs(vectors: list[list[Tensor]]) -> Tensor:
    """(evaluations, evaluations, layers) fp32. In blocks of 64 bits: near one, fp32 sums would be noise."""
    layers = []
    for i in range(len(vectors[0])):
        rows = torch.stack([row[i] for row in vectors]).double()
        norms = rows.norm(dim=1)
        cosine = (rows @ rows.T).clamp(0, 1)
        dead = norms == 0
        # A representation that doesn't depend on its input is like another such one, and like nothing else.
        cosine[dead[:, None] ^ dead[None, :]] = 0.0
        cosine[dead[:, None] & dead[None, :]] = 1.0
        layers.append(cosine.fill_diagonal_(1.0))
    return torch.stack(layers, 2).float()


def _call(model: nn.Module, probe: Any) -> Any:
    return model(**probe) if isinstance(probe, Mapping) else model(probe)
