"""Hooks on modules that become inactive when the model is copied or pickled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ModuleHook:
    """Calls a function of ours.

    In a pickled or copied model (an EMA, for example) it does nothing, because that model is not being frozen.

    Args:
        function: The function to call; None for none.
    """

    def __init__(self, function: Callable[..., Any] | None) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Call the function, if there is one."""
        return None if self._function is None else self._function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return ModuleHook, (None,)
