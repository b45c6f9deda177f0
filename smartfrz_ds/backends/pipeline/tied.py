"""Weights that two entries of a pipeline share (TiedLayerSpec), while the front one of the two layers is frozen.

On two stages such a weight has two copies. DeepSpeed adds their gradients in every step, and both are updated alike. With the front layer
frozen there are two ways:
  "tied": "train"   the front copy leaves the optimizer, the rear one goes on training alone. Gradients are no longer added; after each step
                    the rear stage broadcasts the weight, so that the front uses what one process would use. At a thaw the front copy takes
                    the rear one's optimizer state, so that both are updated alike again.
  "tied": "freeze"  both copies leave their optimizers; nothing is sent.
On one stage the two entries share one module, which model/freeze_modules.py freezes like any other. If the front use is a function of the
user's, which no module hook sees, that function runs without a graph.

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
from torch import Tensor

from smartfrz_ds.backends.deepspeed.base import DeepSpeedBackend
from smartfrz_ds.backends.deepspeed.weight_state import WeightState
from smartfrz_ds.backends.transaction import Transaction
from smartfrz_ds.model.freeze_modules import TiedMode
from smartfrz_ds.model.layers import Layer

from .layers import PipelineLayer, module_at, shared_weights, tied_uses


def pinned_entries(pipe: PipelineModule) -> set[int]:
    """Return the entries that may not move to another stage: the tied ones, whose groups of ranks are created once."""
    return {i for i, spec in enumerate(pipe._layer_specs) if isinstance(spec, TiedLayerSpec)}


class _WithoutGraph:
    """A function of the user's whose use of a tied weight is cut out of backward."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner

    def __call__(self, *args: Any) -> Any:
        with torch.no_grad():
            return self.inner(*args)


class TiedWeights:
    """The tied weights of one stage. mode: the setting `smartfrz.tied`. cut: the keys whose front layer is frozen at present."""

    def __init__(self, backend: DeepSpeedBackend, mode: TiedMode) -> None:
        self._backend, self.mode = backend, mode
        self.cut: frozenset[str] = frozenset()
        self._agreed: set[str] = set()  # keys whose weights have gradients on all stages, as the ranks have told each other

    def on_layout_changed(self, layers: Sequence[Layer], frozen: Collection[str]) -> None:
        """Follow a change of the layout."""
        pipe = self._backend.engine.module
        self.cut = self._keys_of(layers, frozen)
        self._agreed.clear()
        for key, uses in tied_uses(pipe).items():
            if self.mode == "train" and all(module_at(pipe, i) is not None for i in uses):
                self._cut_function(uses[0], cut=key in self.cut)
        for key in sorted(pipe.tied_comms):
            if not self._is_front(key) and len(pipe.tied_comms[key]["ranks"]) > 1:
                for weight in shared_weights(pipe, key):
                    # the only copy that trains is the one that a norm counts
                    weight.ds_pipe_replicated = key not in self.cut  # type: ignore[attr-defined]

    def _keys_of(self, layers: Sequence[Layer], names: Collection[str]) -> frozenset[str]:
        """Return the keys whose front layer is among these."""
        fronts = {i: x.name for x in layers if isinstance(x, PipelineLayer) for i in range(x.first, x.last + 1)}
        uses = tied_uses(self._backend.engine.module)
        return frozenset(key for key, (front, _) in uses.items() if fronts[front] in names)

    def _cut_function(self, index: int, *, cut: bool) -> None:
        pipe = self._backend.engine.module
        entry = pipe.forward_funcs[index - pipe._local_start]
        if not isinstance(entry, partial):
            return  # a module: freeze_modules.py has its hook
        inner = entry.func.inner if isinstance(entry.func, _WithoutGraph) else entry.func
        new = type(entry)(_WithoutGraph(inner) if cut else inner, *entry.args, **entry.keywords)
        vars(new).update(vars(entry))  # timing.TimedEntry has its clock there
        pipe.forward_funcs[index - pipe._local_start] = new

    def reduce(self) -> None:
        """Add the gradients of the two copies of each weight that trains in both.

        Raises:
            RuntimeError: A weight has a gradient on one stage but not on another; DeepSpeed would wait indefinitely. In the first step
                after a change of the layout on the ranks of both stages, later on the rank on which `requires_grad` was switched off.
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
        """Broadcast the weight of the rear stage to the front."""
        pipe = self._backend.engine.module
        for key in sorted(self.cut & pipe.tied_comms.keys()) if self.mode == "train" else ():
            for weight in shared_weights(pipe, key):
                dist.broadcast(weight.data, src=self._rear(key), group=pipe.tied_comms[key]["group"])

    def _check_gradients(self, key: str, comm: dict[str, Any]) -> None:
        """Check that the stages agree. Collective in the first step after a change of the layout, and until all weights have gradients."""
        engine = self._backend.engine
        weights = shared_weights(engine.module, key)
        own = [(getattr(w, "_hp_grad", None) if engine.using_bf16_optimizer else w.grad) is not None for w in weights]
        if key in self._agreed:
            missing = [w for w, has in zip(weights, own, strict=True) if not has]
            alone = engine.using_bf16_optimizer or not all(w.requires_grad for w in missing)
            if not missing or not alone:
                for weight in missing:  # not used in this step; the other stage waits for its part of the sum
                    weight.grad = torch.zeros_like(weight)
                return
        else:
            have = torch.tensor(own, dtype=torch.int32, device=engine.device)
            dist.all_reduce(have, group=comm["group"])
            counts = have.tolist()
            alone = any(0 < count < len(comm["ranks"]) for count in counts)
            if all(count == len(comm["ranks"]) for count in counts):
                self._agreed.add(key)
        if alone:
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
    def equalize(self, layers: Sequence[Layer], back: Collection[str], tx: Transaction) -> None:
        """Give front copies that train again, and are in their optimizer, the master weight, moments and step count of the rear ones.

        Collective, within a transaction. A rollback of the thaw discards the written values; the low-precision weights were equal already
        (`after_step`).
        """
        pipe, device = self._backend.engine.module, self._backend.device
        keys = self._keys_of(layers, back)
        if self.mode != "train" or not keys or pipe.num_stages == 1:
            return
        here = [(key, weight) for key in sorted(keys & pipe.tied_comms.keys()) for weight in shared_weights(pipe, key)]
        own: list[WeightState] = []
        told: list[list[Any]] = []
        with tx.step("describe the state of the tied weights"):
            for key, weight in here:
                own.append(self._backend.weight_state(weight))
                told.append([None if self._is_front(key) else own[-1].about()])
        with tx.exchange("tell the state of the tied weights"):
            for (key, _), about in zip(here, told, strict=True):
                dist.broadcast_object_list(about, src=self._rear(key), group=pipe.tied_comms[key]["group"])
        rooms: list[dict[str, Tensor]] = []
        with tx.step("make room for the state of the tied weights"):
            for (about,) in told:
                rooms.append({name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in about["tensors"].items()})
        with tx.exchange("copy the state of the tied weights"):
            for (key, weight), state, room in zip(here, own, rooms, strict=True):
                source, group = self._rear(key), pipe.tied_comms[key]["group"]
                dist.broadcast(weight.data, src=source, group=group)
                for name, tensor in room.items():
                    if not self._is_front(key):
                        tensor.copy_(state.read(name))
                    dist.broadcast(tensor, src=source, group=group)
        with tx.step("take in the state of the tied weights"):
            for (key, _), state, (about,), room in zip(here, own, told, rooms, strict=True):
                if self._is_front(key):
                    for name, tensor in room.items():
                        state.write(name, tensor)
                    state.set_numbers(about["numbers"])
