"""SmartFRZ's predictor in its published form, as a plain reference beside the shipped one. It is trained and measured, never shipped.

Sizes come from the only public re-implementation (Ktuzinowski/MambaFRZ), since the paper's could not be read: the raw weights of the
newest snapshot ask, those of the 29 older ones are keys and values; three MLPs sample-256-256-64 with ReLU; one head, no scaling, no
positions, no normalisation; a verdict 64-32-32-2; AdamW 1e-3, batches of 32. Its faults are not repeated: the attention isn't summed over
the batch, and the indices are fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smartfrz_ds.predictor.recorder import Recording

from .dataset import Examples

_BATCH, _LR = 32, 1e-3


class PublishedPredictor(nn.Module):
    """Raw windows to the two logits of "moving" and "converged"."""

    def __init__(self, sample_size: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (
            nn.Sequential(nn.Linear(sample_size, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)) for _ in range(3)
        )
        self.verdict = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(
        self,
        weights: Tensor,  # (b, n, sample_size) fp32, newest snapshot last
        mask: Tensor,  # (b, n) bool, true where there is a snapshot
    ) -> Tensor:  # (b, 2)
        query, key, value = self.query(weights[:, -1]), self.key(weights[:, :-1]), self.value(weights[:, :-1])
        scores = torch.einsum("bd,bnd->bn", query, key).masked_fill(~mask[:, :-1], -torch.inf)
        return self.verdict(torch.einsum("bn,bnd->bd", scores.softmax(1), value))


def raw_windows(recordings: Sequence[Recording], examples: Examples, index: Tensor) -> Tensor:
    """The sampled weights behind the examples at `index` (k,) int64: (k, window, sample_size) fp32, zeros where there is no snapshot.

    recordings: those that the examples were made of, in the same order.
    """
    window, size = examples.mask.shape[1], recordings[0].weights.shape[2]
    out = torch.zeros(len(index), window, size)
    for row, i in enumerate(index.tolist()):
        recording = recordings[int(examples.run[i])]
        apart = int(recording.steps[1] - recording.steps[0])
        stride, newest, there = int(examples.spacing[i]) // apart, int(examples.step[i]) // apart, int(examples.mask[i].sum())
        out[row, window - there :] = recording.weights[int(examples.layer[i]), newest - stride * (there - 1) : newest + 1 : stride]
    return out


def fit_reference(
    recordings: Sequence[Recording], examples: Examples, *, windows: int, epochs: int, seed: int
) -> Callable[[Examples], Tensor]:
    """Trains the published form on `windows` random examples, all runs alike; returns what scores others: logit differences (m,).

    Deterministic on one thread.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(examples.weight.double(), min(windows, len(examples)), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PublishedPredictor(recordings[0].weights.shape[2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR)
    inputs, mask, label = raw_windows(recordings, examples, chosen), examples.mask[chosen], examples.label[chosen].long()
    for _ in range(epochs):
        for index in torch.randperm(len(chosen), generator=generator).split(_BATCH):
            loss = F.cross_entropy(model(inputs[index], mask[index]), label[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def scored(others: Examples) -> Tensor:
        parts = [torch.zeros(0)]
        for index in torch.arange(len(others)).split(1024):
            logits = model(raw_windows(recordings, others, index), others.mask[index])
            parts.append(logits[:, 1] - logits[:, 0])
        return torch.cat(parts)

    return scored
