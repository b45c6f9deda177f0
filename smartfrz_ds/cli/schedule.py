"""The output of `smartfrz schedule`: writes a schedule to edit, and shows what trains in each of its phases."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from smartfrz_ds.config.reading import read_config, total_steps_in
from smartfrz_ds.config.schedule import PhaseSettings, ScheduleSettings, dumped, with_steps
from smartfrz_ds.config.settings import SECTION, FreezeConfig

# Shares of the run at which phases of a new schedule begin: front layers freeze late, and thaw early, where most is learned.
_FREEZE_AT, _THAW_AT = ("40%", "60%", "80%"), ("10%", "20%", "30%", "40%")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The layers of a model, without their weights.

    Attributes:
        infos: The layers as a policy sees them (`LayerInfo`), front to back.
        lent: Weights of a layer that train even while it is frozen, because a later layer uses them too.
        source: Where they come from, for the reader.
    """

    infos: Sequence[Any]
    source: str
    lent: Mapping[str, int] = field(default_factory=dict)


def shape_of_model(folder: Path, config: FreezeConfig) -> Shape:
    """Build a Hugging Face model from its config.json on the meta device, and find its layers. No weights are loaded.

    Raises:
        ValueError: There is no config.json, transformers does not know the model, or the model's layers are not found.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model: got '{folder}', which has no config.json; allowed: the folder of a Hugging Face model")
    import torch
    import transformers

    from smartfrz_ds.model.finding.facts import numel_of
    from smartfrz_ds.model.layers import find_layers
    from smartfrz_ds.model.view import layer_infos

    try:
        read = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        named = getattr(transformers, next(iter(read.architectures or ()), ""), None)
        with torch.device("meta"):
            model = named._from_config(read) if named is not None else transformers.AutoModel.from_config(read)
    except Exception as error:  # of transformers, whose types differ by version
        raise ValueError(f"--model: got '{folder}', from which transformers makes no model ({type(error).__name__}: {error})") from error
    layers = find_layers(model, config.layers)
    lent = {x.name: sum(numel_of(p) for p in x.tied) for x in layers if x.tied} if config.tied == "train" else {}
    return Shape(infos=layer_infos(layers), source=f"{type(model).__name__} of {folder}", lent=lent)


def shape_of_log(log: Path) -> Shape:
    """Return the layers of the last run in a log.

    Raises:
        ValueError: It is not a log, or of a version that did not write the layers.
    """
    from smartfrz_ds.model.view import LayerInfo
    from smartfrz_ds.telemetry.recorded_run import find_log, load_run

    start = next(iter(load_run(find_log(log)).starts), None)
    if start is None:
        raise ValueError(f"--from-log: got '{log}', which has no line of a start; allowed: --model too, for the layers")
    rows = zip(start.layers, start.kinds, start.weights, strict=True)
    return Shape(infos=[LayerInfo(name=n, kind=k, numel=w) for n, k, w in rows], source=str(log))  # type: ignore[arg-type]


def new_phases(infos: Sequence[Any], *, unfreeze: bool) -> tuple[PhaseSettings, ...]:
    """Return a schedule to start from: front layers freeze in three phases; or (unfreeze) all thaw in four, the last ones first."""
    body = [x.name for x in infos if x.kind != "head" and x.numel]
    if not unfreeze:
        ends = [max(1, round(len(body) * share)) for share in (0.25, 0.5, 0.75)]
        starts = [0, *ends]
        groups = [body[a:b] for a, b in zip(starts, ends, strict=False)]
        return tuple(PhaseSettings(begin=at, freeze=tuple(g)) for at, g in zip(_FREEZE_AT, groups, strict=True) if g)
    count = min(len(_THAW_AT), len(body))
    cuts = [round(len(body) * k / count) for k in range(count + 1)]
    groups = [body[a:b] for a, b in pairwise(cuts)][::-1]
    thaws = (PhaseSettings(begin=at, thaw=tuple(g)) for at, g in zip(_THAW_AT, groups, strict=False))
    return (PhaseSettings(begin=0, freeze=("*",)), *thaws)


def table(phases: Sequence[PhaseSettings], shape: Shape, *, order: str, total_steps: int | None) -> list[str]:
    """Format what trains in each phase: layers, weights, and their share.

    Raises:
        ValueError: A phase does not fit the layers.
    """
    from smartfrz_ds.policies.by_step.schedule import plan_phases

    named = plan_phases(phases, shape.infos, order=order)
    frozen = {x.name for x in shape.infos if not x.numel}
    whole = sum(x.numel for x in shape.infos)
    rows = [["phase", "begins", "change", "layers that train", "weights that train", "share"]]

    def row(label: str, begins: str, change: str) -> list[str]:
        active = [x for x in shape.infos if x.name not in frozen]
        count = sum(x.numel for x in active) + sum(shape.lent.get(name, 0) for name in frozen)
        span = active[0].name + (f" … {active[-1].name}" if len(active) > 1 else "") if active else "none"
        return [label, begins, change, f"{len(active)}: {span}", f"{count:,}", f"{count / whole:.1%}" if whole else ""]

    if not phases or phases[0].begin not in (0, "0%"):
        rows.append(row("", "0", ""))
    for number, (phase, (freeze, thaw)) in enumerate(zip(phases, named, strict=True)):
        frozen = (frozen | set(freeze)) - set(thaw)
        changes = [f"{word} {len(names)}" for word, names in (("freeze", freeze), ("thaw", thaw)) if names]
        rows.append(row(str(number + 1), _begins(phase, total_steps), ", ".join(changes)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in rows]


def _begins(phase: PhaseSettings, total_steps: int | None) -> str:
    text = "" if phase.begin is None else str(phase.begin)
    text = f"epoch {phase.epoch:g}" if phase.epoch is not None else text
    if total_steps is not None and not isinstance(phase.begin, int) and text:
        (resolved,), _ = with_steps(ScheduleSettings(phases=(phase,), epochs=1.0 if phase.epoch else None), total_steps, provisional=True)
        text += f" = step {resolved.begin}" if phase.epoch is None else ""
    waits = f"plateau of {phase.plateau}" if phase.plateau is not None else ""
    return f"{waits}, at the latest {text}" if waits and text else waits or text


def document(phases: Sequence[PhaseSettings], shape: Shape, rows: Sequence[str], *, order: str) -> str:
    """Format a schedule as a settings file with comments, which DeepSpeed and this package read as it is."""
    width = max(len(x.name) for x in shape.infos)
    lines = [f"# Layers of {shape.source}, front to back, with their weights:"]
    lines += [
        f"#   {x.name.ljust(width)}  {x.numel:>15,}" + ("  (head: no policy freezes it)" if x.kind == "head" else "") for x in shape.infos
    ]
    lines += ["#", "# What trains from each phase on:", *(f"#   {row}".rstrip() for row in rows), "{", f'  "{SECTION}": {{']
    lines += ['    "policy": "schedule",', *([f'    "order": {json.dumps(order)},'] if order != "front_to_back" else [])]
    body = ",\n".join(f"        {json.dumps(phase)}" for phase in dumped(phases))
    return "\n".join([*lines, '    "schedule": {\n      "phases": [', body, "      ]\n    }\n  }\n}"])


def made(model: Path | None, config_file: Path | None, from_log: Path | None, *, unfreeze: bool, total_steps: int | None) -> str:
    """Return the output of the command.

    Raises:
        ValueError: The options, the file, the log or the phases do not fit.
    """
    from smartfrz_ds.runtime.rules.replay import phases_of_log, replayed

    if model is None and from_log is None:
        raise ValueError("--model, --from-log: got neither; allowed: a model's folder, the log of a run, or both")
    if from_log is not None and (unfreeze or config_file is not None):
        raise ValueError("--from-log: got it with --unfreeze or --config; allowed: alone, or with --model")
    config = FreezeConfig.load(config_file)
    shape = shape_of_model(model, config) if model is not None else shape_of_log(from_log or Path())
    if config_file is not None:
        if config.policy != "schedule":
            raise ValueError(f"--config: got '{config_file}', whose policy is {config.policy!r}; allowed: one with the policy 'schedule'")
        total = total_steps or total_steps_in(read_config(config_file)[0], config.total_steps)
        schedule = replayed(config.schedule)
        resolved, problems = with_steps(schedule, total, provisional=total is None)
        if problems:
            raise ValueError("\n".join(problems))
        shown = resolved if total is not None else schedule.phases
        return "\n".join(table(shown, shape, order=config.order, total_steps=total))
    phases = phases_of_log(from_log, "--from-log") if from_log is not None else new_phases(shape.infos, unfreeze=unfreeze)
    order = "front_to_back"
    try:
        rows = table(phases, shape, order=order, total_steps=total_steps)
    except ValueError:
        if from_log is None:
            raise
        order = "any"  # as the earlier run must have been
        rows = table(phases, shape, order=order, total_steps=total_steps)
    return document(phases, shape, rows, order=order)
