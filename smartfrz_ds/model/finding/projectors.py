"""Projectors: modules that connect one tower of blocks to the next, as between a vision tower and a language model.

A projector is a layer of its own, so that it keeps training while a tower is frozen. It is recognized by its place
and the widths that it connects; names are used only if these are not conclusive.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from .facts import LISTS, class_of, common_parent, is_vectors, looks_like_embedding, parent_of, shape_of

_FOLDED = 16  # upper limit of features that a projector combines into one (pixel shuffle: 4; concatenated feature layers: 6)

# Names that tell what a module is for. The first are used for projectors only; the second also for heads, as in
# contrastive models.
_SURELY = re.compile(r"projector|multi_?modal|(^|_)mm_|connector|merger|(^|_)mlp1$|aligner|resampler|abstractor|bridge|enc_to_dec")
_PERHAPS = re.compile(r"(^|_)proj(_|\d*$)|projection")
# Names of modules that run behind a tower's blocks, wherever they are registered.
_LAST = re.compile(r"final|(^|_)(out|head|f)(_|$)")


def surely_named(path: str) -> bool:
    """Return whether the last part of a name is one used for projectors only."""
    return _SURELY.search(path.rsplit(".", 1)[-1].lower()) is not None


def perhaps_named(path: str) -> bool:
    """Return whether the last part of a name is one used for projectors, among others."""
    return surely_named(path) or _PERHAPS.search(path.rsplit(".", 1)[-1].lower()) is not None


def named_last(path: str) -> bool:
    """Return whether the last part of a name is one used for modules at the end of a tower."""
    return _LAST.search(path.rsplit(".", 1)[-1].lower()) is not None


def projector_list(parent: nn.Module, child: nn.Module) -> bool:
    """Return whether a module is a list of modules of the same class as a projector beside it.

    Such a list contains further projectors rather than blocks (Qwen3-VL's mergers).

    Args:
        parent: The module that holds the list and the projector.
        child: A child of it.
    """
    items = {class_of(item) for item in child.children()}
    return len(items) == 1 and any(
        class_of(other) in items and surely_named(name) for name, other in parent.named_children() if other is not child
    )


@dataclass(frozen=True)
class Border:
    """The border between block `at` and the next one.

    Attributes:
        at: Number of the block in front.
        top: Path of the innermost module that contains both blocks.
        front: Path of the child of `top` that contains the block in front.
        back: Path of the child of `top` that contains the block behind.
        sure: Whether the structure shows that towers of different kinds meet here, rather than stages of one.
        mixed: Whether the two blocks are of different classes.
        width: Width of the block in front.
        behind: Widths of all blocks behind.
    """

    at: int
    top: str
    front: str
    back: str
    sure: bool
    mixed: bool
    width: int
    behind: frozenset[int]


class Borders:
    """The places in a model where towers meet.

    Args:
        model: The model.
        blocks: Names of the model's blocks, front to back, from `finding.structure`.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Sequence[str]]) -> None:
        self._model = model
        self._blocks = [paths[0] for paths in blocks]
        self._widths = [_width(model.get_submodule(path)) for path in self._blocks]
        found = (self._border(at, a, b) for at, (a, b) in enumerate(pairwise(self._blocks)))
        self.between: dict[int, Border] = {border.at: border for border in found if border is not None}

    def _border(self, at: int, a: str, b: str) -> Border | None:
        top = common_parent([a, b])
        depth = len(top.split(".")) + 1 if top else 1
        front, back = (".".join(path.split(".")[:depth]) for path in (a, b))
        kinds = [class_of(self._model.get_submodule(path)) for path in (top, front, back)]
        if kinds[0] is nn.ModuleList or front == a or back == b:
            return None  # blocks or stages of one list
        one, other = self._model.get_submodule(a), self._model.get_submodule(b)
        mixed = class_of(one) is not class_of(other)
        lists = any(kind in LISTS for kind in kinds)  # such as layer1 and layer2 of a ResNet
        sure = kinds[0] not in LISTS and ((mixed and not lists) or self._embeds(back))
        return Border(at, top, front, back, sure, mixed, self._widths[at], frozenset(self._widths[at + 1 :]))

    def _embeds(self, path: str) -> bool:
        """Return whether the module at `path` has an input of its own: embeddings outside its blocks."""
        inside = tuple(f"{block}." for block in self._blocks)
        return any(
            issubclass(class_of(module), nn.Embedding) and not f"{path}.{name}".startswith(inside)
            for name, module in self._model.get_submodule(path).named_modules()
        )

    def is_projector(self, path: str, module: nn.Module, at: int) -> bool:
        """Return whether a module registered between two blocks is a projector to the next tower.

        Args:
            path: Dotted name of the module.
            module: The module.
            at: Number of the block in front of it.
        """
        border = self.between.get(at)
        if border is None or is_vectors(module):
            return False
        takes, gives = _ends(module)
        reaches = gives in border.behind and gives != border.width
        if path.startswith(f"{border.back}."):  # in front of the next tower's blocks, not beside them: Idefics' modality_projection
            return border.sure and perhaps_named(path) and self._blocks[at + 1].removeprefix(f"{parent_of(path)}.").count(".") > 1
        if path.startswith(f"{border.front}."):  # a part of the tower in front, behind its blocks: Qwen2-VL's merger; not a pooler
            return surely_named(path) or (border.sure and reaches)
        if perhaps_named(path):
            return True
        if border.sure:  # not an output layer
            return not gives or gives in border.behind
        onward = border.mixed or gives != self._widths[at + 1]  # to the next tower, or to a tower of the same kind; not to the next stage
        return bool(onward and reaches and border.width and takes % border.width == 0)

    def in_front(self, path: str, module: nn.Module, others: Collection[str], *, sure: bool = False) -> int | None:
        """Find the block in front of which a projector runs that is registered behind all towers or before them.

        Args:
            path: Path of the candidate.
            module: The candidate.
            others: Paths of everything registered in the same place.
            sure: Whether only an unambiguous name qualifies.

        Returns:
            Number of the block; None if the candidate is not a projector, but an output layer or a projection of a
            contrastive model.
        """
        if is_vectors(module) or looks_like_embedding(path, module):
            return None
        top = parent_of(path)
        inside = f"{top}." if top else ""
        units: dict[str, list[int]] = {}  # child of `top` that contains the blocks -> their numbers
        for number, block in enumerate(self._blocks):
            if not block.startswith(inside):
                return None  # beside only a part of the towers
            units.setdefault(block.removeprefix(inside).split(".")[0], []).append(number)
        takes, gives = _ends(module)
        names = list(units)
        for i in range(len(names) - 1, 0, -1):
            first = units[names[i]][0]
            if self._widths[first] != gives or first - 1 not in self.between:
                continue
            fronts = {self._widths[number] for name in names[:i] for number in units[name]}
            if not any(takes % width == 0 and takes // width <= _FOLDED for width in fronts if width):
                continue
            if surely_named(path):
                return first
            pair = any(_ends(self._model.get_submodule(x)) == (gives, gives) for x in others if x != path and parent_of(x) == top)
            if not sure and takes != gives and gives not in fronts and not pair:
                return first
        return None

    def is_output(self, path: str, module: nn.Module, at: int) -> bool:
        """Return whether a module registered in front of a tower can only run behind its blocks: it maps their width to another one.

        Args:
            path: Path of the module.
            module: The module.
            at: Number of the tower's last block.
        """
        if is_vectors(module) or looks_like_embedding(path, module):
            return False
        takes, gives = _ends(module)
        return takes == self._widths[at] and bool(gives) and gives not in self._widths

    def adopts(self, path: str, at: int) -> bool:
        """Return whether a norm or parameter beside the towers belongs to the projector at their border.

        A norm does. A parameter does if it has the width of the tower behind and not that of the tower in front
        (LLaVA-NeXT's image_newline).

        Args:
            path: Dotted name of the norm or parameter.
            at: Number of the block in front of the border.
        """
        border = self.between[at]
        if parent_of(path) != border.top:
            return False
        found: object = getattr(self._model.get_submodule(border.top), path.rpartition(".")[2])
        if isinstance(found, nn.Parameter):
            shape = shape_of(found)
            return bool(shape) and shape[-1] != border.width and shape[-1] in border.behind
        return isinstance(found, nn.Module) and is_vectors(found)


def _width(block: nn.Module) -> int:
    """Return the width of a block's residual stream: the most frequent dimension of its weights, without LoRA ranks."""
    sizes = Counter(n for name, p in block.named_parameters() if "lora_" not in name for n in set(shape_of(p)[:2]))
    return max(sizes, key=lambda n: (sizes[n], n), default=0)


def _ends(module: nn.Module) -> tuple[int, int]:
    """Return the input and output width of a module, from its first and last matrix; (0, 0) if it has none."""
    widths = []
    for m in module.modules():
        if isinstance(m, nn.Linear):
            widths.append((m.in_features, m.out_features))
        elif isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            widths.append((m.in_channels, m.out_channels))
    return (widths[0][0], widths[-1][1]) if widths else (0, 0)
