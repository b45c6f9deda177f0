"""How the settings name a policy that is not one of this package's: a class, an installed package's policy, or an object."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from pydantic_core import PydanticCustomError

GROUP = "smartfrz.policies"
"""The group of entry points in which a package offers policies by name."""
OR_OWN = "'package.module:Class', or the name of a policy of an installed package"
_PATH = re.compile(r"\w+(\.\w+)*:[\w.<>]+")
_OF_OBJECT = " (an object)"


def installed_policies() -> dict[str, str]:
    """Return the policies that installed packages offer: the class of each name, as 'package.module:Class'. Imports none of them."""
    return {point.name: point.value for point in entry_points(group=GROUP)}


def is_path(name: str) -> bool:
    """Whether a policy's name has the form 'package.module:Class'."""
    return _PATH.fullmatch(name) is not None


def check_own_name(name: str) -> str:
    """Return the name of a policy that is not built in. Used by pydantic; nothing is imported."""
    if not is_path(name) and name not in installed_policies():
        raise PydanticCustomError("policy", "not a policy")
    return name


@dataclass(frozen=True, eq=False)
class PolicyObject:
    """A policy that the script passes as an object instead of a name.

    Attributes:
        policy: The object.
        initial: Its state when it was passed, in JSON: a run that starts anew resets it to this. "null" if it could not be saved.
    """

    policy: Any
    initial: str

    @property
    def name(self) -> str:
        """The class of the object as 'package.module:Class', which stands for it in the settings, the log and messages."""
        kind = type(self.policy)
        return f"{kind.__module__}:{kind.__qualname__}"

    @property
    def in_a_trainers_state(self) -> str:
        """Its name in a Trainer's state, which `with_object` refuses: an object can't be made again from a file."""
        return self.name + _OF_OBJECT


def with_object(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by name, in which an object at `policy` is a `PolicyObject`.

    Raises:
        ValueError: It is a class, or the name of an object in a Trainer's state.
    """
    given: Any = settings.get("policy")
    if isinstance(given, str) and given.endswith(_OF_OBJECT):
        raise ValueError(
            f"smartfrz.policy: the Trainer's state names {given}, which can't be made again from it; allowed: "
            "restore_callback_states_from_checkpoint=False, or the policy by name, with smartfrz.policy_settings"
        )
    if given is None or isinstance(given, PolicyObject | str | int | float | list | tuple | dict | set | frozenset | bytes):
        return dict(settings)
    if isinstance(given, type):
        raise ValueError(
            f"smartfrz.policy: got the class {given.__name__}; allowed: an object, {given.__name__}(…), or the text "
            f"'{given.__module__}:{given.__qualname__}'"
        )
    try:
        initial = json.dumps(given.state_dict())
    except Exception:  # the check at the start names what is wrong with it
        initial = "null"
    return {**settings, "policy": PolicyObject(given, initial)}


def by_name(policy: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry point's settings by name, among them its argument `policy`, unless that is None."""
    return {**settings, **({} if policy is None else {"policy": policy})}
