"""Errors that callers of this package can catch."""

from __future__ import annotations


class FreezeError(RuntimeError):
    """A freeze or thaw went wrong after it had begun: the engine's state can't be trusted any more, on any rank."""


class ChangeUndone(RuntimeError):
    """A freeze or thaw failed on some rank, and every rank was brought back to the previous layout: training can go on."""


class NotEnoughMemory(ValueError):
    """A freeze or thaw needs more memory than is free on some rank. Raised on all of them; nothing was changed."""


class RanksDisagree(RuntimeError):
    """Ranks that must do the same would do different things. Raised on all of them."""


class MissingGradients(RuntimeError):
    """Active parameters got no gradient in the first step after a freeze. Raised on all ranks, before the optimizer's step."""
