"""The controller's methods under the names that they had up to 0.1."""

from __future__ import annotations

from typing import Any, cast


class FormerNames:
    """Deprecated names of a controller's methods."""

    def learn(self, *, scheduler: Any = None, total_steps: int | None = None, told_by: str = "learn()") -> None:
        """Call `set_schedule`. Deprecated: the former name."""
        cast("Any", self).set_schedule(scheduler=scheduler, total_steps=total_steps, told_by=told_by)

    def release(self) -> None:
        """Call `detach`. Deprecated: the former name."""
        cast("Any", self).detach()
