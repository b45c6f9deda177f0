"""SmartFRZ's predictor in its published form, as a plain reference for the shipped one. It is trained and evaluated, never shipped.

Source: Ktuzinowski/MambaFRZ, the only public re-implementation, because the paper's sizes are not public. The raw
weights of the newest snapshot are the query, those of the 29 older ones keys and values; three MLPs sample-256-256-64
with ReLU; one head, without scaling, positions or normalization; a verdict 64-32-32-2; AdamW 1e-3, batches of 32. Its
faults are not repeated: the attention is not summed over the batch, and the indices are fixed.
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
    """Maps raw windows to two logits, "moving" and "converged".

    Args:
        sample_size: Sampled weights per layer.
    """

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
        """Compute logits (b, 2).

        Args:
            weights: (b, n, sample_size) fp32, newest snapshot last.
            mask: (b, n) bool, true for snapshots.
        """
        query, key, value = self.query(weights[:, -1]), self.key(weights[:, :-1]), self.value(weights[:, :-1])
        scores = torch.einsum("bd,bnd->bn", query, key).masked_fill(~mask[:, :-1], -torch.inf)
        return self.verdict(torch.einsum("bn,bnd->bd", scores.softmax(1), value))


def raw_windows(recordings: Sequence[Recording], examples: Examples, index: Tensor) -> Tensor:
    """Return the sampled weights behind some examples.

    Args:
        recordings: The recordings of which the examples were made, in the same order.
        examples: The examples.
        index: (k,) int64, the examples to select.

    Returns:
        (k, window, sample_size) fp32, zeros without a snapshot.
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
    """Train the published form on random examples, with the same weight for every run. Deterministic on one thread.

    Args:
        recordings: The recordings of which the examples were made.
        examples: Training examples.
        windows: Number of examples to draw.
        epochs: Number of epochs.
        seed: Seed of the draw and the training.

    Returns:
        A scorer that returns logit differences (m,).
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
