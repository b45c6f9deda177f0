"""ZeRO-3 leaf modules: which classes are in effect, what made them leaves, and the setting that turns them off.

The weights of a leaf module are gathered together, and one hook on the module reduces all their gradients (deepspeed
runtime/zero/stage3.py). The ZeRO-3 backend does not support that hook yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

SWITCH = '"zero_optimization": {"leaf_module": {"classes": []}}'
_EXACT = f"set {SWITCH}; freezing is exact then (each rank runs every module that is in them, so that none waits for another)"
_ROUTED = (
    "train with zero_optimization.stage 2, where leaf modules have no effect. Their experts are modules in a list: without the leaf, "
    f"{SWITCH}, ZeRO-3 hangs as soon as two ranks send their tokens to different experts"
)


def describe_leaf_modules(model: nn.Module, leaves: Sequence[nn.Module], zero: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Describe leaf modules for a refusal.

    Args:
        model: The whole model.
        leaves: Its leaf modules.
        zero: The section zero_optimization of the config.

    Returns:
        Pairs of text and remedy, one for each cause of leaf modules.
    """
    names = {id(module): name for name, module in model.named_modules()}
    by_maker: dict[str, list[nn.Module]] = {}
    for leaf in leaves:
        by_maker.setdefault(_maker(leaf, names.get(id(leaf), ""), zero), []).append(leaf)
    found = []
    for maker, modules in by_maker.items():
        classes = dict.fromkeys(type(m).__name__ for m in modules)
        counts = ", ".join(f"{sum(type(m).__name__ == c for m in modules)} of class {c}" for c in classes)
        routed = any(isinstance(child, nn.ModuleList) and len(child) > 1 for m in modules for child in m.modules())
        remedy = _ROUTED if routed else _EXACT
        if maker == _SCRIPT:
            classes_text = ", ".join(classes)
            remedy = f"do not call it, or call unset_z3_leaf_modules(model, [{classes_text}]) before the engine is created; and {remedy}"
        found.append((f"ZeRO-3 leaf modules ({counts}), turned on by {maker}", remedy))
    return found


_SCRIPT = "a call of set_z3_leaf_modules, in the script or in a library"


def _maker(module: nn.Module, name: str, zero: Mapping[str, Any]) -> str:
    """Return the cause that made this module a leaf.

    Source: deepspeed/utils/z3_leaf_module.py, apply_zero_leaf_module_config.
    """
    section = zero.get("leaf_module")
    section = section if isinstance(section, Mapping) else {}
    kind = type(module)
    own = (kind.__name__, f"{kind.__module__}.{kind.__qualname__}")
    for entry in _entries(section, "classes"):
        if entry in own:
            return f"zero_optimization.leaf_module.classes: {entry!r} in the config"
    for entry in _entries(section, "names"):
        if entry == name:
            return f"zero_optimization.leaf_module.names: {entry!r} in the config"
    for entry in _entries(section, "name_suffixes"):
        if name.endswith(entry):
            return f"zero_optimization.leaf_module.name_suffixes: {entry!r} in the config"
    if "classes" not in section and any(entry in own for entry in default_classes()):
        return "DeepSpeed itself, which makes leaves of its DEFAULT_LEAF_MODULE_CLASSES (the config does not name them)"
    return _SCRIPT


def default_classes() -> Sequence[str]:
    """Return the classes that DeepSpeed turns into leaves if the config names none."""
    from deepspeed.runtime.zero.leaf_module_config import DEFAULT_LEAF_MODULE_CLASSES

    return list(DEFAULT_LEAF_MODULE_CLASSES)


def _entries(section: Mapping[str, Any], key: str) -> list[str]:
    value = section.get(key)
    return [value] if isinstance(value, str) else [str(entry) for entry in value] if isinstance(value, list | tuple) else []


def leaves_by_config(model: nn.Module, zero: Mapping[str, Any]) -> list[nn.Module]:
    """Return the modules that DeepSpeed would turn into leaves with this config, and those that are leaves already. Changes nothing."""
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.utils.z3_leaf_module import apply_zero_leaf_module_config, set_z3_leaf_module, z3_leaf_module

    before = [m for m in model.modules() if z3_leaf_module(m)]
    section = zero.get("leaf_module")
    config = DeepSpeedZeroLeafModuleConfig(**(section if isinstance(section, Mapping) else {}))
    wanted = [*config.classes, *config.names, *config.name_suffixes]
    made = apply_zero_leaf_module_config(model, config) if wanted else []  # it warns if nothing is wanted
    known = {id(m) for m in before}
    for module in made:
        if id(module) not in known:
            set_z3_leaf_module(module, False)
    return list(dict.fromkeys([*before, *made]))
