"""Weights that two entries of a pipeline share (TiedLayerSpec), while the front one of the two layers is frozen.

On two stages such a weight has two copies. DeepSpeed adds their gradients in every step, and both are updated alike. With the front layer
frozen there are two ways:
  "tied": "train"   the front copy leaves the optimizer, the rear one goes on training alone. Gradients are no longer added; after each step
                    the rear stage broadcasts the weight, so that the front uses what one process would use. At a thaw the front copy takes
                    the rear one's optimizer state, so that both are updated alike again.
  "tied": "freeze"  both copies leave their optimizers; nothing is sent.
On one stage the two entries share one module, and the general way of freezing.py does it; where the front use is a function of the
user's, which no hook of a module sees, that function runs without a graph.

Touched in DeepSpeed 0.19.8:
  runtime/pipe/module.py   tied_comms (ranks, group), tied_modules, tied_weight_attrs, _recursive_getattr, _layer_specs, forward_funcs,
                           _local_start; Parameter.ds_pipe_replicated (whether a norm leaves a copy out)
  runtime/pipe/engine.py   _exec_reduce_tied_grads
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.module import PipelineModule, TiedLayerSpec

from smartfrz_ds.backends.deepspeed.base import DeepSpeedBackend
from smartfrz_ds.model.freeze_modules import TiedMode
from smartfrz_ds.model.layers import Layer

from .layers import PipelineLayer, module_at, shared_weights, tied_uses


def pinned_entries(pipe: PipelineModule) -> set[int]:
    """The entries of the list that may not move to another stage: the tied ones, whose groups of ranks are made once."""
    return {i for i, spec in enumerate(pipe._layer_specs) if isinstance(spec, TiedLayerSpec)}


class _WithoutGraph:
    """A function of the user's whose use of a tied weight is cut out of backward."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner

    def __call__(self, *args: Any) -> Any:
        with torch.no_grad():
            return self.inner(*args)


class TiedWeights:
    """Of one stage. mode: the setting `smartfrz.tied`. cut: the keys whose front layer is frozen now."""

    def __init__(self, backend: DeepSpeedBackend, mode: TiedMode) -> None:
        self._backend, self.mode = backend, mode
        self.cut: frozenset[str] = frozenset()

    def on_layout_changed(self, layers: Sequence[Layer], frozen: Collection[str]) -> None:
        """After a change of the layout. Collective where a front layer trains again."""
        pipe = self._backend.engine.module
        fronts = {i: x.name for x in layers if isinstance(x, PipelineLayer) for i in range(x.first, x.last + 1)}
        before = self.cut
        self.cut = frozenset(key for key, (front, _) in tied_uses(pipe).items() if fronts[front] in frozen)
        for key, uses in tied_uses(pipe).items():
            if self.mode == "train" and all(module_at(pipe, i) is not None for i in uses):
                self._cut_function(uses[0], cut=key in self.cut)
        for key in sorted(pipe.tied_comms):
            if not self._is_front(key) and len(pipe.tied_comms[key]["ranks"]) > 1:
                for weight in shared_weights(pipe, key):
                    # the only copy that trains is the one that a norm counts
                    weight.ds_pipe_replicated = key not in self.cut  # type: ignore[attr-defined]
            if key in before and key not in self.cut and self.mode == "train":
                self._make_equal(key)

    def _cut_function(self, index: int, *, cut: bool) -> None:
        pipe = self._backend.engine.module
        entry = pipe.forward_funcs[index - pipe._local_start]
        if not isinstance(entry, partial):
            return  # a module: freezing.py has its hook
        inner = entry.func.inner if isinstance(entry.func, _WithoutGraph) else entry.func
        new = type(entry)(_WithoutGraph(inner) if cut else inner, *entry.args, **entry.keywords)
        vars(new).update(vars(entry))  # stage_clock.TimedEntry has its clock there
        pipe.forward_funcs[index - pipe._local_start] = new

    def reduce(self) -> None:
        """Add the gradients of the two copies of each weight that trains in both.

        Raises:
            RuntimeError: a weight has a gradient on one stage and none on another, on the ranks of both: DeepSpeed would wait for ever.
        """
        engine = self._backend.engine
        pipe, comms = engine.module, engine.module.tied_comms
        both = {key: comm for key, comm in comms.items() if key not in self.cut}
        for key, comm in both.items():
            self._check_gradients(key, comm)
        pipe.tied_comms = both
        try:
            engine._exec_reduce_tied_grads()
        finally:
            pipe.tied_comms = comms

    @torch.no_grad()
    def after_step(self) -> None:
        """Give the front what the rear stage has made of the weight."""
        pipe = self._backend.engine.module
        for key in sorted(self.cut & pipe.tied_comms.keys()) if self.mode == "train" else ():
            for weight in shared_weights(pipe, key):
                dist.broadcast(weight.data, src=self._rear(key), group=pipe.tied_comms[key]["group"])

    def _check_gradients(self, key: str, comm: dict[str, Any]) -> None:
        engine = self._backend.engine
        weights = shared_weights(engine.module, key)
        own = [(getattr(w, "_hp_grad", None) if engine.using_bf16_optimizer else w.grad) is not None for w in weights]
        have = torch.tensor(own, dtype=torch.int32, device=engine.device)
        dist.all_reduce(have, group=comm["group"])
        if any(0 < count < len(comm["ranks"]) for count in have.tolist()):
            raise RuntimeError(
                f"the weight that the pipeline ties by the key {key!r} has a gradient on one of its two stages only (on stage "
                f"{engine.stage_id}: {all(own)}). A usual cause is requires_grad_(False) on one of the two copies: freeze with "
                "engine.smartfrz.freeze, or both copies before the start"
            )

    def _rear(self, key: str) -> int:
        return int(max(self._backend.engine.module.tied_comms[key]["ranks"]))

    def _is_front(self, key: str) -> bool:
        return dist.get_rank() != self._rear(key)

    @torch.no_grad()
    def _make_equal(self, key: str) -> None:
        """Give the front copy, back in its optimizer, the master weight, moments and step count of the rear one."""
        pipe = self._backend.engine.module
        comm, source, is_front = pipe.tied_comms[key], self._rear(key), self._is_front(key)
        for weight in shared_weights(pipe, key):
            dist.broadcast(weight.data, src=source, group=comm["group"])
            own = self._backend.weight_state(weight)
            told = [None if is_front else own.about()]
            dist.broadcast_object_list(told, src=source, group=comm["group"])
            state = told[0]
            assert state is not None
            tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in state["tensors"].items()}
            for name, tensor in tensors.items():
                full = (tensor if is_front else own.read(name)).to(self._backend.device)
                dist.broadcast(full, src=source, group=comm["group"])
                if is_front:
                    own.write(name, full)
            if is_front:
                own.set_numbers(state["numbers"])
