"""Policies that are not built in: finding the class, making the policy, and checking that it can be one."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from smartfrz_ds.config.own import OR_OWN, installed_policies, is_path
from smartfrz_ds.config.reading import show
from smartfrz_ds.model.view import Need

from .base import Policy

_KEY = "smartfrz.policy"
# The methods of a policy and their arguments: those that it must have, and those that it may have.
_REQUIRED = {"decide": ("view",), "state_dict": (), "load_state_dict": ("state",)}
_OPTIONAL = {
    "check_start": ("total_steps", "layers"),
    "change_steps": ("total_steps",),
    "lr_scales": ("step", "total_steps", "layers", "keep_active"),
}


def own_class(name: str, builtin: Mapping[str, Any]) -> type[Any]:
    """Import the class of a policy.

    Args:
        name: 'package.module:Class', or the name under which an installed package offers it.
        builtin: The built-in policies, for the message.

    Raises:
        ValueError: It cannot be imported, or it lacks a method; names both.
    """
    path = name if is_path(name) else installed_policies().get(name)
    if path is None:
        raise ValueError(f"{_KEY}: got {name!r}; allowed: {', '.join(builtin)}, {OR_OWN}")
    module, _, inside = path.partition(":")
    try:
        found: Any = import_module(module)
        for part in inside.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing runs the module's code
        raise ValueError(
            f"{_KEY}: got {name!r}, which cannot be imported ({type(error).__name__}: {error}); allowed: 'package.module:Class' of a "
            "module that every rank can import (PYTHONPATH)"
        ) from error
    if not isinstance(found, type):
        raise ValueError(f"{_KEY}: got {name!r}, which is a {type(found).__name__}; allowed: a class")
    _check_methods(found, name)
    return found


def make_own(name: str, settings: Mapping[str, Any], builtin: Mapping[str, Any]) -> Policy:
    """Make the policy of this name.

    Args:
        name: As in `own_class`.
        settings: The arguments of the class, by name.
        builtin: The built-in policies, whose names it may not have.

    Raises:
        ValueError: The class cannot be imported, refuses the settings, or is not a policy's.
    """
    kind = own_class(name, builtin)
    values = _checked(kind, settings)
    try:
        policy = kind(**values)
    except Exception as error:
        raise ValueError(f"smartfrz.policy_settings: {kind.__name__} refuses them: {type(error).__name__}: {error}") from error
    check_policy(policy, name, builtin)
    return policy


def check_policy(policy: Any, name: str, builtin: Mapping[str, Any]) -> None:
    """Check that an object can be a run's policy: its methods, its attributes, and that its state can be saved and loaded.

    Raises:
        ValueError: It cannot; names what is missing or wrong.
    """
    _check_methods(type(policy), name)
    own = getattr(policy, "name", None)
    if not isinstance(own, str) or not own or own in builtin:
        taken = ", not that of a built-in policy" if own in builtin else ""
        raise ValueError(f"{_KEY}: {name!r} has the name {own!r}; needed: an attribute name, a text that is not empty{taken}")
    needs = getattr(policy, "needs", None)
    if not isinstance(needs, frozenset | set) or not needs <= set(get_args(Need)):
        raise ValueError(
            f"{_KEY}: {name!r} has needs = {needs!r}; needed: a frozenset of {', '.join(map(repr, get_args(Need)))}, empty for none"
        )
    if ("lr_scale" in needs) != hasattr(policy, "lr_scales"):
        raise ValueError(f"{_KEY}: {name!r} has only one of needs with 'lr_scale' and the method lr_scales; allowed: both or none")
    state = saved_state(policy)
    try:
        policy.load_state_dict(state)
    except Exception as error:
        raise ValueError(
            f"{_KEY}: {name!r} cannot load the state that it saves ({type(error).__name__}: {error}); needed: load_state_dict takes what "
            "state_dict returns, after JSON (lists for tuples, texts as keys)"
        ) from error


def saved_state(policy: Policy) -> Any:
    """Return a policy's state as a checkpoint holds it.

    Raises:
        ValueError: It is not JSON.
    """
    try:
        return json.loads(json.dumps(policy.state_dict()))
    except Exception as error:
        raise ValueError(
            f"{_KEY}: the state of {policy.name!r} cannot be saved ({type(error).__name__}: {error}); needed: state_dict returns a dict "
            "of numbers, texts, lists and dicts"
        ) from error


def _check_methods(kind: type[Any], name: str) -> None:
    lacking = [f"{method}({', '.join(('self', *args))})" for method, args in _REQUIRED.items() if not callable(getattr(kind, method, None))]
    if lacking:
        raise ValueError(f"{_KEY}: {name!r} lacks {', '.join(lacking)}; needed: the methods of smartfrz_ds.Policy")
    for method, args in (_REQUIRED | _OPTIONAL).items():
        function = getattr(kind, method, None)
        if function is None:
            continue
        wanted = f"{method}({', '.join(('self', *args))})"
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            raise ValueError(f"{_KEY}: {name!r} has {method} as a coroutine or generator; needed: a plain method {wanted}")
        try:
            _signature(function).bind(None, *args)
        except TypeError as error:
            raise ValueError(f"{_KEY}: {name!r} has {method}{_signature(function)}: {error}; needed: {wanted}") from error


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _checked(kind: type[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check settings against the arguments of a class, and their values against its annotations."""
    params = {n: p for n, p in list(_signature(kind.__init__).parameters.items())[1:] if p.kind != p.VAR_POSITIONAL}
    anything = any(p.kind == p.VAR_KEYWORD for p in params.values())
    named = {n: p for n, p in params.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for key in settings:
        if key not in named and not anything:
            near = get_close_matches(key, named, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"smartfrz.policy_settings.{key}: unknown key; {hint}allowed: {', '.join(named) or 'none'}")
    if missing := [n for n, p in named.items() if p.default is p.empty and n not in settings]:
        raise ValueError(f"smartfrz.policy_settings: {', '.join(missing)} must be set for {kind.__name__}, which has no default")
    try:
        hints = get_type_hints(kind.__init__)
    except Exception:  # annotations that exist for type checkers only
        hints = {}
    return {key: _value(key, value, hints.get(key)) for key, value in settings.items()}


def _value(key: str, value: Any, annotation: Any) -> Any:
    """Convert a JSON value to its annotated type: strictly, as in the rest of the settings (the text "5" is not an integer)."""
    if annotation is None:
        return value
    try:
        adapter = TypeAdapter[Any](annotation, config=None if _has_config(annotation) else ConfigDict(strict=True))
    except PydanticSchemaGenerationError:  # a type that pydantic does not know is the class's own concern
        return value
    try:
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        inner = "".join(f".{part}" for part in first["loc"])
        raise ValueError(f"smartfrz.policy_settings.{key}{inner}: got {show(first['input'])}; allowed: {first['msg']}") from None


def _has_config(annotation: Any) -> bool:
    return hasattr(annotation, "__pydantic_config__") or hasattr(annotation, "model_config") or hasattr(annotation, "__dataclass_fields__")
