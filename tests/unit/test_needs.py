"""The tables of what the backends need of DeepSpeed and torch are complete: every touch in the source is in one of them.

Background: a private name that a release lacks showed at the first freeze, on one rank alone, and the others waited for it.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from smartfrz_ds.backends.deepspeed import half, zero0, zero3, zero12
from smartfrz_ds.backends.deepspeed import needs as of_deepspeed
from smartfrz_ds.backends.deepspeed.complete_checkpoints import CompleteCheckpoints
from smartfrz_ds.backends.deepspeed.zero12 import gradient_tables
from smartfrz_ds.backends.pipeline import needs as of_pipelines
from smartfrz_ds.backends.pipeline import schedule, wiring
from smartfrz_ds.backends.pipeline.stage import PipelineStage, PrunedPipeline
from smartfrz_ds.backends.probing import Need, has, late, missing, overrides, takes
from smartfrz_ds.backends.torch import ddp, fsdp1, fsdp2
from smartfrz_ds.backends.torch import needs as of_torch
from smartfrz_ds.integrations.deepspeed import FreezingMixin, FreezingPipelineMixin

PACKAGE = Path(of_deepspeed.__file__).parents[3]
#: Names of variables and attributes that hold an object of DeepSpeed's or torch's.
FOREIGN = {
    *("zero", "wrapper", "engine", "_engine", "pipe", "_pipe", "grid", "coordinator", "parameter_offload", "overflow_checker"),
    *("checkpoint_engine", "ddp", "wrapped", "unit", "_handle", "flat_param"),
}
#: The package's own objects, whose private attributes are its own.
OWN = {"self", "cls", "alive", "clock", "weights", "source", "_weights", "controller", "torch", "c10d", "ddp_of"}
#: What DeepSpeed hangs on parameters as functions.
OF_PARAMETERS = {"partition_numel", "padding_size", "partition", "all_gather"}
#: Touched, and rightly in no table. Each with its reason.
EXEMPT = {
    "smartfrz": "this package's own attribute of an engine",
    "_smartfrz_settings": "this package's own attribute of an engine",
    "__class__": "Python's",
    "__init__": "Python's",
    "__del__": "Python's",
    **dict.fromkeys(
        ("parameters", "named_parameters", "named_buffers", "modules", "named_modules", "add_module", "_modules", "training", "buffers"),
        "nn.Module's documented interface",
    ),
    "_foreach_norm": "torch's; used by torch's own clip_grad_norm_",
    "_foreach_mul_": "torch's; used by torch's own clip_grad_norm_",
    "_config": "read by probing.ask (compat.py), which refuses a missing name itself; in messages and can_be_reshaped only",
    "_dp_group": "removed from a parameter if it is there",
    "get": "of a dict of the config",
    "args": "of functools.partial",
    "__closure__": "Python's",
    "cache_clear": "of functools.lru_cache",
    "smartfrz_user_frozen": "this package's own attribute of a parameter",
    "smartfrz_several": "this package's own attribute of an optimizer",
    "found_inf": "torch's contract between GradScaler and fused optimizers; absent on others",
    "optimizer": "of an engine; of a wrapper of optimizers (several.py), looked for by type",
    "_orig_mod": "torch.compile's wrapper, read with the model itself as the default",
    "_get_in_backward_optimizers": "a function, in the table under its module",
    "register_forward_pre_hook": "nn.Module's documented interface",
    "register_forward_hook": "nn.Module's documented interface",
    "__setattr__": "Python's",
    "ds_pipe_replicated": "set by this package on copies of tied weights; DeepSpeed reads it with a default",
}


def touches(paths: Iterable[Path]) -> dict[str, set[str]]:
    """Name -> the lines of source that touch it on an object which is not this package's own."""
    found: dict[str, set[str]] = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            for name in touched(node):
                found.setdefault(name, set()).add(f"{path.name}:{getattr(node, 'lineno', 0)}")
    return found


def touched(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Attribute):
        base = tail(node.value)
        private = node.attr.startswith("_") and not node.attr.startswith("__") and base not in OWN
        private = private and base != "super()" and not own_name(node.attr)
        if base in FOREIGN or private or node.attr.startswith("ds_") or node.attr in OF_PARAMETERS:
            return [node.attr]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr", "hasattr", "delattr"):
        name = node.args[1]
        if isinstance(name, ast.Constant) and tail(node.args[0]) not in OWN:
            return [str(name.value)]
    return []


def tail(node: ast.AST) -> str:
    """The last name of an expression: "engine" of backend.engine and engine, "zero" of zero["x"]."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript):
        return tail(node.value)
    if isinstance(node, ast.Call):
        return "super()" if isinstance(node.func, ast.Name) and node.func.id == "super" else ""
    return ""


def names_in(needs: Iterable[Need]) -> set[str]:
    return {name for need in needs for name in need.names}


DEEPSPEED = [need for _, table in of_deepspeed.KINDS.values() for need in table] + of_pipelines.PIPELINE
TORCH = [need for _, table in of_torch.KINDS.values() for need in table]


def sources(*folders: str) -> list[Path]:
    found = [p for folder in folders for p in sorted((PACKAGE / folder).rglob("*.py")) if "needs" not in p.parts and p.stem != "needs"]
    assert found
    return found


def test_every_touch_of_deepspeed_is_in_a_table() -> None:
    paths = [p for p in sources("backends/deepspeed", "backends/pipeline") if p.stem != "compat"]  # `ask` there refuses by itself
    paths += [PACKAGE / "integrations/deepspeed.py", PACKAGE / "checkpoint/deepspeed.py"]
    found = touches(paths)
    assert len(found) > 150, "the search has lost its objects"
    known = names_in(DEEPSPEED)
    strange = {name: lines for name, lines in found.items() if name not in known and name not in EXEMPT}
    assert not strange


def test_every_touch_of_torch_is_in_a_table() -> None:
    found = touches(sources("backends/torch"))
    in_scaler = {"_per_optimizer_states", "_get_scale_async"}  # checked by TorchBackend.use_scaler
    refused_with_it = {"_in_backward_optimizers", "_per_group_state_lists", "_current_graph_task_id", "_C"}  # several.py looks for signs
    known = names_in(TORCH) | in_scaler | refused_with_it
    assert len(found) > 25
    assert not {name: lines for name, lines in found.items() if name not in known and name not in EXEMPT}


def own_name(name: str) -> bool:
    """Whether a class of this package's backends defines the attribute."""
    kinds = (half.Bf16Backend, half.Fp16Backend, zero0.Zero0Backend, zero3.Zero3Backend, zero12.Zero12Backend, PipelineStage)
    return any(hasattr(kind, name) for kind in (*kinds, ddp.DdpBackend, fsdp1.Fsdp1Backend, fsdp2.Fsdp2Backend))


def test_nothing_in_the_tables_is_stale() -> None:
    text = "\n".join(p.read_text() for p in sources("backends", "integrations", "checkpoint", "distributed"))
    assert not {name for name in names_in([*DEEPSPEED, *TORCH]) if name not in text} - {
        "_partition_all_parameters"
    }  # what calls our override


def test_attributes_that_are_set_by_name() -> None:
    known = names_in(DEEPSPEED)
    layout = SimpleNamespace(world=1, params=())
    assert gradient_tables(layout, {}).keys() <= known  # type: ignore[arg-type]
    assert set(wiring._REPLACED) <= known


#: Methods of the mixins that are this package's own.
OURS = {"_leaving_out", "_step_and_watch", "_checkpoints", "__del__"}


@pytest.mark.parametrize("mixin", [FreezingMixin, CompleteCheckpoints, FreezingPipelineMixin, PrunedPipeline, schedule.PrunedTrainSchedule])
def test_every_method_that_the_mixins_override_is_in_a_table(mixin: type) -> None:
    wanted = {need.names[0]: need.parameters for need in DEEPSPEED if need.parameters is not None}
    own = OURS | {"__init__", "is_frozen", "_instead_of"}
    for name, method in vars(mixin).items():
        if not inspect.isfunction(method) or name in own:
            continue
        assert name in wanted, f"{mixin.__name__}.{name} is not in a table of needs"
        parameters = list(inspect.signature(method).parameters.values())[1:]
        named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        given = [p for p in wanted[name] or () if p != "..."]
        assert named[: len(given)] == given and (len(named) == len(given) or "..." in (wanted[name] or ()))


# --- the probes themselves ------------------------------------------------------------------------------------------------------------


class Engine(nn.Module):
    """Passes unknown names on to a model, as DeepSpeedEngine does."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1)
        self.table: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return 0 if name == "of_the_model" else self.__missing(name)

    def __missing(self, name: str) -> Any:
        raise AttributeError(name)

    def step(self, loss: int, *, scale: int = 1) -> None:
        self.table["a"] = self.late_one = loss * scale

    def save(self, folder: str, tag: str, more: int) -> None:
        self.step(1)


def lacks(needs: list[Need], version: str = "1.0") -> list[str]:
    engine = Engine()
    return missing(needs, lambda owner: engine if owner == "engine" else [][0], version)


def test_what_is_there_is_not_missing() -> None:
    found = has("engine", "f.py", "model table:dict newer|table")
    found += takes("engine", "f.py", "step(1)", "step(1, scale)", "save(3)")
    found += overrides("engine", "f.py", "save(folder, ...)") + overrides("engine", "f.py", "step(loss, scale)", used_by="save")
    found += late("engine", "f.py", "late_one", used_by="step")
    assert lacks(found) == []


@pytest.mark.parametrize(
    ("need", "words"),
    [
        (has("engine", "f.py", "of_the_model"), "Engine.of_the_model (f.py)"),
        (has("engine", "f.py", "new|old"), "Engine.new or old (f.py)"),
        (has("engine", "f.py", "table:list"), "Engine.table as a list: it is a dict (f.py)"),
        (takes("engine", "f.py", "step(2)"), "with 2 arguments: too many positional arguments (f.py)"),
        (takes("engine", "f.py", "step(1, factor)"), "with 1 argument and factor: got an unexpected keyword argument 'factor' (f.py)"),
        (takes("engine", "f.py", "table()"), "Engine.table() as a function: it is a dict (f.py)"),
        (overrides("engine", "f.py", "save(folder, tag)"), "this package overrides it with (folder, tag) (f.py)"),
        (overrides("engine", "f.py", "save(tag, ...)"), "this package overrides it with (tag, ...) (f.py)"),
        (overrides("engine", "f.py", "step(loss)", used_by="forward"), "Engine.step: forward does not use it (f.py)"),
        (late("engine", "f.py", "late_one", used_by="save"), "Engine.late_one: save does not use it (f.py)"),
        (late("engine", "f.py", "late_one", used_by="gone"), "Engine.gone, which uses late_one (f.py)"),
    ],
)
def test_what_is_missing_is_named(need: list[Need], words: str) -> None:
    (found,) = lacks(need)
    assert found.endswith(words)


def test_a_need_of_some_releases_only() -> None:
    newer = has("engine", "f.py", "absent", versions=">=0.19.7")
    assert lacks(newer, "0.19.6") == [] and lacks(newer, "0.19.8+cu13") == ["Engine.absent (f.py)"]


def test_an_owner_that_is_missing() -> None:
    from smartfrz_ds.backends.probing import CannotTell

    def root_of(owner: str) -> Any:
        raise CannotTell(f"has no attribute {owner}")

    (found,) = missing(has("grid", "f.py", "pp_group"), root_of, "1.0")
    assert found == "grid, which has pp_group (f.py): has no attribute grid"


class Library:
    """An engine of DeepSpeed's, as far as these tests need one."""

    __module__ = "deepspeed.runtime.engine"

    def load(self, folder: str, tag: str = "") -> Any:
        return self._load(folder, tag)

    def _load(self, folder: str, tag: str) -> Any: ...


class OfTheUser(Library):
    def load(self, *args: Any, **kwargs: Any) -> Any:
        return super().load(*args, **kwargs)


class Another(Library):
    __module__ = "deepspeed.runtime.engine"

    def load(self, folder: str, tag: str = "") -> Any: ...


def test_an_override_of_the_users_that_goes_on_to_deepspeed_lacks_nothing() -> None:
    """Background: an engine with `"enabled": false` loads a checkpoint by way of a subclass, and was refused for DeepSpeed's own load."""
    needs = [
        *overrides("engine", "engine.py", "_load(folder, tag)", used_by="load"),
        *overrides("engine", "engine.py", "load(folder, ...)"),
    ]
    for engine in (Library(), OfTheUser()):
        assert missing(needs, lambda owner, engine=engine: engine, "1.0") == []  # type: ignore[misc]
    # a release whose own method goes another way still does
    assert missing(needs[:1], lambda owner: type("Release", (), dict(vars(Another)))(), "1.0") == ["Release._load (engine.py)"]
    lost = type("Release", (), {"__module__": "deepspeed", "load": Another.load, "_load": Library._load})
    assert missing(needs[:1], lambda owner: lost(), "1.0") == ["Release._load: load does not use it (engine.py)"]


def test_a_number_of_numpy_is_a_number() -> None:
    """Background: the bounds of a pipeline whose layers have moved are numbers of NumPy."""
    root = SimpleNamespace(start=np.int64(3), name="3")
    assert missing(has("module", "module.py", "start:int"), lambda owner: root, "1.0") == []
    assert missing(has("module", "module.py", "name:int"), lambda owner: root, "1.0") == [
        "SimpleNamespace.name as a int: it is a str (module.py)"
    ]
