"""Plain torch in one process, and the common part of every run without DeepSpeed: one state entry per parameter.

DDP, FSDP2 and FSDP1 build on it (ddp.py, fsdp2.py, fsdp1.py).

Touched in torch 2.13, torch/amp/grad_scaler.py: GradScaler._per_optimizer_states, which `update` replaces, and _get_scale_async
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState
from torch.nn import Parameter

from smartfrz_ds.backends.base import Released, Sampler, SampleRequest
from smartfrz_ds.backends.entries import EntryBackend
from smartfrz_ds.backends.memory import storage_bytes
from smartfrz_ds.backends.state_layout import Overrides, pack_state, scalars_beside, state_tensors, to_device, to_host, unpack_state
from smartfrz_ds.backends.transaction import Transaction
from smartfrz_ds.errors import FreezeError
from smartfrz_ds.model.hooks import ModuleHook
from smartfrz_ds.model.layers import shape_of
from smartfrz_ds.model.view import Need

from .several import single


class TorchBackend(EntryBackend):
    """One process with plain torch (or several that each hold all weights).

    Args:
        wrapped: The model as the user calls it.
        module: The model inside of the wrapper, whose structure has the layers.
        optimizer: The torch optimizer.
    """

    name = "torch"
    moves_weights = False

    def __init__(self, wrapped: nn.Module, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(wrapped, [group["params"] for group in optimizer.param_groups])
        self.wrapped, self.module, self._optimizer = wrapped, module, optimizer
        self._scaler: Any = None
        self._scaled: dict[int, Any] = {}  # the scaler's states of optimizers, in the last forward
        self.on_skipped: Callable[[], None] | None = None  # called when an earlier step turns out to have been skipped
        self._names = {p: name for name, p in module.named_parameters()}
        self._owners = [x for x in single(optimizer) for _ in x.param_groups]  # of each group
        self._overrides = [Overrides(x) for x in single(optimizer)]
        self._forwarded = False  # a forward that builds a graph has begun since the last step
        self._handles: list[Any] = []

    def listen(self) -> None:
        """Register hooks on the model that notice when a forward begins."""
        modules = dict.fromkeys((self.wrapped, self.module))
        self._handles += [m.register_forward_pre_hook(ModuleHook(self._note_forward, self.time)) for m in modules]

    def _note_forward(self, module: nn.Module, args: Any) -> None:
        if not torch.is_grad_enabled():
            return
        if self._scaler is not None and module is self.wrapped:
            self._note_skipped_step()
        self._forwarded = True

    def _note_skipped_step(self) -> None:
        """Report a step that the scaler has skipped since the last forward. Reads nothing from the device, as its scale would have to be.

        On an overflow scaler.step() does not call optimizer.step(). Its states of optimizers, which scaler.update() replaces, still say
        that scaler.step() was called.
        """
        before, self._scaled = self._scaled, self._scaler._per_optimizer_states
        if before is self._scaled or not self._forwarded or self.on_skipped is None:
            return
        # several optimizers have one state each
        if any(before[id(x)]["stage"] is OptState.STEPPED for x in single(self._optimizer) if id(x) in before):
            self.on_skipped()

    def stepped(self) -> None:
        """Note that the optimizer has used the gradients: any that are left only wait for zero_grad."""
        self._forwarded = False

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def base_optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def masters(self) -> list[Tensor]:
        return []

    def loss_scale(self) -> float:
        return float(self._scaler.get_scale()) if self._scaler is not None else 1.0

    def loss_scale_on_device(self) -> float | Tensor:
        return self._scaler._get_scale_async() if self._scaler is not None else 1.0

    def use_scaler(self, scaler: Any) -> None:
        """Follow the user's GradScaler.

        Raises:
            ValueError: This torch has another kind of GradScaler.
        """
        if scaler is None or not scaler.is_enabled():
            return
        for name in ("_per_optimizer_states", "_get_scale_async"):
            if not hasattr(scaler, name):
                raise ValueError(
                    f"scaler: got a {type(scaler).__name__}, which has no attribute {name} in torch {torch.__version__}, so skipped steps "
                    "cannot be seen; allowed: a torch.amp.GradScaler of a tested version of torch, or none"
                )
        self._scaler, self._scaled = scaler, scaler._per_optimizer_states

    #: whether the sizes of this wrapper's reductions can be read off the model
    knows_reductions = False

    def reduced_bytes(self) -> int | None:
        """Return the bytes of one reduction per step, under FSDP2 in its `reduce_dtype`."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return 0
        if not self.knows_reductions:
            return None
        return sum(prod(shape_of(p)) * self.gradient_itemsize(p) for p in self.trained())

    def gradient_itemsize(self, param: Parameter) -> int:
        """Return the bytes of one element of this parameter's gradient in its reduction."""
        return param.element_size()

    def optimizer_bytes(self) -> int:
        return storage_bytes(state_tensors(self._optimizer.state))

    def is_boundary(self) -> bool:
        # Gradients that a step has used may still be there: scripts clear them before the next backward.
        clear = all(p.grad is None for p in self.trained()) and not self.gradients_pending()
        return clear or not self._forwarded

    boundary_words = "after optimizer.step() and before the next forward (or with all gradients cleared by zero_grad)"

    def check(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter]) -> None:
        if not self.is_boundary():
            raise RuntimeError(self.not_a_boundary())
        if len(self._optimizer.param_groups) != len(self._order):
            raise ValueError(
                f"the optimizer has {len(self._optimizer.param_groups)} parameter groups, at attach_torch it had {len(self._order)}; "
                "allowed: add_param_group before attach_torch, or between controller.detach() and another attach_torch"
            )
        super().check(freeze, thaw)

    def sampler(self, requests: Sequence[SampleRequest], numel: int) -> Sampler:
        sampler = Sampler(numel)
        if self.is_sampling_rank:  # every rank holds everything; one is enough
            for r in requests:
                sampler.add(r.param, r.elements, r.slots)
        return sampler

    def _copied_bytes(self, freeze: Iterable[Parameter], thaw: Iterable[Parameter]) -> int:
        return 2 * sum(local(p).nbytes for p in thaw)  # two moments, as large as the weights

    def change(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter], *, keep: bool, tx: Transaction) -> Released:
        before = self.optimizer_bytes()
        owners = self._owner_of()
        # Undone last: a wrapper reads the flags of the parameters.
        with tx.step("rewire", undo=lambda: self.rewire(thaw, freeze)):
            pass
        tables = [(owner.state, [p for p in (*freeze, *thaw) if owners[p] is owner]) for owner in dict.fromkeys(self._owners)]
        with tx.step("take the parameters out", undo=self._undo_entries(freeze, thaw, tables)):
            for param in freeze:
                state = owners[param].state.pop(param, {})
                if keep:
                    self._kept[param] = to_host(state)
                param.grad = None
                param.requires_grad_(False)
        with tx.step("put the parameters back"):
            for param in thaw:
                self._restore(param, owners[param])
        with tx.step("regroup"):
            self._regroup((self.frozen | set(freeze)) - set(thaw))
        with tx.step("rewire"):
            self.rewire(freeze, thaw)
        return Released(before - self.optimizer_bytes(), 0)

    def _held(self, params: Sequence[Parameter]) -> list[Any]:
        owners = self._owner_of()
        return [owners[p].state.get(p, {}) for p in params]

    def _owner_of(self) -> dict[Parameter, torch.optim.Optimizer]:
        """Return the optimizer of each parameter, frozen ones included."""
        return {p: owner for owner, order in zip(self._owners, self._order, strict=True) for p in order}

    def _restore(self, param: Parameter, owner: torch.optim.Optimizer) -> None:
        """Return a parameter to the optimizer, with its kept state."""
        param.requires_grad_(True)
        if pattern := self._pattern(owner):  # as the next step would create it: a checkpoint saved before that step must contain it
            owner.state[param] = {k: _zeros(v, param) for k, v in pattern.items()}
        if state := self._kept.pop(param, {}):
            owner.state[param] = to_device(state, param, scalars_beside=scalars_beside(owner))

    @staticmethod
    def _pattern(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return a state from which another parameter's first state can be derived; {} if that is not possible."""
        if type(optimizer) not in _BEGIN_AT_ZERO:
            return {}
        return next((state for state in optimizer.state.values() if "step" in state), {})

    def give_back(self) -> None:
        """Let everything train again, for a run that continues without freezing. Collective. The state of frozen parameters is lost."""
        thaw = [p for group in self._groups for p in group if p in self.frozen]
        self._kept.clear()
        for param in thaw:
            param.requires_grad_(True)
        self._regroup(set())
        if thaw:
            self.rewire((), thaw)

    def _regroup(self, frozen: set[Parameter]) -> None:
        self.frozen = frozen
        for overrides in self._overrides:
            overrides.before()
        for order, group in zip(self._order, self._optimizer.param_groups, strict=False):  # behind them: the user's, of after attach
            group["params"][:] = [p for p in order if p not in frozen]
        for overrides in self._overrides:
            overrides.after()

    def rewire(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter]) -> None:
        """Adapt the wrapper after the optimizer has changed."""

    def verify(self) -> None:
        super().verify()
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        if self.frozen.intersection(held) or self.frozen.intersection(self._optimizer.state):
            raise FreezeError("a frozen parameter is still in the torch optimizer")
        expected = sum(len(order) for order in self._order) - len(self.frozen)
        if len(held) != expected or len(self._optimizer.param_groups) != len(self._order):
            raise FreezeError(f"the torch optimizer holds {len(held)} parameters instead of {expected}")

    # --- checkpoints ------------------------------------------------------------------------------------------------------------

    def kept_state(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        about: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for param, state in self._kept.items():
            if (packed := pack_state(state)) is not None:
                tensors |= {f"{len(about)}/{key}": v for key, v in packed[1].items()}
                about.append({"param": self._names[param]} | packed[0])
        return ({"kept": about}, tensors) if about else None

    def load_kept_state(self, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        params = {name: p for p, name in self._names.items()}
        for k, item in enumerate(about["kept"]):
            mine = {name.removeprefix(f"{k}/"): t for name, t in tensors.items() if name.startswith(f"{k}/")}
            param = params[item["param"]]
            self._kept[param] = unpack_state(item, mine, param)


# Optimizers of which a parameter's first state is zero in every entry, a tensor `step` among them.
_BEGIN_AT_ZERO = (torch.optim.Adam, torch.optim.AdamW)


def _zeros(value: Any, param: Parameter) -> Any:
    """Return the first state of `param` for an entry in which another parameter's state has `value`."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return torch.zeros_like(value) if isinstance(value, Tensor) else value
    return torch.zeros_like(param, dtype=value.dtype, memory_format=torch.preserve_format)


# What FSDP can't give a policy.
FSDP_MISSING: Mapping[Need, str] = {"gradients": "gradients, which FSDP brings to a rank in pieces only"}


class Unwrapped(TorchBackend):
    """Several processes that each hold all weights, without a wrapper that defines how their gradients are reduced."""

    name = "torch, no wrapper"

    def __init__(self, wrapped: nn.Module, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(wrapped, module, optimizer)
        self.warnings.append(
            f"{dist.get_world_size()} processes, but the model is neither in DDP nor in FSDP: it is taken to be the same on all of them"
        )


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor: the shard of a DTensor, else the tensor itself."""
    inside = getattr(tensor, "_local_tensor", None)  # torch/distributed/tensor/_api.py: DTensor; to_local() would record a gradient
    return inside if isinstance(inside, Tensor) else tensor
