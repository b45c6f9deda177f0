"""Lossless JSON encoding of small tensors, for the state of policies and counters in a checkpoint's freeze state."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def encode(tensor: Tensor) -> dict[str, Any]:
    """Encode a tensor losslessly.

    Args:
        tensor: fp32 or fp64, of any shape and on any device.

    Returns:
        A JSON-serializable dict with shape, dtype and the base64 of the bytes.
    """
    data = tensor.detach().cpu().contiguous().numpy()
    return {"shape": list(data.shape), "dtype": data.dtype.name, "data": base64.b64encode(data.tobytes()).decode()}


def decode(item: Mapping[str, Any]) -> Tensor:
    """Decode the output of `encode`.

    Args:
        item: The output of `encode`.

    Returns:
        The tensor, bit for bit, on the host.
    """
    data = np.frombuffer(bytearray(base64.b64decode(item["data"])), dtype=item["dtype"])
    return torch.from_numpy(data).to(_DTYPES[item["dtype"]]).view(*item["shape"])
