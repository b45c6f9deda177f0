"""Recordings as training examples: each run is walked through as a real one is, by the same code, at several spacings of its snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from smartfrz_ds.policies.base import LayerInfo, View, Window

from .collect import SNAPSHOT_EVERY, Recording, Run
from .features import MIN_SNAPSHOTS, SCALAR_FEATURES, TOKEN_FEATURES, FeatureExtractor
from .labels import converged_at

SPACINGS = (2, 4, 8, 16)
"""Steps between two snapshots in the training examples. A full window of 30 then spans 58 to 464 steps of runs of 400 and 720."""

_MOST_LAYERS = 8  # of the small networks
SNAPSHOTS_PER_STAGE = 5  # as the defaults of a real run: freeze_interval 50, snapshot_interval 10


@dataclass(kw_only=True)
class Examples:
    """Judged windows of blocks (an embedding is judged by the block behind it, so it is no example).

    tokens: (m, window, TOKEN_FEATURES) fp32, mask: (m, window) bool, scalars: (m, SCALAR_FEATURES) fp32, label: (m,) bool.
    run: (m,) int64, index into runs. stage: (m,) int64, the same for the layers that were judged together, which stand front to back.
    time: (m,) fp32, share of the run that was done. weight: (m,) fp32, mean 1, all runs count the same.
    """

    tokens: Tensor
    mask: Tensor
    scalars: Tensor
    label: Tensor
    run: Tensor
    stage: Tensor
    time: Tensor
    runs: tuple[Run, ...]
    weight: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.weight = 1.0 / torch.bincount(self.run, minlength=len(self.runs)).float()[self.run]
        self.weight /= self.weight.mean()

    def __len__(self) -> int:
        return len(self.label)

    def where(self, keep: Tensor) -> Examples:
        """The examples with keep (m,) bool true."""
        parts = {name: getattr(self, name)[keep] for name in ("tokens", "mask", "scalars", "label", "run", "stage", "time")}
        return Examples(**parts, runs=self.runs)

    def having(self, field: str, value: object) -> Tensor:
        """Which examples come from runs with this value of a field of Run: (m,) bool."""
        return torch.tensor([getattr(run, field) == value for run in self.runs])[self.run]

    def without_lr(self) -> Examples:
        """The same as if nobody knew how much learning rate is still to come."""
        scalars = self.scalars.clone()
        scalars[:, [SCALAR_FEATURES.index("log_lr_remaining"), SCALAR_FEATURES.index("lr_remaining_known")]] = 0.0
        return replace(self, scalars=scalars)

    def prefix_minimum(self, score: Tensor) -> Tensor:
        """Of each example the lowest score (m,) of its layer and those in front of it at the same stage, as the predictor does."""
        lowest = score.clone()
        for _ in range(_MOST_LAYERS - 1):
            lowest[1:] = torch.where(self.stage[1:] == self.stage[:-1], torch.minimum(lowest[1:], lowest[:-1]), lowest[1:])
        return lowest


def make_examples(recordings: Sequence[Recording], window: int) -> Examples:
    """All examples of these runs at all SPACINGS; window: snapshots of a full one. Windows from MIN_SNAPSHOTS on are in."""
    parts, runs = [], []
    for i, recording in enumerate(recordings):
        for spacing in SPACINGS:
            part = _walk(recording, spacing, window)
            if part is not None:
                parts.append(part)
                runs.append(torch.full((len(part[0]),), i))
    tokens, mask, scalars, label, time, first_of_stage = (torch.cat(column) for column in zip(*parts, strict=True))
    return Examples(
        tokens=tokens,
        mask=mask,
        scalars=scalars,
        label=label,
        run=torch.cat(runs),
        stage=first_of_stage.cumsum(0),
        time=time,
        runs=tuple(r.run for r in recordings),
    )


def _walk(recording: Recording, spacing: int, window: int) -> tuple[Tensor, ...] | None:
    """One run at one spacing: tokens, mask, scalars, label, time as in Examples, and where a new stage begins: (m,) bool.

    None where the run is too short for a judgement at this spacing.
    """
    stride = spacing // SNAPSHOT_EVERY
    steps, weights, lr = recording.steps[::stride], recording.weights[:, ::stride], recording.lr_spent[::stride]
    names = [str(i) for i in range(len(recording.kinds))]
    layers = tuple(LayerInfo(name=n, kind=k, numel=1) for n, k in zip(names, recording.kinds, strict=True))
    blocks = [i for i, kind in enumerate(recording.kinds) if kind == "block"]
    extractor = FeatureExtractor()
    tokens, mask, scalars, stages = [], [], [], []
    for end in range(MIN_SNAPSHOTS, len(steps) + 1, SNAPSHOTS_PER_STAGE):
        if int(steps[end - 1]) >= recording.run.steps:
            break  # at the last step there is nothing left to freeze, and every label is true
        begin = max(0, end - window)
        batch = extractor.extract(
            View(
                step=int(steps[end - 1]),
                total_steps=recording.run.steps,
                lr_spent=float(lr[end - 1]),
                lr_remaining=recording.lr_total - float(lr[end - 1]),
                layers=layers,
                frozen=(),
                candidates=tuple(names),
                windows={
                    name: Window(steps=steps[begin:end], weights=weights[i, begin:end], lr_spent=lr[begin:end])
                    for i, name in enumerate(names)
                },
                window_size=window,
            )
        )
        n = end - begin
        padded = torch.zeros(len(blocks), window, len(TOKEN_FEATURES))
        padded[:, window - n :] = batch.tokens[blocks]
        there = torch.zeros(len(blocks), window, dtype=torch.bool)
        there[:, window - n :] = True
        tokens.append(padded)
        mask.append(there)
        scalars.append(batch.scalars[blocks])
        stages.append(end - 1)
    if not stages:
        return None
    at = steps[stages]
    label = converged_at(recording.cka, recording.cka_steps, recording.kinds, at)[:, blocks]
    time = (at.float() / recording.run.steps)[:, None].expand(-1, len(blocks))
    first_of_stage = torch.zeros(len(stages), len(blocks), dtype=torch.bool)
    first_of_stage[:, 0] = True
    return torch.cat(tokens), torch.cat(mask), torch.cat(scalars), label.flatten(), time.flatten(), first_of_stage.flatten()
