"""A controller's attributes: setting one that does nothing raises, with what to do instead."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from smartfrz_ds.config.settings import SECTION, FreezeConfig

_INSTEAD = {
    "frozen": "call freeze([…]) or thaw([…]) with names of layers",
    "total_steps": (
        f"set {SECTION}.total_steps in the config before the start, or attach with defer_policy=True and call set_schedule(total_steps=…)"
    ),
    "metrics": "call observe(name=value)",
    "config": f'settings are read at the start: change the "{SECTION}" section before it',
}
_LIVE = frozenset({"released", "last_checkpoint"})  # the package's own code sets them, in other modules too


class GuardedAttributes:
    """Private attributes, a few of the package's own and methods can be set; nothing else."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises:
            AttributeError: Setting it would do nothing; names the alternative.
        """
        if name[0] == "_" or name in _LIVE:
            object.__setattr__(self, name, value)
            return
        first = name == "config" and name not in self.__dict__  # by the controller's __init__
        if first or callable(getattr(type(self), name, None)):
            object.__setattr__(self, name, value)
            return
        raise AttributeError(f"controller.{name} can't be set, as that would do nothing: {_instead(self, name)}")


def _instead(controller: object, name: str) -> str:
    if name in _INSTEAD:
        return _INSTEAD[name]
    if name in FreezeConfig.model_fields:
        more = "; while training, freeze([…]) and thaw([…]) do what a policy would" if name == "policy" else ""
        return f"settings are read at the start, set {SECTION}.{name} in the config{more}"
    if hasattr(type(controller), name):
        return "it is read-only"
    close = get_close_matches(name, [*FreezeConfig.model_fields, *_INSTEAD], 1)
    return f"there is no such attribute{f'; did you mean {SECTION}.{close[0]}, which is set in the config' if close else ''}"
