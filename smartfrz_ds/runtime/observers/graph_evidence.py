"""Evidence for the gradient check: which modules took part in a step, and which lost the connection to those in front of them.

The modules that hold parameters are hooked, for single steps only. In recorded steps the autograd graph between them is walked once: it
says of each module which others are upstream of it. In a checked step it is enough to see which modules ran and whether anything that
went into them requires grad.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from smartfrz_ds.model.forward_mode import ForwardMode
from smartfrz_ds.model.freeze_modules import use_is_cut
from smartfrz_ds.model.hooks import ModuleHook, PluginTime


class GraphEvidence:
    """Watches the modules that own parameters.

    A module *ran* if it was called with gradients on, or in a reentrant checkpointing region. It was *fed* if something that went in
    required grad. A module that got gradients, wasn't fed, and used to have others upstream is the edge of a cut: the modules upstream
    that ran have lost their path.
    """

    def __init__(self, model: nn.Module, mode: ForwardMode, time: PluginTime | None = None) -> None:
        self._mode, self._time = mode, time
        self._handles: list[RemovableHandle] = []
        self.take(model)

    def take(self, model: nn.Module) -> None:
        """Look up again which module owns which parameters, and discard all records."""
        self.stop()
        self._model = model
        self._own: dict[nn.Module, list[Parameter]] = {}
        self._owners: dict[Parameter, list[nn.Module]] = defaultdict(list)
        for module in model.modules():
            if held := list(module.parameters(recurse=False)):
                self._own[module] = held
                for param in held:
                    self._owners[param].append(module)
        self._bit = {module: 1 << i for i, module in enumerate(self._own)}
        self._upstream: dict[nn.Module, int] = {}  # -> bits of the modules whose outputs its input was made of
        self._ran: set[nn.Module] = set()
        self._fed: set[nn.Module] = set()

    def start(self, params: Collection[Parameter], *, record: bool) -> None:
        """Watch the modules of these parameters until `stop`. record: learn the order of the modules, in the first forward."""
        self.stop()
        self._ran, self._fed = set(), set()
        self._recording = record
        for module in dict.fromkeys(m for p in params for m in self._owners.get(p, ())):
            if use_is_cut(module):
                continue  # on purpose: that use trains nothing, the weight's other uses do
            # In front of ZeRO-3's own hooks, whose copies of the inputs require no grad inside a region.
            self._handles.append(module.register_forward_pre_hook(ModuleHook(self._before, self._time), with_kwargs=True, prepend=True))
            if record:
                self._handles.append(module.register_forward_hook(ModuleHook(self._after, self._time)))
        if record:
            self._handles.append(self._model.register_forward_hook(ModuleHook(self._end, self._time), always_call=True))

    def stop(self) -> None:
        """Remove the hooks. The records are kept until the next `start`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._recording = False
        self._forget_graph()

    def runs(self, module: nn.Module) -> None:
        """Note a module that takes part and whose hook came too late."""
        if module in self._own:
            self._ran.add(module)

    @property
    def blind(self) -> bool:
        """Whether no hook ran at all, as in a compiled model: then a module that didn't run says nothing."""
        return not self._ran

    def ran(self, param: Parameter) -> bool:
        """Whether a module that owns this parameter took part in the step."""
        return any(module in self._ran for module in self._owners.get(param, ()))

    def cut_off(self, missing: Collection[Parameter], got: Collection[Parameter]) -> set[Parameter]:
        """Return those of `missing` whose path is gone. got: the parameters that have a gradient."""
        lost = 0
        for module, upstream in self._upstream.items():
            if module in self._ran and module not in self._fed and any(p in got for p in self._own[module]):
                lost |= upstream
        return {p for p in missing if any(m in self._ran and self._bit[m] & lost for m in self._owners.get(p, ()))}

    # --- hooks ------------------------------------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        region = None
        if not torch.is_grad_enabled() and (region := self._mode.region()) is None:
            return  # a reference pass or an evaluation
        if not any(p.requires_grad for p in self._own[module]):
            return  # the user has switched it off for this forward
        self._ran.add(module)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
        if inputs:
            self._fed.add(module)
        if not self._recording:
            return
        seen = self._upstream.get(module, 0)
        for x in inputs:
            seen |= self._behind(x.grad_fn)
        if region is not None:  # inside, nothing requires grad: the whole region is one node of the graph
            for node, _ in region.next_functions:
                seen |= self._behind(node)
            seen |= self._made.get(region, 0)
            self._made[region] = self._made.get(region, 0) | self._bit[module]
        self._upstream[module] = seen & ~self._bit[module]

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not self._recording or not torch.is_grad_enabled():
            return
        for x in tree_leaves(output):
            if isinstance(x, Tensor) and x.grad_fn is not None:
                self._made[x.grad_fn] = self._made.get(x.grad_fn, 0) | self._bit[module]

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and self._recording and self._made:
            self._recording = False
            self._forget_graph()  # its nodes hold activations

    def _forget_graph(self) -> None:
        self._made: dict[Any, int] = {}  # node of the autograd graph -> bits of the modules that it is the output of
        self._known: dict[Any, int] = {}  # node -> bits of all modules that it was made of

    def _behind(self, node: Any) -> int:
        """Return the modules of which `node` was made. Each node is visited once a forward."""
        known, stack = self._known, [node]
        while stack:
            at = stack[-1]
            if at is None or at in known:
                stack.pop()
                continue
            behind = [n for n, _ in at.next_functions if n is not None]
            if waiting := [n for n in behind if n not in known]:
                stack += waiting
                continue
            bits = self._made.get(at, 0)
            for n in behind:
                bits |= known[n]
            known[at] = bits
            stack.pop()
        return known.get(node, 0)
