"""Is the order of the layers, read off the structure, the order in which the model uses them?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from torch import nn

from .layers import Layer
from .module_hook import ModuleHook


class OrderCheck:
    """Compares the order of the layers with the order in which the first forward of `model` uses them; then it removes its hooks.

    A layer counts from its first use, the head from the last of its parts. An embedding must come before the layer behind it (a decoder's
    embedding may run before the encoder). Layers that the forward does not call as modules are left out.
    When the orders differ: ValueError with both, out of that forward (strict), or a UserWarning. A head of which only a part runs earlier
    always warns: while it is active, back-propagation runs up to that part.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], strict: bool = True) -> None:
        self.done = False
        self._names = [layer.name for layer in layers]
        self._kinds = [layer.kind for layer in layers]
        self._strict = strict
        self._used: list[tuple[int, int]] = []  # (position of the layer, number of the module), by first use
        owner = {module: layer.position for layer in reversed(layers) for top in layer.modules for module in top.modules()}
        self._handles = [
            module.register_forward_pre_hook(ModuleHook(partial(self._note, position, number)))
            for number, (module, position) in enumerate(owner.items())
            if next(module.parameters(recurse=False), None) is not None
        ]
        # first of all pre-hooks of the root, which may be a layer's module itself
        self._handles.append(model.register_forward_pre_hook(ModuleHook(self._start), prepend=True))
        self._handles.append(model.register_forward_hook(ModuleHook(self._compare)))

    def remove(self) -> None:
        """Take the hooks away; nothing will be compared any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _start(self, module: nn.Module, args: Any) -> None:
        self._used.clear()  # whatever ran outside a whole forward, or in one that failed

    def _note(self, position: int, number: int, module: nn.Module, args: Any) -> None:
        if (position, number) not in self._used:
            self._used.append((position, number))

    def _compare(self, module: nn.Module, args: Any, output: Any) -> None:
        self.remove()
        self.done = True
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for rank, (position, _) in enumerate(self._used):
            first.setdefault(position, rank)
            last[position] = rank
        seen = sorted(first)
        rank_of: dict[int, float] = {p: last[p] if self._kinds[p] == "head" else first[p] for p in seen}
        for p, behind in reversed(list(pairwise(seen))):
            if self._kinds[p] == "embedding" and rank_of[p] < rank_of[behind]:
                rank_of[p] = rank_of[behind] - 0.5 ** (behind - p)  # runs early enough, however early
        actual = sorted(seen, key=rank_of.__getitem__)
        if actual != seen:
            self._tell(
                "the forward uses the layers in another order than the model's structure shows.\n"
                f"  structure: {self._list(seen)}\n  forward:   {self._list(actual)}\n"
                f'List them by hand, front to back: "smartfrz": {{"layers": [...]}}',
                self._strict,
            )
        elif len(seen) > 1 and self._kinds[seen[-1]] == "head" and first[seen[-1]] < first[seen[-2]]:
            self._tell(
                f"a part of layer {self._names[seen[-1]]!r} runs before other layers: while it is active, back-propagation runs up to that "
                'part. To give it to a layer in front, list the layers by hand: "smartfrz": {"layers": [...]}',
                strict=False,
            )

    def _list(self, positions: Sequence[int]) -> str:
        return ", ".join(self._names[p] for p in positions)

    def _tell(self, message: str, strict: bool) -> None:
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
