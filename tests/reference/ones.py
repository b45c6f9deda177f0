"""Training without data: every gradient is one."""

from __future__ import annotations

from typing import Any

import torch


def step(optimizer: Any) -> None:
    """Step all parameters of the optimizer's groups."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.zero_grad()
