"""The attributes of a PipelineModule and its engine that depend on the entries that a stage holds.

Touched in DeepSpeed 0.19.8:
  runtime/pipe/module.py   parts, _set_bounds, _local_start, _local_stop, _layer_specs, forward_funcs, fwd_map, _modules,
                           is_checkpointable_results, is_checkpointable_results_interval, _precompute_checkpointable_values
  runtime/engine.py        param_names; the same table of ZeRO-1 (stage_1_and_2.py) and BF16_Optimizer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from deepspeed.runtime.pipe.module import TiedLayerSpec
from torch import nn
from torch.nn import Parameter

# Attributes of a PipelineModule that `rewire` sets to something else, never edits.
_REPLACED = ("parts", "_local_start", "_local_stop", "fwd_map", "is_checkpointable_results", "is_checkpointable_results_interval")


def remember_wiring(engine: Any) -> Callable[[], None]:
    """Return the action that undoes a following `rewire`: it restores the entries that the module holds at present."""
    pipe = engine.module
    attributes = {name: getattr(pipe, name) for name in _REPLACED}
    functions, entries = pipe.forward_funcs, list(pipe.forward_funcs)
    modules = dict(pipe._modules)
    tables = [(table, dict(table)) for table in _name_tables(engine)]

    def restore() -> None:
        for name, value in attributes.items():
            setattr(pipe, name, value)
        functions[:] = entries  # StageClock edits the list in place
        pipe.forward_funcs = functions
        for table, before in ((pipe._modules, modules), *tables):
            table.clear()
            table.update(before)

    return restore


def rewire(engine: Any, bounds: list[int], functions: Mapping[int, Any]) -> None:
    """Make the module hold exactly the entries of its new bounds, in order, as PipelineModule._build does.

    Args:
        engine: The stage's PipelineEngine.
        bounds: The new bounds of all stages.
        functions: The new entries of this stage, by their place in the list.
    """
    pipe, stage = engine.module, engine.stage_id
    for name in [name for name in pipe._modules if name.isdigit()]:
        del pipe._modules[name]
    pipe.parts = list(bounds)
    pipe._set_bounds(start=bounds[stage], stop=bounds[stage + 1])
    pipe.forward_funcs, pipe.fwd_map = [], {}
    for index in range(bounds[stage], bounds[stage + 1]):
        entry, spec = functions[index], pipe._layer_specs[index]
        pipe.forward_funcs.append(entry)
        if isinstance(entry, nn.Module) and not isinstance(spec, TiedLayerSpec):
            pipe.fwd_map[str(index)] = len(pipe.forward_funcs) - 1
            pipe.add_module(str(index), entry)
    pipe.is_checkpointable_results_interval = None
    pipe._precompute_checkpointable_values()
    names = {p: name for name, p in pipe.named_parameters()}
    for table in _name_tables(engine):
        placeholders = {p: name for p, name in table.items() if name.startswith("smartfrz_")}
        table.clear()
        table.update(names | placeholders)


def _name_tables(engine: Any) -> list[dict[Parameter, str]]:
    tables = (engine.param_names, getattr(engine.optimizer, "param_names", engine.param_names))
    return list({id(table): table for table in tables}.values())
