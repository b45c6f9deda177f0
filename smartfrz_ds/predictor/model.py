"""The predictor, a small attention network over a layer's snapshots, and its file format.

Source: SmartFRZ (Li et al., ICLR 2023): the newest snapshot is the query, the window provides keys and values.
Differences from the paper: a token contains the weights' scale-free movement (features.py) rather than the weights,
and the layer's scalars are added before the verdict. The published form, for comparison, is in
training/published_form.py.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from .constants import MIN_SNAPSHOTS
from .features import SCALAR_FEATURES, TOKEN_FEATURES, FeatureBatch
from .probe_features import PROBE_FEATURES

FORMAT = "smartfrz-predictor"
FORMAT_VERSION = 2
DEFAULT_PREDICTOR = Path(__file__).with_name("default.safetensors")

_CLIP = 4.0  # standard deviations: bounds the inputs of a run unlike any in training to the fitted range
_DROPOUT = 0.2  # in training only
_SETTING = "smartfrz.attention.predictor"
_ALLOWED = f"allowed: a safetensors file written by `smartfrz train-predictor`, format version {FORMAT_VERSION}"


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """Hyper-parameters, each an integer in 1..4096.

    Attributes:
        dim: Width of a token.
        heads: Number of attention heads, a divisor of `dim`.
        hidden: Hidden width of the verdict.
        window: Snapshots of a full window.

    Raises:
        ValueError: A value is out of range.
    """

    dim: int = 16
    heads: int = 2
    hidden: int = 24
    window: int = 30

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or not 1 <= value <= 4096:
                raise ValueError(f"{field.name}: got {value!r}; allowed: an integer from 1 to 4096")
        if self.dim % self.heads:
            raise ValueError(f"dim: got {self.dim}; allowed: a multiple of heads ({self.heads})")


class Judge(nn.Module):
    """Attention over a layer's snapshots combined with its scalars: one logit per layer.

    Args:
        config: Hyper-parameters.
        scalars: Number of scalars.
    """

    token_mean: Tensor
    token_std: Tensor
    scalar_mean: Tensor
    scalar_std: Tensor
    calibration: Tensor

    def __init__(self, config: PredictorConfig, scalars: int) -> None:
        super().__init__()
        self.heads = config.heads
        dim, hidden = config.dim, config.hidden
        for name, size in (("token", len(TOKEN_FEATURES)), ("scalar", scalars)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        self.register_buffer("calibration", torch.tensor([1.0, 0.0]))  # logits are multiplied by the first, then the second is added
        self.embed = nn.Sequential(nn.Linear(len(TOKEN_FEATURES), dim), nn.GELU())
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        # The linear part of the scalars generalizes best to unseen networks; the rest learns corrections.
        self.linear = nn.Linear(scalars, 1)
        self.verdict = nn.Sequential(
            nn.Dropout(_DROPOUT), nn.Linear(2 * dim + scalars, hidden), nn.GELU(), nn.Dropout(_DROPOUT), nn.Linear(hidden, 1)
        )

    def forward(self, tokens: Tensor, mask: Tensor, scalars: Tensor) -> Tensor:
        """Compute logits.

        Args:
            tokens: (b, n, TOKEN_FEATURES) fp32.
            mask: (b, n) bool, true in the last column.
            scalars: (b, scalars) fp32.

        Returns:
            (b,) fp32, not calibrated.

        Source:
            Li et al., ICLR 2023, arXiv 2401.16720: attention over the recent history of a layer's weights.
        """
        x = self.embed(((tokens - self.token_mean) / self.token_std).clamp(-_CLIP, _CLIP))  # (b, n, dim)
        newest = x[:, -1:]  # (b, 1, dim)
        q, k, v = (self._split(part) for part in (self.query(newest), self.key(x), self.value(x)))  # (b, heads, 1 or n, dim / heads)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        scaled = self.scale(scalars)
        return (self.linear(scaled) + self.verdict(torch.cat([newest[:, 0], read.flatten(1), scaled], 1)))[:, 0]

    def scale(self, scalars: Tensor) -> Tensor:
        """Convert scalars to standard deviations of the training set, clipped.

        Args:
            scalars: (b, scalars) fp32.

        Returns:
            (b, scalars) fp32.
        """
        return ((scalars - self.scalar_mean) / self.scalar_std).clamp(-_CLIP, _CLIP)

    def calibrated(self, logits: Tensor) -> Tensor:
        """Convert logits of the network to those of a calibrated probability on unseen network kinds.

        Args:
            logits: (b,) fp32.

        Returns:
            (b,) fp32.
        """
        return self.calibration[0] * logits + self.calibration[1]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class FreezePredictor(nn.Module):
    """Estimates how likely a layer and all layers before it have converged.

    One judge reads the weights alone, the other also reads their probe features.

    Args:
        config: Hyper-parameters; None: the defaults.
        threshold: Probability in (0, 1) from which a layer counts as converged; chosen in training and stored in the
            file. At it both judges have the same precision on left-out network kinds.
    """

    def __init__(self, config: PredictorConfig | None = None, *, threshold: float = 0.5) -> None:
        super().__init__()
        self.config = config or PredictorConfig()
        self.threshold = threshold
        self.weights = Judge(self.config, len(SCALAR_FEATURES))
        self.probe = Judge(self.config, len(SCALAR_FEATURES) + len(PROBE_FEATURES))

    def set_thresholds(self, weights: float, probe: float | None) -> None:
        """Set `threshold`, and shift the probe judge's logits so that the same threshold is the right one for it.

        Args:
            weights: Threshold of the judge on weights alone, in (0, 1).
            probe: The probe judge's own threshold, in (0, 1); None: that judge is unchanged.
        """
        self.threshold = weights
        if probe is not None:
            self.probe.calibration[1] += math.log(weights / (1 - weights)) - math.log(probe / (1 - probe))

    def forward(self, tokens: Tensor, mask: Tensor, scalars: Tensor, probe: Tensor | None = None) -> Tensor:
        """Compute calibrated logits.

        Args:
            tokens: (b, n, TOKEN_FEATURES) fp32.
            mask: (b, n) bool, true in the last column.
            scalars: (b, SCALAR_FEATURES) fp32.
            probe: (b, PROBE_FEATURES) fp32, if known; rows with NaN are judged by the weights alone.

        Returns:
            (b,) fp32.
        """
        logits: Tensor = self.weights.calibrated(self.weights(tokens, mask, scalars))
        if probe is None:
            return logits
        known = ~probe.isnan().any(1)
        both = torch.cat([scalars, probe.nan_to_num(0.0)], 1)
        return torch.where(known, self.probe.calibrated(self.probe(tokens, mask, both)), logits)

    @torch.no_grad()
    def probabilities(self, batch: FeatureBatch) -> Tensor:
        """Return the probability that each layer of the batch and all layers before it have converged.

        The probability of a prefix cannot exceed that of a shorter one, so the lowest value so far counts.

        Args:
            batch: Features of the layers, front to back.

        Returns:
            (layers,) fp32 in [0, 1], non-increasing.
        """
        if not batch.names:
            return torch.zeros(0)
        return self(batch.tokens, batch.mask, batch.scalars, batch.probe).sigmoid().cummin(0).values


def save_predictor(model: FreezePredictor, path: Path, notes: dict[str, Any] | None = None) -> None:
    """Write weights, feature statistics, names and threshold to a safetensors file, atomically.

    Args:
        model: The predictor.
        path: The file.
        notes: JSON-able description of how it was made.
    """
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "token_features": TOKEN_FEATURES,
        "scalar_features": SCALAR_FEATURES,
        "probe_features": PROBE_FEATURES,
        "min_snapshots": MIN_SNAPSHOTS,
        "config": asdict(model.config),
        "threshold": model.threshold,
        "notes": notes or {},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # A single metadata entry, because safetensors writes several in an order that varies between runs.
    partial.write_bytes(save({k: v.contiguous() for k, v in model.state_dict().items()}, metadata={"smartfrz": json.dumps(header)}))
    os.replace(partial, path)


def load_predictor(path: str | Path | None = None) -> FreezePredictor:
    """Load a predictor.

    Args:
        path: The file; None: the shipped one.

    Raises:
        ValueError: The file is missing, truncated, not a safetensors file (pickles are never opened), or has another
            format version, other features or shapes, or non-finite values. Names the setting, the path and what is
            allowed.
    """
    path = DEFAULT_PREDICTOR if path is None else Path(path)
    if not path.is_file():
        raise _refuse(path, "no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _refuse(path, f"not a complete safetensors file ({error})") from error
    try:
        header = json.loads(metadata.get("smartfrz", "{}"))
        if header.get("format") != FORMAT or header.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"its format is {header.get('format')!r}, version {header.get('format_version')!r}")
        features = {"token_features": TOKEN_FEATURES, "scalar_features": SCALAR_FEATURES, "probe_features": PROBE_FEATURES}
        for key, ours in features.items():
            if header[key] != list(ours):
                raise ValueError(f"its {key} are {header[key]}, this version computes {list(ours)}")
        threshold = header["threshold"]
        if type(threshold) is not float or not 0.0 < threshold < 1.0:
            raise ValueError(f"its threshold is {threshold!r}, not in (0, 1)")
        model = FreezePredictor(PredictorConfig(**header["config"]), threshold=threshold)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refuse(path, str(error)) from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        name = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))[0]
        raise _refuse(path, f"its tensor {name} has the shape {found.get(name)}, expected {expected.get(name)}")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
            raise _refuse(path, f"its tensor {name} is not finite fp32")
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def predictor_notes(path: str | Path) -> dict[str, Any]:
    """Return how the predictor in a file was made: the notes written by `train_predictor`.

    Raises:
        ValueError: As in `load_predictor`.
    """
    load_predictor(path)
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["smartfrz"])["notes"]


def standardize(judge: Judge, tokens: Tensor, mask: Tensor, scalars: Tensor) -> None:
    """Set the judge's feature statistics to those of a training set.

    Args:
        judge: The judge, modified in place.
        tokens: (b, n, TOKEN_FEATURES) fp32.
        mask: (b, n) bool; tokens at False do not count.
        scalars: (b, scalars) fp32.
    """
    for name, values in (("token", tokens[mask]), ("scalar", scalars)):
        std = values.double().std(0)
        getattr(judge, f"{name}_mean").copy_(values.double().mean(0))
        getattr(judge, f"{name}_std").copy_(std.where(std > 1e-6, torch.ones_like(std)))


def _refuse(path: Path, why: str) -> ValueError:
    return ValueError(f"{_SETTING}: {path}: {why}; {_ALLOWED}")


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters of a module."""
    return sum(math.prod(p.shape) for p in model.parameters())
