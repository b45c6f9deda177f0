"""The ordered, freezable layers of any model: found by structure or listed by hand.

Order is read off the structure here and checked in the first forward (order_check.py). What freezing means for them: freezing.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod
from typing import Literal

from torch import Tensor, nn

LayerKind = Literal["embedding", "block", "head"]

_LISTS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True, eq=False)
class Layer:
    """One freezable unit of a model. Compared by identity.

    name: unique in the model: the path of its module, or "embeddings" or "head" where it gathers several.
    kind: "embedding" (in front of the blocks of its tower), "block" or "head" (the last layer).
    position: index in the model's layers, 0 is the front.
    modules: the largest modules that lie wholly in this layer, norms and dropouts with them.
    params: the model's own parameters, each in exactly one layer of the model: those that were trainable when the layers were found.
    tied: those of `params` that a layer behind uses too.
    borrowed: trainable parameters that this layer uses and a layer in front owns (the other side of `tied`).
    user_frozen, user_frozen_borrowed: the same as `params` and `borrowed`, of parameters that required no gradient when the layers were
        found. They become the others when the user thaws the layer by name (user_frozen.py), the one thing that changes a layer.
    """

    name: str
    kind: LayerKind
    position: int
    modules: tuple[nn.Module, ...]
    params: tuple[nn.Parameter, ...]
    tied: tuple[nn.Parameter, ...] = ()
    borrowed: tuple[nn.Parameter, ...] = ()
    user_frozen: tuple[nn.Parameter, ...] = ()
    user_frozen_borrowed: tuple[nn.Parameter, ...] = ()

    @property
    def numel(self) -> int:
        """Number of weights in `params`, partitioned by ZeRO-3 or not."""
        return sum(_numel(p) for p in self.params)

    @property
    def is_borrower(self) -> bool:
        """Whether it uses trainable weights that a layer in front owns, in this process or another one."""
        return bool(self.borrowed)

    @property
    def copies(self) -> tuple[nn.Parameter, ...]:
        """This process's copies of weights of `tied`, where the layer itself is in another process (a pipeline's stage)."""
        return ()

    @property
    def representative(self) -> tuple[nn.Parameter, ...]:
        """The parameters among which weights are sampled to stand for the layer."""
        return self.params


def find_layers(model: nn.Module, patterns: str | Sequence[str] = "auto") -> tuple[Layer, ...]:
    """The layers of `model`, front to back, the head last. Every trainable parameter is in exactly one of them.

    patterns: "auto", or names front to back.
      "auto": the repeated blocks (items of a ModuleList or Sequential whose class occurs more than once) are a layer each, stages that
      hold such blocks are opened; what is registered before the first block is "embeddings", what is behind the last is "head".
      A model without repeated blocks gives a layer for each child that has weights, in the order of registration.
      Names: globs (`*`, `?`, `[...]`) that are matched part by part on the dotted names of modules and parameters, from the root:
      `encoder.layer.*` matches `encoder.layer.3`, neither `encoder.layer.3.output` nor `bert.encoder.layer.3`. Every match is a layer;
      several matches of one pattern keep the model's order (`layer.9` before `layer.10`). Weights that nothing matches go to the head.

    A parameter that several layers use belongs to the front one. Layers whose parameters the user froze are listed with `params == ()`.
    Raises ValueError: no trainable parameter; no order can be read off the structure; a pattern matches nothing with weights, or
    something that an earlier pattern has taken.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no trainable parameter: there is nothing to freeze")
    if isinstance(patterns, str) and patterns != "auto":
        raise ValueError(f'smartfrz.layers is {patterns!r}: it must be "auto" or a list of names, front to back')
    groups = (_stacked(model) or _plain(model)) if patterns == "auto" else _listed(model, patterns)
    return _build(model, groups)


def match_layers(patterns: Iterable[str], layers: Sequence[Layer], key: str) -> tuple[Layer, ...]:
    """Those of `layers` whose whole name matches one of the globs (here `*` spans dots), in the order of the layers.

    Raises ValueError that names `key` (for example "smartfrz.keep_active") when a pattern matches no layer.
    """
    names = [layer.name for layer in layers]
    found: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise ValueError(f"{key}: {pattern!r} matches no layer; {_nearest(pattern, names)}")
        found.update(hits)
    return tuple(layer for layer in layers if layer.name in found)


# ---- finding the layers ----------------------------------------------------------------------------------------------------------


@dataclass
class _Group:
    """A layer to be: names of modules and parameters."""

    name: str
    kind: LayerKind
    paths: list[str] = field(default_factory=list)


def _build(model: nn.Module, groups: list[_Group]) -> tuple[Layer, ...]:
    named: dict[str, nn.Module | nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_modules(remove_duplicate=False))
    parts: list[list[nn.Module]] = []
    uses: list[dict[nn.Parameter, None]] = []  # dicts keep the order; parameters hash by identity
    taken: dict[nn.Parameter, int] = {}
    kept: list[_Group] = []
    seen: set[nn.Module] = set()
    for group in groups:
        modules = [m for path in group.paths if isinstance(m := named[path], nn.Module) and m not in seen]
        seen.update(modules)
        found = (named[path] for path in group.paths)
        used = dict.fromkeys(p for x in found for p in ([x] if isinstance(x, nn.Parameter) else x.parameters()))
        owners = {taken.get(p, len(kept)) for p in used}
        if group.kind == "embedding" and used and len(kept) not in owners:
            # nothing of its own, as a decoder's view of a shared embedding: one layer with the owner
            front = min(owners)
            parts[front] += modules
            uses[front].update(used)
            continue
        taken.update({p: taken.get(p, len(kept)) for p in used})
        kept.append(group)
        parts.append(modules)
        uses.append(used)
    layers = []
    for position, (group, modules, used) in enumerate(zip(kept, parts, uses, strict=True)):
        own = [p for p in used if p.requires_grad and taken[p] == position]
        elsewhere = {p for other in uses[position + 1 :] for p in other}
        layers.append(
            Layer(
                name=group.name,
                kind=group.kind,
                position=position,
                modules=tuple(modules),
                params=tuple(own),
                tied=tuple(p for p in own if p in elsewhere),
                borrowed=tuple(p for p in used if p.requires_grad and taken[p] < position),
                user_frozen=tuple(p for p in used if not p.requires_grad and taken[p] == position),
                user_frozen_borrowed=tuple(p for p in used if not p.requires_grad and taken[p] < position),
            )
        )
    every = [p for layer in layers for p in layer.params]
    assert len(every) == len(set(every)) and set(every) == {p for p in model.parameters() if p.requires_grad}
    assert len({layer.name for layer in layers}) == len(layers)
    return tuple(layers)


def _stacked(model: nn.Module) -> list[_Group]:
    """Groups of a model with repeated blocks, else []."""
    blocks = _find_blocks(model)
    if not blocks:
        return []
    block_of = {path: i for i, paths in enumerate(blocks) for path in paths}
    above = {path.rsplit(".", n)[0] for path in block_of for n in range(1, path.count(".") + 1)} | {""}
    fronts: dict[int, list[str]] = {}
    head: list[str] = []
    at = -1  # the last block that the walk has passed
    covered = {m for path in block_of for m in model.get_submodule(path).modules()}  # a shared module counts where it stands first

    def place(path: str, module: nn.Module | None) -> None:
        if module is None or _looks_like_embedding(path, module):
            # the first block of its tower, wherever it is registered
            target = max(range(len(blocks)), key=lambda i: (_shared_parts(path, blocks[i][0]), -i))
            fronts.setdefault(target, []).append(path)
        elif at < 0:
            fronts.setdefault(0, []).append(path)
        elif not _has_state(module):
            return  # a dropout or activation that may be called anywhere: nobody's
        elif at == len(blocks) - 1:
            head.append(path)
        else:  # between two blocks: a stage's down-sampling, an encoder's last norm
            behind = _shared_parts(path, blocks[at + 1][0]) > _shared_parts(path, blocks[at][0])
            blocks[at + behind].append(path)

    def walk(path: str, module: nn.Module) -> None:
        nonlocal at
        for name, _ in module.named_parameters(recurse=False):
            place(_join(path, name), None)
        for name, child in module.named_children():
            below = _join(path, name)
            if below in block_of:
                at = block_of[below]
            elif child in covered:
                continue
            elif below in above:
                covered.add(child)
                walk(below, child)
            else:
                covered.update(child.modules())
                place(below, child)

    walk("", model)
    groups = []
    for i, paths in enumerate(blocks):
        if i in fronts:
            # "embeddings", and of a second tower "decoder.embeddings"
            tower = "" if i == 0 else _common_parent([*fronts[i], paths[0]])
            groups.append(_Group(_join(tower, "embeddings"), "embedding", fronts[i]))
        groups.append(_Group(paths[0], "block", paths))
    if head:
        groups.append(_Group("head", "head", head))
    else:
        groups[-1].kind = "head"
    return groups


def _find_blocks(model: nn.Module) -> list[list[str]]:
    """Names of the repeated blocks in order, each with the weightless neighbours (Sequential only) that run behind it."""
    lists = [m for m in model.modules() if isinstance(m, _LISTS)]
    repeated = {c for c, n in Counter(_class(item) for m in lists for item in m.children() if _is_composite(item)).items() if n > 1}
    blocks: list[list[str]] = []
    seen: set[nn.Module] = set()

    def walk(path: str, module: nn.Module) -> None:
        items = list(module.named_children())
        hits = [i for i, (_, item) in enumerate(items) if isinstance(module, _LISTS) and _class(item) in repeated and _is_composite(item)]
        if not hits:
            for name, child in items:
                if child not in seen:
                    seen.add(child)
                    walk(_join(path, name), child)
            return
        if isinstance(module, nn.Sequential):  # its ends may be an embedding and a head
            items = items[hits[0] : hits[-1] + 1]
        mixed = len({tuple(shape_of(p) for p in item.parameters()) for _, item in items if _is_composite(item)}) > 1
        for name, item in items:
            if item in seen:
                continue
            seen.add(item)
            if _has_state(item):
                blocks.extend([inner] for inner in _open_stage(_join(path, name), item, mixed))
            elif isinstance(module, nn.Sequential) and blocks:
                blocks[-1].append(_join(path, name))

    walk("", model)
    return blocks


def _open_stage(path: str, item: nn.Module, mixed: bool) -> list[str]:
    """The blocks inside when `item` is a stage, that is little more than a list of blocks of one class; else `item` itself.

    mixed: the item's siblings differ in shape, as stages do (a transformer's blocks don't).
    """
    held = [(path, item)] if _class(item) in _LISTS else [(_join(path, n), c) for n, c in item.named_children() if isinstance(c, _LISTS)]
    for inner_path, inner in held if mixed or _class(item) in _LISTS else ():
        kids = [(_join(inner_path, name), kid) for name, kid in inner.named_children() if _has_state(kid)]
        alike = len({_class(kid) for _, kid in kids}) == 1 and all(_is_composite(kid) for _, kid in kids)
        # a ModuleList is never called itself
        if kids and (_class(item) is nn.ModuleList or (alike and 2 * sum(_weight(k) for _, k in kids) > _weight(item))):
            return [kid_path for kid_path, _ in kids]
    return [path]


def _plain(model: nn.Module) -> list[_Group]:
    """Groups of a model without repeated blocks: a layer for each child with weights, its norms with the layer before."""
    loose: list[str] = []  # parameters directly on a module that is opened
    units: list[tuple[list[str], nn.Module]] = []
    seen: set[nn.Module] = set()

    def open_(path: str, module: nn.Module) -> None:
        if isinstance(module, nn.ModuleDict) and sum(_has_state(c) for c in module.children()) > 1:
            raise ValueError(
                f"the layers can't be ordered: {path or 'the model'} is a ModuleDict, which says nothing of the order. {_example(model)}"
            )
        loose.extend(_join(path, name) for name, _ in module.named_parameters(recurse=False))
        for name, child in module.named_children():
            below = _join(path, name)
            if child in seen:
                continue
            seen.add(child)
            if not _has_state(child):
                if isinstance(module, nn.Sequential) and units:
                    units[-1][0].append(below)
            elif _opens(below, child):
                open_(below, child)
            elif units and _is_vectors(child):
                units[-1][0].append(below)
            else:
                units.append(([below], child))

    def _opens(path: str, child: nn.Module) -> bool:
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            return True
        direct = next(child.parameters(recurse=False), None) is not None
        if next(child.children(), None) is None or direct or _looks_like_embedding(path, child):
            return False
        if isinstance(child, nn.Sequential):
            return sum(not _is_vectors(c) for c in child.children() if _has_state(c)) > 1
        return 2 * _weight(child) > _weight(model)  # most of the model: a backbone

    open_("", model)
    leading = next((i for i, (paths, m) in enumerate(units) if not _looks_like_embedding(paths[0], m)), len(units))
    front = [*loose, *(path for paths, _ in units[:leading] for path in paths)]
    groups = [_Group("embeddings", "embedding", front)] if front else []
    groups += [_Group(paths[0], "block", paths) for paths, _ in units[leading:]]
    if len(groups) < 2:
        raise ValueError(
            f"the layers can't be ordered: the model shows {len(groups)} part(s) with weights, at least 2 are needed. {_example(model)}"
        )
    groups[-1].kind = "head"
    return groups


def _listed(model: nn.Module, patterns: Sequence[str]) -> list[_Group]:
    """Groups that the user lists."""
    if not patterns:
        raise ValueError('smartfrz.layers is []: it must be "auto" or name at least one layer')
    named = {path: module for path, module in _walk("", model, set()) if path}
    groups: list[_Group] = []
    taken: dict[str, str] = {}
    for pattern in patterns:
        hits = [path for path, module in named.items() if _matches(path, pattern) and (module is None or _weight(module) > 0)]
        if not hits:
            raise ValueError(
                f"smartfrz.layers: {pattern!r} matches no module or parameter with weights, part by part, from the root; "
                f"{_nearest(pattern, list(named))}"
            )
        for path in hits:
            clash = next((other for other in taken if f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")), None)
            if clash is not None:
                raise ValueError(f"smartfrz.layers: {pattern!r} matches {path!r}, but {taken[clash]!r} has already taken {clash!r}")
            groups.append(_Group(path, "block", [path]))
        taken.update(dict.fromkeys(hits, pattern))
    leading = True
    for group in groups:
        module = named[group.name]
        leading = leading and (module is None or _looks_like_embedding(group.name, module))
        if leading or (module is not None and issubclass(_class(module), nn.Embedding)):
            group.kind = "embedding"
    # What nobody listed: the largest modules with no listed name in them, and single parameters.
    rest: list[str] = []
    covered = {m for path in taken if (module := named[path]) is not None for m in module.modules()}

    def gather(path: str, module: nn.Module) -> None:
        rest.extend(p for name, _ in module.named_parameters(recurse=False) if (p := _join(path, name)) not in taken)
        for name, child in module.named_children():
            below = _join(path, name)
            if child in covered:
                continue
            covered.add(child)
            if any(other.startswith(f"{below}.") for other in taken):
                gather(below, child)
            elif _has_state(child):
                rest.append(below)

    gather("", model)
    if rest:
        groups.append(_Group("head" if "head" not in taken else "rest", "head", rest))
    else:
        groups[-1].kind = "head"
    return groups


# ---- small questions about modules and names -------------------------------------------------------------------------------------


def _class(module: nn.Module) -> type:
    """What a module is without what wraps it: activation checkpointing, FSDP1, or FSDP2, which swaps the class for one of its own."""
    for name in ("_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        if isinstance(inner := module._modules.get(name), nn.Module):
            return _class(inner)
    line = type(module).__mro__  # torch/distributed/fsdp/_fully_shard: FSDPBlock, FSDPModule, Block, ...
    return line[2] if line[1].__name__ == "FSDPModule" else line[0]


def shape_of(p: Tensor) -> tuple[int, ...]:
    """The whole shape, partitioned by ZeRO-3 or not."""
    # ds_shape: the whole shape of a parameter that ZeRO-3 has partitioned (deepspeed/runtime/zero/partition_parameters.py);
    # whole_shape: of one that FSDP1 has cut (backends/fsdp1.py)
    return tuple(getattr(p, "ds_shape", getattr(p, "whole_shape", p.shape)))


def _numel(p: Tensor) -> int:
    return prod(shape_of(p))


def _weight(module: nn.Module) -> int:
    return sum(_numel(p) for p in module.parameters())


def _has_state(module: nn.Module) -> bool:
    """Parameters or buffers that a checkpoint holds (running statistics)."""
    return any(m._parameters or set(m._buffers) - m._non_persistent_buffers_set for m in module.modules())


def _is_composite(module: nn.Module) -> bool:
    return next(module.children(), None) is not None and next(module.parameters(), None) is not None


def _is_vectors(module: nn.Module) -> bool:
    """Only vectors inside, as in a norm."""
    return all(len(shape_of(p)) < 2 for p in module.parameters())


def _looks_like_embedding(path: str, module: nn.Module) -> bool:
    if issubclass(_class(module), nn.Embedding):
        return True
    if "embed" not in path.rsplit(".", 1)[-1].lower():
        return False
    # a norm of the embeddings, a patch embedding; not an output projection that is called embed_out
    return _is_vectors(module) or any(isinstance(m, nn.Embedding | nn.Conv2d) for m in module.modules())


def _walk(path: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module | None]]:
    """Every module and (as None) parameter with its name, in the order of registration; a shared module once."""
    if module not in seen:
        seen.add(module)
        yield path, module
        for name, _ in module.named_parameters(recurse=False):
            yield _join(path, name), None
        for name, child in module.named_children():
            yield from _walk(_join(path, name), child, seen)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _matches(path: str, pattern: str) -> bool:
    parts, globs = path.split("."), pattern.split(".")
    return len(parts) == len(globs) and all(fnmatchcase(part, glob) for part, glob in zip(parts, globs, strict=True))


def _shared_parts(a: str, b: str) -> int:
    n = 0
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        n += 1
    return n


def _common_parent(paths: Sequence[str]) -> str:
    n = min(_shared_parts(paths[0], path) for path in paths[1:])
    return ".".join(paths[0].split(".")[:n])


def _nearest(pattern: str, names: Sequence[str]) -> str:
    near = get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names)[:3]
    return f"the nearest names are {', '.join(map(repr, near))}"


def _example(model: nn.Module) -> str:
    """How to list the layers by hand, with the model's own names."""
    path, module = "", model
    while True:
        kids = [(name, kid) for name, kid in module.named_children() if _weight(kid)]
        direct = [name for name, _ in module.named_parameters(recurse=False)]
        if len(kids) + len(direct) != 1 or not kids:
            break
        path, module = _join(path, kids[0][0]), kids[0][1]
    lists = (nn.ModuleList, nn.ModuleDict)
    names = direct + [f"{name}.*" if isinstance(kid, lists) and len(list(kid.children())) > 1 else name for name, kid in kids]
    listed = ", ".join(f'"{_join(path, name)}"' for name in names[:4])
    return f'List them by hand, front to back, for example: "smartfrz": {{"layers": [{listed}]}}'
