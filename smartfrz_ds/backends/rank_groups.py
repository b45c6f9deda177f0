"""The groups of ranks within which an engine's parts communicate, where these are not all of its ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class RankGroups:
    """The groups of this rank. None: all ranks.

    Attributes:
        exchange: The ranks among which a change moves optimizer state, where it moves any.
        stages: One rank of each stage of a pipeline.
        sampling: The ranks that together hold all samples of a sharded engine; global rank 0 is one of them.
        holds_samples: Whether this rank is one of them.
    """

    exchange: dist.ProcessGroup | None = None
    stages: dist.ProcessGroup | None = None
    sampling: dist.ProcessGroup | None = None
    holds_samples: bool = True
