"""Record how the layers of a training run moved, and how similar they were to their final state.

`smartfrz collect` and users' own scripts use the same recorder:

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
    """The record of a run. Contains only the body: the head never freezes and is not recorded.

    Attributes:
        name: Name of the run.
        tags: JSON-able description of the run (network, data, ...), by which an evaluation can hold out runs.
        layers: Name of each layer, front to back.
        kinds: Kind of each layer, front to back.
        steps: (snapshots,) int64, starting with 0.
        weights: (layers, snapshots, sample_size) fp32, at fixed indices (repeated in smaller layers).
        lr_spent: (snapshots,) fp64, the sum of the learning rates of all steps so far.
        lr_total: The same at the end of the run.
        total_steps: Steps of the run.
        cka_pairs: (evaluations, evaluations, layers) fp32, similarity of each layer between two evaluations, 1 on the
            diagonal.
        cka_steps: (evaluations,) int64, from 0 to the end of the run.
        frozen_at: (layers,) int64, the step after which the layer did not change; NEVER if it trained to the end.
        metric: Held-out accuracy of the final model, 0..1; NaN if not given.
        loss: Held-out mean negative log-likelihood of the final model in nats; NaN if not given.
        seconds: Wall-clock time.
        cpu_seconds: Processor time.
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
        """Similarity of each layer to itself at the end of the run: (evaluations, layers) fp64."""
        return self.cka_pairs[:, -1].double()


class Recorder:
    """Records a run of any nn.Module alongside its own training loop, which it does not affect.

    Keeps the snapshots and similarity vectors of the run in host memory: for each layer 4 * sample_size bytes per
    snapshot, and 2 * n^2 bytes per evaluation of n probe inputs (100 layers, 128 inputs, 100 evaluations: 330 MB).
    Supports one process with unsharded weights.
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
        """Start recording. Create the recorder before the first step, because it records the initial weights.

        Args:
            model: The module that trains, on its device.
            probe: A batch of 2 or more held-out inputs, kept for the whole run; a tensor, or anything that `forward`
                accepts.
            layers: As `smartfrz.layers` ("auto", or patterns), or the layers themselves.
            forward: How to call the model on the probe; None: model(probe), or model(**probe) for a mapping. It runs
                in eval mode without gradients, and the model's mode and the random states are restored afterwards.
            snapshot_interval: Steps between snapshots, >= 1.
            evaluate_interval: Steps between evaluations, a multiple of snapshot_interval.
            sample_size: Weights sampled from each layer, >= 1.
            seed: Seed for the choice of the weights.

        Raises:
            ValueError: A value is out of range, or a layer's output on the probe is not a tensor with one row per
                input.
        """
        for name, value in (("snapshot_interval", snapshot_interval), ("sample_size", sample_size)):
            if value < 1:
                raise ValueError(f"{name}: got {value}; allowed: an integer >= 1")
        if evaluate_interval < snapshot_interval or evaluate_interval % snapshot_interval:
            raise ValueError(f"evaluate_interval: got {evaluate_interval}; allowed: a multiple of snapshot_interval ({snapshot_interval})")
        self.model, self.probe = model, probe
        given = [] if isinstance(layers, str) else [x for x in layers if isinstance(x, Layer)]
        names = layers if isinstance(layers, str) else [x for x in layers if isinstance(x, str)]
        self.layers = tuple(x for x in given or find_layers(model, names) if x.kind != "head" and x.params)
        self.snapshot_interval, self.evaluate_interval = snapshot_interval, evaluate_interval
        self.steps_done, self.lr_spent = 0, 0.0
        self._forward = forward or _call
        self._began = (time.perf_counter(), time.process_time())
        self._samples = [_sample_of(layer, sample_size, seed) for layer in self.layers]
        self._state = _State(frozen_at=[NEVER] * len(self.layers))
        self._snapshot()
        self._evaluate()

    def step(self, lr: float) -> None:
        """Record a step. Call after every optimizer step.

        Args:
            lr: The learning rate of the step (of the first group, if there are several).
        """
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
        """Finish the recording, with a last evaluation if the run does not end on one.

        Args:
            name: Name of the run.
            tags: JSON-able description of the run.
            metric: Held-out accuracy, 0..1.
            loss: Held-out mean negative log-likelihood, nats.

        Raises:
            ValueError: The run has fewer than two evaluations.
        """
        state = self._state
        if state.cka_steps[-1] != self.steps_done:
            self._evaluate()
        if len(state.cka_steps) < 2:
            raise ValueError(f"{name}: got no step; allowed: a recording of at least one step")
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
        """Finish the recording and write it to a file.

        Args:
            path: The file (.safetensors); None: NAME.safetensors in the folder given by the environment variable
                SMARTFRZ_RECORDINGS, by default recordings/runs.
            name: As in `finish`.
            tags: As in `finish`.
            **figures: `metric` and `loss`, as in `finish`.

        Raises:
            ValueError: As in `finish`.
        """
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
    """Return each layer's representation of the probe, in eval mode and without gradients.

    A layer without a module (bare parameters) takes the output of the next layer.

    Args:
        model: The model. Its modes and the random state of the CPU are restored.
        layers: The layers, front to back.
        probe: A batch of inputs.
        forward: How to call the model on the probe; None: model(probe), or model(**probe) for a mapping.

    Returns:
        For each layer a tensor (rows, features...), as in `probe_rows`.

    Raises:
        ValueError: A layer's output is not a tensor, or the layer is not used; names the layer.
    """
    found: dict[int, Tensor] = {}

    def keep(i: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple | list) else output
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"layer {layers[i].name}: got an output of type {type(value).__name__}; allowed: a tensor, or a tuple with one"
                )
            found[i] = value.detach()  # of several modules, the last one in the forward pass

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
            raise ValueError(f"layer {layers[i].name}: not used in the forward of the probe")
        outputs.append(probe_rows(found[i]) if i in found else outputs[-1])
    return outputs[::-1]


def write_recording(recording: Recording, path: Path) -> None:
    """Write a recording as one safetensors file, atomically. Numbers and names are JSON in its metadata.

    Args:
        recording: The recording.
        path: The file. Missing folders are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    tensors = {name: getattr(recording, name).contiguous() for name in _TENSORS}
    fields = {name: getattr(recording, name) for name in Recording.__dataclass_fields__ if name not in _TENSORS}
    header = {"format": RECORDING_FORMAT, "version": RECORDING_VERSION, **fields, "tags": dict(recording.tags)}
    save_file(tensors, partial, metadata={"recording": json.dumps(header)})
    os.replace(partial, path)


def read_recording(path: Path) -> Recording:
    """Read a recording.

    Raises:
        ValueError: The file is missing, damaged or of another version; names the file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["recording"])
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        if (header.pop("format"), header.pop("version")) != (RECORDING_FORMAT, RECORDING_VERSION):
            raise ValueError("unsupported version")
        return Recording(**(header | {"layers": tuple(header["layers"]), "kinds": tuple(header["kinds"])}), **tensors)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        allowed = f"a recording written by smartfrz_ds, version {RECORDING_VERSION}"
        raise ValueError(f"{path}: not a complete recording ({type(error).__name__}: {error}); allowed: {allowed}") from error


@dataclass(kw_only=True)
class _State:
    frozen_at: list[int]
    steps: list[int] = field(default_factory=list)
    lr_spent: list[float] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)  # each (layers, sample_size)
    cka_steps: list[int] = field(default_factory=list)
    vectors: list[list[Tensor]] = field(default_factory=list)  # evaluations x layers, each as gram_vector gives it


def _sample_of(layer: Layer, sample_size: int, seed: int) -> tuple[list[nn.Parameter], list[Tensor], list[Tensor]]:
    """Return the parameters of a sample, the positions in each, and their columns."""
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
    """Compute (evaluations, evaluations, layers) fp32. Sums are in fp64, because fp32 is too coarse for similarities near 1."""
    layers = []
    for i in range(len(vectors[0])):
        rows = torch.stack([row[i] for row in vectors]).double()
        norms = rows.norm(dim=1)
        cosine = (rows @ rows.T).clamp(0, 1)
        dead = norms == 0
        # A representation that does not depend on its input is similar to another such one, and to nothing else.
        cosine[dead[:, None] ^ dead[None, :]] = 0.0
        cosine[dead[:, None] & dead[None, :]] = 1.0
        layers.append(cosine.fill_diagonal_(1.0))
    return torch.stack(layers, 2).float()


def _call(model: nn.Module, probe: Any) -> Any:
    return model(**probe) if isinstance(probe, Mapping) else model(probe)
