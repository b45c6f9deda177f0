"""Check that the order of the layers, read from the structure, is the order in which the model uses them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby, pairwise
from typing import Any

from torch import nn

from smartfrz_ds.model.finding.facts import class_of

from .hooks import ModuleHook, PluginTime
from .layers import Layer

_SHOWN = 60  # entries of the forward in a message


class OrderCheck:
    """Compares the order of the layers with their order in the first forward of `model`, then removes its hooks.

    A layer counts from its first use, the head and projectors from their last. An embedding must run before the layer
    behind it; a decoder's embedding may run before the encoder. An embedding inside another layer (such as a whole
    language model) does not count. Layers that the forward does not call as modules are ignored.

    If the orders differ, the forward raises ValueError (strict) or warns, with both orders. If only a projector runs
    elsewhere, or a head begins early, it always warns: while that layer is active, back-propagation extends to its
    first part. It also warns about a part of the embeddings that runs behind the blocks (a final norm registered in
    front of them), because that part freezes with the embeddings.

    Args:
        model: The model to watch.
        layers: Its layers, front to back.
        strict: Whether to raise rather than warn.
        time: Counts the seconds of the hooks, if given.

    Attributes:
        done: Whether the comparison has taken place.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], strict: bool = True, time: PluginTime | None = None) -> None:
        self.done = False
        self._layers = layers
        self._strict = strict
        self._names: list[str] = []  # indexed by the number of the module
        self._free: set[int] = set()  # numbers of embeddings inside layers that are not embeddings
        self._used: dict[tuple[int, int], list[int]] = {}  # (position of the layer, number of the module) -> first and last call
        self._calls = 0
        paths = {module: name for name, module in model.named_modules()}
        owner = {module: layer.position for layer in reversed(layers) for top in layer.modules for module in top.modules()}
        self._handles = []
        for module, position in owner.items():
            if next(module.parameters(recurse=False), None) is None:
                continue
            number = len(self._names)
            self._names.append(paths.get(module, type(module).__name__))
            if layers[position].kind == "block" and issubclass(class_of(module), nn.Embedding):
                self._free.add(number)
            self._handles.append(module.register_forward_pre_hook(ModuleHook(partial(self._note, position, number), time)))
        # before all other pre-hooks of the root, which may itself be a layer's module
        self._handles.append(model.register_forward_pre_hook(ModuleHook(self._start, time), prepend=True))
        self._handles.append(model.register_forward_hook(ModuleHook(self._compare, time)))

    def remove(self) -> None:
        """Remove the hooks; nothing is compared any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _start(self, module: nn.Module, args: Any) -> None:
        self._used.clear()  # discard calls outside a complete forward, or in one that failed
        self._calls = 0

    def _note(self, position: int, number: int, module: nn.Module, args: Any) -> None:
        self._calls += 1
        self._used.setdefault((position, number), [self._calls, 0])[1] = self._calls

    def _compare(self, module: nn.Module, args: Any, output: Any) -> None:
        self.remove()
        self.done = True
        first: dict[int, int] = {}
        rank_of: dict[int, float] = {}
        for (position, number), (begin, end) in self._used.items():
            if number in self._free:
                continue
            first.setdefault(position, begin)
            late = self._layers[position].kind == "head" or self._layers[position].projector
            rank_of[position] = max(end, rank_of.get(position, 0)) if late else first[position]
        seen = sorted(first)
        for p, behind in reversed(list(pairwise(seen))):
            if self._layers[p].kind == "embedding" and rank_of[p] < rank_of[behind]:
                rank_of[p] = rank_of[behind] - 0.5 ** (behind - p)  # early enough, however early it runs
        actual = sorted(seen, key=rank_of.__getitem__)
        firm = [p for p in actual if not self._layers[p].projector]
        if actual != seen:
            self._report(
                "the forward uses the layers in a different order from the model's structure.\n"
                f"  structure: {', '.join(self._layers[p].name for p in seen)}\n  forward:   {self._ran()}\n"
                'List the layers front to back, "smartfrz": {"layers": [...]}, or set "order": "any", which requires no order',
                self._strict and firm != sorted(firm),
            )
        elif len(seen) > 1 and self._layers[seen[-1]].kind == "head" and first[seen[-1]] < first[seen[-2]]:
            self._report(
                f"a part of layer {self._layers[seen[-1]].name!r} runs before other layers: while the layer is active, back-propagation "
                'extends to that part. To assign it to an earlier layer, list the layers explicitly: "smartfrz": {"layers": [...]}',
                strict=False,
            )
        elif ends := self._behind_the_blocks(first):
            parts = ", ".join(f"{part} (of layer {name!r})" for part, name in ends[:_SHOWN])
            self._report(
                f"registered in front of the blocks, but run behind them: {parts}. They would freeze with the embeddings; to assign them "
                'to the last layer, list all other layers explicitly: "smartfrz": {"layers": [...]}',
                strict=False,
            )

    def _behind_the_blocks(self, first: Mapping[int, int]) -> list[tuple[str, str]]:
        """Return the modules of embeddings that first run after all blocks behind them have begun, each with its layer.

        Args:
            first: First call of each layer, by position.
        """
        found = []
        for (position, number), (begin, _) in self._used.items():
            behind = [call for other, call in first.items() if other > position and self._layers[other].kind == "block"]
            if self._layers[position].kind == "embedding" and behind and begin > max(behind):
                found.append((self._names[number], self._layers[position].name))
        return found

    def _ran(self) -> str:
        """List the layers in the order in which their modules first ran; one that ran in several places with the first module of each."""
        runs = [(p, [number for _, number in uses]) for p, uses in groupby(self._used, key=lambda use: use[0])]
        places = [p for p, _ in runs]
        shown = [self._layers[p].name + (f" ({self._names[numbers[0]]})" if places.count(p) > 1 else "") for p, numbers in runs[:_SHOWN]]
        return ", ".join(shown + ["…"] * (len(runs) > _SHOWN))

    def _report(self, message: str, strict: bool) -> None:
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
