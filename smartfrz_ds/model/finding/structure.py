"""Detect groups of modules that form the layers of a model from its structure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from .facts import (
    LISTS,
    class_of,
    common_parent,
    example,
    has_state,
    is_composite,
    is_vectors,
    join,
    looks_like_embedding,
    parent_of,
    shape_of,
    shared_parts,
    weight_of,
)
from .projectors import Borders, named_last, perhaps_named, projector_list, surely_named

LayerKind = Literal["embedding", "block", "head"]


@dataclass
class Group:
    """A future layer.

    Attributes:
        name: Name of the layer.
        kind: Kind of the layer.
        paths: Names of its modules and parameters.
        projector: Whether it connects two towers.
        rest_of: Name of the module that it was before other groups were taken out of it; "" where none were.
    """

    name: str
    kind: LayerKind
    paths: list[str] = field(default_factory=list)
    projector: bool = False
    rest_of: str = ""


def block_groups(model: nn.Module) -> list[Group]:
    """Return the groups of a model with repeated blocks; an empty list for other models."""
    blocks = _find_blocks(model)
    if not blocks:
        return []
    block_of = {path: i for i, paths in enumerate(blocks) for path in paths}
    above = {path.rsplit(".", n)[0] for path in block_of for n in range(1, path.count(".") + 1)} | {""}
    fronts: dict[int, list[str]] = {}
    head: list[str] = []
    at = -1  # the last block that the walk has passed
    covered = {m for path in block_of for m in model.get_submodule(path).modules()}  # a shared module counts at its first place
    borders = Borders(model, blocks)
    bridges: dict[int, list[Group]] = {}  # projectors behind the block with this number

    def place(path: str, module: nn.Module | None) -> None:
        if module is None or looks_like_embedding(path, module):
            # the first block of its tower, wherever it is registered
            target = max(range(len(blocks)), key=lambda i: (shared_parts(path, blocks[i][0]), -i))
            fronts.setdefault(target, []).append(path)
        elif at < 0:
            fronts.setdefault(0, []).append(path)
        elif not has_state(module):
            return  # a dropout or activation that may be called anywhere belongs to no layer
        elif at == len(blocks) - 1:
            head.append(path)
        else:  # between two blocks: downsampling of a stage, last norm of an encoder
            gap = bridges.setdefault(at, [])
            beside = bool(gap) and parent_of(gap[-1].paths[0]) == parent_of(path)
            between = at in borders.between and parent_of(path) == borders.between[at].top
            if borders.is_projector(path, module, at):
                if beside and not between:  # several parts of a tower's end
                    gap[-1].paths.append(path)
                else:
                    gap.append(Group(path, "block", [path], projector=True))
                return
            if beside and between and is_vectors(module):
                gap[-1].paths.append(path)
                return
            behind = shared_parts(path, blocks[at + 1][0]) > shared_parts(path, blocks[at][0])
            blocks[at + behind].append(path)

    def walk(path: str, module: nn.Module) -> None:
        nonlocal at
        for name, _ in module.named_parameters(recurse=False):
            place(join(path, name), None)
        for name, child in module.named_children():
            below = join(path, name)
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
    _gather_projectors(model, borders, bridges, blocks, fronts, head, block_of)
    _move_ends(model, borders, blocks, fronts, head, block_of)
    groups = []
    for i, paths in enumerate(blocks):
        groups += bridges.get(i - 1, [])
        if fronts.get(i):
            # "embeddings", or for a second tower "decoder.embeddings"
            tower = "" if i == 0 else common_parent([*fronts[i], paths[0]])
            groups.append(Group(join(tower, "embeddings"), "embedding", fronts[i]))
        groups.append(Group(paths[0], "block", paths))
    if head:
        groups.append(Group("head", "head", head))
    else:
        groups[-1].kind = "head"
    return groups


def _gather_projectors(
    model: nn.Module,
    borders: Borders,
    bridges: dict[int, list[Group]],
    blocks: list[list[str]],
    fronts: dict[int, list[str]],
    head: list[str],
    fixed: Collection[str],
) -> None:
    """Move to the projectors (`bridges`) what belongs to them but is registered elsewhere.

    Args:
        model: The model.
        borders: Where its towers meet.
        bridges: Projectors by the number of the block in front; modified.
        blocks: Paths of each block; modified.
        fronts: Paths in front of each block; modified.
        head: Paths of the head; modified.
        fixed: Names of the blocks, which stay where they are.
    """
    # whole projectors: behind all towers (InternVL's mlp1), or before them
    for paths, sure in ((head, False), (fronts.get(0, []), True)):
        modules = {path: found for path in paths if (found := _module_at(model, path)) is not None}
        for path, whole in modules.items():
            first = borders.in_front(path, whole, modules, sure=sure)
            if first is not None:
                paths.remove(path)
                bridges.setdefault(first - 1, []).append(Group(path, "block", [path], projector=True))
    # Parts: the first of several matrices at the end of a tower (Qwen3-Omni's proj1), lists of more projectors, a
    # norm or a parameter beside one.
    for i, group in ((i, gap[0]) for i, gap in bridges.items() if gap):
        top, parent = borders.between[i].top, parent_of(group.name)
        for paths in (*blocks, *fronts.values()):
            for path in [path for path in paths if parent_of(path) == parent and path not in fixed]:
                module = _module_at(model, path)
                matrices = module is not None and not is_vectors(module)
                if parent != top and paths is blocks[i] and matrices and perhaps_named(path):
                    paths.remove(path)
                    group.name = path
                    group.paths.insert(0, path)
                elif (module is not None and class_of(module) in LISTS and projector_list(model.get_submodule(parent), module)) or (
                    surely_named(group.name) and borders.adopts(path, i)
                ):
                    paths.remove(path)
                    group.paths.append(path)


def _move_ends(
    model: nn.Module, borders: Borders, blocks: list[list[str]], fronts: dict[int, list[str]], head: list[str], fixed: Collection[str]
) -> None:
    """Move modules registered in front of a tower's blocks that run behind them to its end (OPT's final_layer_norm and project_out).

    Args:
        model: The model.
        borders: Where its towers meet.
        blocks: Paths of each block; modified.
        fronts: Paths in front of each block; modified.
        head: Paths of the head; modified.
        fixed: Names of the blocks, which stay where they are.
    """
    firsts = [paths[0] for paths in blocks]
    no_output = all((found := _module_at(model, path)) is not None and is_vectors(found) for path in head)
    for i, paths in [*fronts.items(), *enumerate(blocks)]:
        for path in [path for path in paths if path not in fixed]:
            top, module = parent_of(path), _module_at(model, path)
            tower = [number for number, block in enumerate(firsts) if not top or block.startswith(f"{top}.")]
            if module is None or len(tower) < 2 or i != tower[0]:
                continue
            last = tower[-1]
            named = named_last(path) and (is_vectors(module) or borders.is_output(path, module, last))
            if named or (no_output and last == len(blocks) - 1 and borders.is_output(path, module, last)):
                paths.remove(path)
                (head if last == len(blocks) - 1 else blocks[last]).append(path)


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path; None for a parameter."""
    found = getattr(model.get_submodule(parent_of(path)), path.rpartition(".")[2])
    return found if isinstance(found, nn.Module) else None


def _find_blocks(model: nn.Module) -> list[list[str]]:
    """Return the names of the repeated blocks in order, each with weightless modules that run behind it (Sequential only)."""
    lists = [m for m in model.modules() if isinstance(m, LISTS)]
    repeated = {c for c, n in Counter(class_of(item) for m in lists for item in m.children() if is_composite(item)).items() if n > 1}
    blocks: list[list[str]] = []
    seen: set[nn.Module] = set()

    def walk(path: str, module: nn.Module) -> None:
        items = list(module.named_children())
        hits = [i for i, (_, item) in enumerate(items) if isinstance(module, LISTS) and class_of(item) in repeated and is_composite(item)]
        if not hits:
            for name, child in items:
                if child not in seen and not (class_of(child) in LISTS and projector_list(module, child)):
                    seen.add(child)
                    walk(join(path, name), child)
            return
        if isinstance(module, nn.Sequential):  # its ends may be an embedding and a head
            items = items[hits[0] : hits[-1] + 1]
        mixed = len({tuple(shape_of(p) for p in item.parameters()) for _, item in items if is_composite(item)}) > 1
        for name, item in items:
            if item in seen:
                continue
            seen.add(item)
            if has_state(item):
                blocks.extend([inner] for inner in _open_stage(join(path, name), item, mixed))
            elif isinstance(module, nn.Sequential) and blocks:
                blocks[-1].append(join(path, name))

    walk("", model)
    return blocks


def _open_stage(path: str, item: nn.Module, mixed: bool) -> list[str]:
    """Return the blocks inside a stage (little more than a list of blocks of one class); for anything else, the item itself.

    Args:
        path: Path of the item.
        item: A repeated module.
        mixed: Whether the item's siblings differ in shape, as stages do and transformer blocks do not.
    """
    held = [(path, item)] if class_of(item) in LISTS else [(join(path, n), c) for n, c in item.named_children() if isinstance(c, LISTS)]
    for inner_path, inner in held if mixed or class_of(item) in LISTS else ():
        kids = [(join(inner_path, name), kid) for name, kid in inner.named_children() if has_state(kid)]
        alike = len({class_of(kid) for _, kid in kids}) == 1 and all(is_composite(kid) for _, kid in kids)
        # a ModuleList itself is never called
        if kids and (class_of(item) is nn.ModuleList or (alike and 2 * sum(weight_of(k) for _, k in kids) > weight_of(item))):
            return [kid_path for kid_path, _ in kids]
    return [path]


def child_groups(model: nn.Module) -> list[Group]:
    """Return the groups of a model without repeated blocks: one layer per child with weights, norms with the layer before."""
    loose: list[str] = []  # parameters directly on a module that is opened
    units: list[tuple[list[str], nn.Module]] = []
    seen: set[nn.Module] = set()

    def open_(path: str, module: nn.Module) -> None:
        if isinstance(module, nn.ModuleDict) and sum(has_state(c) for c in module.children()) > 1:
            raise ValueError(
                f"the layers cannot be ordered: {path or 'the model'} is a ModuleDict, which has no defined order. {example(model)}"
            )
        loose.extend(join(path, name) for name, _ in module.named_parameters(recurse=False))
        for name, child in module.named_children():
            below = join(path, name)
            if child in seen:
                continue
            seen.add(child)
            if not has_state(child):
                if isinstance(module, nn.Sequential) and units:
                    units[-1][0].append(below)
            elif _opens(below, child):
                open_(below, child)
            elif units and is_vectors(child):
                units[-1][0].append(below)
            else:
                units.append(([below], child))

    def _opens(path: str, child: nn.Module) -> bool:
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            return True
        direct = next(child.parameters(recurse=False), None) is not None
        if next(child.children(), None) is None or direct or looks_like_embedding(path, child):
            return False
        if isinstance(child, nn.Sequential):
            return sum(not is_vectors(c) for c in child.children() if has_state(c)) > 1
        return 2 * weight_of(child) > weight_of(model)  # most of the model: a backbone

    open_("", model)
    leading = next((i for i, (paths, m) in enumerate(units) if not looks_like_embedding(paths[0], m)), len(units))
    front = [*loose, *(path for paths, _ in units[:leading] for path in paths)]
    groups = [Group("embeddings", "embedding", front)] if front else []
    groups += [Group(paths[0], "block", paths) for paths, _ in units[leading:]]
    if len(groups) < 2:
        raise ValueError(
            f"the layers cannot be ordered: the model has {len(groups)} part(s) with weights; at least 2 are required. {example(model)}"
        )
    groups[-1].kind = "head"
    return groups
