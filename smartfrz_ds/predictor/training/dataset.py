"""Training examples from recordings: each run is processed at several snapshot spacings by the same code as a real run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from smartfrz_ds.model.view import LayerInfo, View, Window
from smartfrz_ds.predictor.constants import MIN_SNAPSHOTS
from smartfrz_ds.predictor.features import TOKEN_FEATURES, FeatureExtractor
from smartfrz_ds.predictor.probe_features import PROBE_FEATURES
from smartfrz_ds.predictor.recorder import NEVER, Recording
from smartfrz_ds.predictor.recording.labels import LabelSettings, at_steps, similarity_of

SNAPSHOTS_PER_STAGE = 5  # as in a real run with the defaults: freeze_interval 50, snapshot_interval 10
_STRIDES = (1, 2, 4, 8)  # of the recorded snapshots; doubled for long runs
_LONG = 400  # snapshots
_COLUMNS = (
    "tokens",
    "mask",
    "scalars",
    "scalars_without_lr",
    "probe",
    "label",
    "run",
    "stage",
    "time",
    "spacing",
    "step",
    "layer",
    "behind_frozen",
)


@dataclass(kw_only=True)
class Examples:
    """Judged windows of blocks that still trained. An embedding is judged by the block behind it, so it is not an example.

    Attributes:
        tokens: (m, window, TOKEN_FEATURES) fp32.
        mask: (m, window) bool.
        scalars: (m, SCALAR_FEATURES) fp32.
        scalars_without_lr: (m, SCALAR_FEATURES), the scalars if the remaining learning rate is unknown.
        probe: (m, PROBE_FEATURES) fp32, NaN rows without recorded similarities for the stage and the previous one.
        label: (m,) bool.
        run: (m,) int64, index into `runs`.
        stage: (m,) int64, equal for layers that were judged together, which are adjacent, front to back.
        time: (m,) fp32, share of the run that was done.
        spacing: (m,) int64, steps between two snapshots.
        step: (m,) int64, step of the judgement.
        layer: (m,) int64, index of the layer in its recording.
        behind_frozen: (m,) bool, whether a layer in front of it was frozen.
        runs: Tags of each recording, including its name.
        weight: (m,) fp32, mean 1; all runs have the same total weight.
    """

    tokens: Tensor
    mask: Tensor
    scalars: Tensor
    scalars_without_lr: Tensor
    probe: Tensor
    label: Tensor
    run: Tensor
    stage: Tensor
    time: Tensor
    spacing: Tensor
    step: Tensor
    layer: Tensor
    behind_frozen: Tensor
    runs: tuple[Mapping[str, Any], ...]
    weight: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.weight = 1.0 / torch.bincount(self.run, minlength=len(self.runs)).float()[self.run]
        self.weight /= self.weight.mean() if len(self.weight) else 1.0

    def __len__(self) -> int:
        return len(self.label)

    @property
    def probed(self) -> Tensor:
        """Mask of the examples with probe features: (m,) bool."""
        return ~self.probe.isnan().any(1)

    def where(self, keep: Tensor) -> Examples:
        """Return the examples selected by `keep`, (m,) bool."""
        return Examples(**{name: getattr(self, name)[keep] for name in _COLUMNS}, runs=self.runs)

    def having(self, field: str, value: object) -> Tensor:
        """Return the mask of the examples from runs with this value of a tag: (m,) bool."""
        return torch.tensor([run.get(field) == value for run in self.runs])[self.run]

    def without_lr(self) -> Examples:
        """Return the same examples with an unknown remaining learning rate."""
        probe = self.probe.clone()
        column = PROBE_FEATURES.index("log_stage_lr_remaining")
        probe[:, column] = probe[:, column].where(probe[:, column].isnan(), torch.zeros(()))
        return replace(self, scalars=self.scalars_without_lr, probe=probe)

    def without_probe(self) -> Examples:
        """Return the same examples without probe features."""
        return replace(self, probe=torch.full_like(self.probe, torch.nan))

    def prefix_minimum(self, score: Tensor) -> Tensor:
        """Return for each example the lowest score (m,) of its layer and those in front of it at the same stage, as the predictor does."""
        lowest = score.clone()
        deepest = int(torch.bincount(self.stage).max()) if len(self.stage) else 0
        for _ in range(deepest - 1):
            lowest[1:] = torch.where(self.stage[1:] == self.stage[:-1], torch.minimum(lowest[1:], lowest[:-1]), lowest[1:])
        return lowest


def make_examples(
    recordings: Sequence[Recording], window: int, settings: LabelSettings | None = None, strides: Sequence[int] = _STRIDES
) -> Examples:
    """Create all examples of some runs, with windows of MIN_SNAPSHOTS snapshots and more.

    Args:
        recordings: The runs.
        window: Snapshots of a full window.
        settings: The label settings; None: the defaults.
        strides: Spacings in recorded snapshots, doubled for long runs.

    Raises:
        ValueError: No run is long enough for a window.
    """
    parts, runs = [], []
    for i, recording in enumerate(recordings):
        for stride in strides:
            part = _walk(recording, stride * (1 if len(recording.steps) <= _LONG else 2), window, settings or LabelSettings())
            if part is not None:
                parts.append(part)
                runs.append(torch.full((len(part["label"]),), i))
    if not parts:
        raise ValueError(
            f"recordings: all are too short; allowed: at least one with {MIN_SNAPSHOTS} snapshots and a freezing stage before its end"
        )
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Examples(
        **{name: column for name, column in columns.items() if name != "first_of_stage"},
        stage=columns["first_of_stage"].cumsum(0),
        run=torch.cat(runs),
        runs=tuple({**r.tags, "name": r.name} for r in recordings),
    )


def stage_views(recording: Recording, stride: int, window: int) -> list[tuple[View, dict[str, float] | None]]:
    """Reconstruct what a policy would have seen of a recorded run at each freezing stage.

    The first snapshot is not that of the initial weights, as in a real run. The last step is not a stage, because
    nothing is left to freeze and every label is true.

    Args:
        recording: The run.
        stride: Spacing in recorded snapshots.
        window: Snapshots of a full window.

    Returns:
        For each stage its view, and 1 - CKA of each layer since the last stage.
    """
    steps, weights, lr = recording.steps[stride::stride], recording.weights[:, stride::stride], recording.lr_spent[stride::stride]
    names = list(recording.layers)
    layers = tuple(LayerInfo(name=n, kind=k, numel=1) for n, k in zip(names, recording.kinds, strict=True))
    evaluation = {int(step): i for i, step in enumerate(recording.cka_steps)}
    stages: list[tuple[View, dict[str, float] | None]] = []
    windows: dict[str, Window] = {}
    last: int | None = None
    for end in range(SNAPSHOTS_PER_STAGE, len(steps) + 1, SNAPSHOTS_PER_STAGE):
        step = int(steps[end - 1])
        if step >= recording.total_steps:
            break
        frozen = tuple(n for n, at in zip(names, recording.frozen_at.tolist(), strict=True) if at != NEVER and at < step)
        begin = max(0, end - window)
        for i, name in enumerate(names):
            if name not in frozen:
                windows[name] = Window(steps=steps[begin:end], weights=weights[i, begin:end], lr_spent=lr[begin:end])
        now = evaluation.get(step)
        changes = None
        if now is not None:
            pair = recording.cka_pairs[now, last].tolist() if last is not None else []
            changes = {name: 1.0 - value for name, value in zip(names, pair, strict=False)}
        last = now
        view = View(
            step=step,
            total_steps=recording.total_steps,
            lr_spent=float(lr[end - 1]),
            lr_remaining=recording.lr_total - float(lr[end - 1]),
            layers=layers,
            frozen=frozen,
            candidates=tuple(n for n in names if n not in frozen),
            windows=dict(windows),
            window_size=window,
        )
        stages.append((view, changes))
    return stages


def _walk(recording: Recording, stride: int, window: int, settings: LabelSettings) -> dict[str, Tensor] | None:
    """Process one run at one spacing.

    Returns:
        The columns of `Examples` without `run`, and "first_of_stage" (m,) bool instead of `stage`; None if the run is
        too short for a judgement at this spacing.
    """
    similarity = similarity_of(recording.cka, recording.kinds, settings)
    index = {name: i for i, name in enumerate(recording.layers)}
    extractor, blind = FeatureExtractor(), FeatureExtractor()
    parts: list[dict[str, Tensor]] = []
    for view, changes in stage_views(recording, stride, window):
        batch = extractor.extract(view, changes=changes)
        unknown = blind.extract(replace(view, total_steps=None, lr_remaining=None))
        rows = [i for i, name in enumerate(batch.names) if recording.kinds[index[name]] == "block"]
        if not rows:
            continue
        layer = torch.tensor([index[batch.names[i]] for i in rows])
        m, n = len(rows), batch.tokens.shape[1]
        tokens = torch.zeros(m, window, len(TOKEN_FEATURES))
        tokens[:, window - n :] = batch.tokens[rows]
        mask = torch.zeros(m, window, dtype=torch.bool)
        mask[:, window - n :] = batch.mask[rows]
        label = at_steps(similarity, recording.cka_steps, torch.tensor([view.step]))[0] >= settings.similarity
        nothing = torch.full((m, len(PROBE_FEATURES)), torch.nan)
        front_frozen = torch.tensor([bool(view.frozen) and index[view.frozen[0]] < int(i) for i in layer])
        parts.append(
            {
                "tokens": tokens,
                "mask": mask,
                "scalars": batch.scalars[rows],
                "scalars_without_lr": unknown.scalars[rows],
                "probe": nothing if batch.probe is None else batch.probe[rows],
                "label": label[layer],
                "time": torch.full((m,), view.step / recording.total_steps),
                "spacing": torch.full((m,), int(recording.steps[stride] - recording.steps[0])),
                "step": torch.full((m,), view.step),
                "layer": layer,
                "behind_frozen": front_frozen,
                "first_of_stage": torch.arange(m) == 0,
            }
        )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else None
