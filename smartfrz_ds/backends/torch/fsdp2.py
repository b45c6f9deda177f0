"""FSDP2 (fully_shard): each parameter is a DTensor, cut along its first dimension; a unit is gathered and reduced as a whole.

FSDP2 reads `requires_grad` off the shard each time it gathers a unit, so a frozen unit's gradients are neither computed nor reduced. What
is left to do: the optimizer, the useless gather that back-propagation would prefetch, and the attributes that a unit sets only once.

Touched in torch 2.13, torch/distributed/fsdp/_fully_shard/:
  _fully_shard.py        FSDPModule._get_fsdp_state
  _fsdp_state.py         FSDPState._fsdp_param_groups (up to torch 2.11 _fsdp_param_group), _states_to_backward_prefetch
  _fsdp_param_group.py   FSDPParamGroup.fsdp_params, device, mp_policy, _init_mp_dtypes, _orig_dtype, _partial_reduce_output,
                         post_forward_mesh_info, reshard_after_backward, is_sharded, modules
  _fsdp_param.py         FSDPParam.mp_policy, sharded_param, _unsharded_param, unsharded_accumulated_grad
and torch/distributed/tensor/_utils.py: compute_local_shape_and_global_offset.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import Parameter

from smartfrz_ds.backends.base import RankGroups, Sampler, SampleRequest
from smartfrz_ds.errors import FreezeError
from smartfrz_ds.model.layers import Layer

from .base import FSDP_MISSING, TorchBackend, local
from .unit_ways import Fsdp2Ways

FrozenUnits = Literal["sharded", "unsharded"]


class ShardSampler(Sampler):
    """Reads local shards. They are looked up at each read: FSDP may replace the tensors behind a DTensor (a load does)."""

    def sources(self) -> list[Tensor]:
        return [local(param) for param in super().sources()]


def param_groups_of(state: Any) -> list[Any]:
    """Return the FSDPParamGroups of a unit's FSDPState."""
    # _fsdp_state.py: a list since torch 2.12; before, one group or None
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


class Fsdp2Backend(TorchBackend):
    """FSDP2. frozen: whether entirely frozen units stay sharded (gathered for each forward) or whole on every rank."""

    name = "FSDP2"
    knows_reductions = True
    missing = FSDP_MISSING
    gathers_in_forward = True

    def __init__(self, wrapped: nn.Module, module: nn.Module, optimizer: torch.optim.Optimizer, *, frozen: FrozenUnits = "sharded") -> None:
        for sharded in wrapped.modules():
            if isinstance(sharded, FSDPModule):
                sharded.reshard()  # after an evaluation the root's parameters are whole ones, which the optimizer doesn't know
        check_late_attributes()
        refused = _unsupported(module)
        if refused:
            raise ValueError(f"smartfrz_ds does not work yet with: {'; '.join(refused)}")
        super().__init__(wrapped, module, optimizer)
        self._frozen_units = frozen
        self._units: dict[FSDPModule, list[Any]] = {}  # in post-order: a unit's children before it; its FSDPParamGroups
        seen: set[int] = set()
        for unit in _post_order(module):
            groups = [g for g in param_groups_of(unit._get_fsdp_state()) if id(g) not in seen]
            seen.update(id(g) for g in groups)
            if groups:
                self._units[unit] = groups
        self.forward_ways: Fsdp2Ways = Fsdp2Ways(self._units)
        self._prefetch: dict[FSDPModule, list[Any]] = {}  # the user's own lists, of the units whose list is another now
        self._whole_of: dict[Parameter, Any] = {}  # shard -> its FSDPParam; None: FSDP was told to ignore it
        self._whole: dict[FSDPModule, list[tuple[Any, Any]]] = {}  # units that stay gathered -> their previous flags

    @property
    def device(self) -> torch.device:
        return next(g.device for groups in self._units.values() for g in groups)

    @property
    def sharded(self) -> bool:
        return dist.get_world_size() > 1

    def stored(self, param: Parameter) -> Tensor:
        return local(self.forward_ways.shard_of(param)).detach()

    def rank_groups(self) -> RankGroups:
        """Return, with replicas of shards (HSDP), those of the first replica: all replicas hold the same."""
        sharded = [p for group in self.groups for p in group if isinstance(p, DTensor)]
        mesh = sharded[0].device_mesh
        hybrid = mesh.ndim == 2 and all(p.device_mesh == mesh and isinstance(p.placements[0], Replicate) for p in sharded)
        if not hybrid or 0 not in mesh.mesh[0]:
            return RankGroups()
        return RankGroups(sampling=mesh.get_group(1), holds_samples=mesh.get_local_rank(0) == 0)

    def gradient_itemsize(self, param: Parameter) -> int:
        sharded = self._fsdp_param(param)
        policy = None if sharded is None else sharded.mp_policy
        return super().gradient_itemsize(param) if policy is None else (policy.reduce_dtype or policy.param_dtype or param.dtype).itemsize

    def sampler(self, requests: Sequence[SampleRequest], numel: int) -> Sampler:
        sampler = ShardSampler(numel)
        for r in requests:
            if not isinstance(r.param, DTensor):  # one that FSDP was told to ignore
                here = torch.arange(len(r.elements)) if self.rank == 0 else torch.arange(0)
                elements = r.elements[here]
            else:
                here, elements = shard_elements(r.param, r.elements)
            sampler.add(r.param, elements, r.slots[here])
        return sampler

    def gradients_pending(self) -> bool:
        """Whether unsynchronized gradients wait whole, outside of the parameters (set_requires_gradient_sync(False))."""
        for group in (g for groups in self._units.values() for g in groups):
            if group._partial_reduce_output is not None:
                return True
            for p in group.fsdp_params:
                whole = getattr(p, "_unsharded_param", None)
                if p.unsharded_accumulated_grad is not None or (whole is not None and whole.grad is not None):
                    return True
        return False

    def takes_part(self, param: Parameter) -> bool:
        whole = self._gathered(param)
        return super().takes_part(param) or (whole is not None and (whole.requires_grad or whole.grad is not None))

    def take_out(self, param: Parameter) -> None:
        # A unit that is gathered shows the model, and so other code, its whole parameters in place of the shards.
        super().take_out(param)
        whole = self._gathered(param)
        if whole is not None:
            whole.grad = None
            whole.requires_grad_(False)

    def _gathered(self, param: Parameter) -> Tensor | None:
        """Return the parameter that FSDP uses instead of a shard once its unit was gathered; the same object for the whole run."""
        return getattr(self._fsdp_param(param), "_unsharded_param", None)

    def _fsdp_param(self, param: Parameter) -> Any:
        """Return the FSDPParam of a shard; None for a parameter that FSDP ignores. A shard that is unknown so far is looked for once."""
        if param not in self._whole_of:
            self._whole_of |= {p.sharded_param: p for groups in self._units.values() for g in groups for p in g.fsdp_params}
            self._whole_of.setdefault(param, None)
        return self._whole_of[param]

    def rewire(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter]) -> None:
        changed = {*freeze, *thaw}
        for unit, groups in self._units.items():
            if not any(p.sharded_param in changed for g in groups for p in g.fsdp_params):
                continue
            # requires_grad is read off the shard when the unit is gathered: a unit that is gathered at present would not notice the change.
            unit.reshard()
            for group in groups:
                for p in group.fsdp_params:  # set in the next gather only, but read before it too (takes_part)
                    if (whole := getattr(p, "_unsharded_param", None)) is not None:
                        whole.requires_grad_(p.sharded_param.requires_grad)
                # Set once, in the first forward, from the parameters that are trainable then: None if there are none.
                if thaw and getattr(group, "_orig_dtype", torch.float32) is None:
                    group._init_mp_dtypes()

    def on_layout_changed(self, layers: Sequence[Layer], frozen: Collection[str]) -> None:
        self._skip_prefetch(layers, frozen)
        self._keep_whole()

    def _skip_prefetch(self, layers: Sequence[Layer], frozen: Collection[str]) -> None:
        """Skip the prefetch of the unit in front of the first active layer, at which back-propagation ends."""
        for unit, states in self._prefetch.items():
            unit._get_fsdp_state()._states_to_backward_prefetch = states
        self._prefetch.clear()
        first = next((x for x in layers if x.numel and x.name not in frozen), None)
        if first is None or not any(x.name in frozen for x in layers[: first.position]):
            return
        passed = {p for x in layers[: first.position] for p in x.params if p in self.frozen}
        behind = {unit._get_fsdp_state() for unit, groups in self._units.items() if _params(groups) <= passed}
        own = set(first.params)
        found = False
        for unit, groups in self._units.items():
            state = unit._get_fsdp_state()
            wished = state._states_to_backward_prefetch
            left = [s for s in wished if s not in behind]
            is_first = not found and bool(_params(groups) & own)
            found = found or is_first
            if len(left) < len(wished) or (is_first and not wished):
                self._prefetch[unit] = wished
                # An empty list would mean the default again; gathering oneself once more is nothing.
                state._states_to_backward_prefetch = left or [state]

    def _keep_whole(self) -> None:
        """Keep entirely frozen units gathered after the next forward, with `frozen: unsharded`; others are unchanged."""
        if self._frozen_units == "sharded":
            return
        for unit, groups in self._units.items():
            frozen = _params(groups) <= self.frozen
            if frozen and unit not in self._whole:
                self._whole[unit] = [(g.post_forward_mesh_info, g.reshard_after_backward) for g in groups]
                unit.set_reshard_after_forward(False, recurse=False)
                unit.set_reshard_after_backward(False, recurse=False)
            elif not frozen and unit in self._whole:
                for group, flags in zip(groups, self._whole.pop(unit), strict=True):
                    group.post_forward_mesh_info, group.reshard_after_backward = flags
                unit.reshard()

    def verify(self) -> None:
        super().verify()
        known = {p for groups in self._units.values() for p in _params(groups)}
        for param in self.frozen:
            if isinstance(param, DTensor) and param not in known:
                raise FreezeError("FSDP2: a unit's parameter was replaced by another object after attach_torch")
        for group in (g for groups in self._units.values() for g in groups):
            for p in group.fsdp_params:
                whole = getattr(p, "_unsharded_param", None)
                if not group.is_sharded and whole is not None and whole.requires_grad != p.sharded_param.requires_grad:
                    raise FreezeError("FSDP2: a gathered parameter does not follow its shard's requires_grad")


def shard_elements(param: DTensor, elements: Tensor) -> tuple[Tensor, Tensor]:
    """Return the elements of a parameter that this rank reads. Only the first of several replicas reads.

    Args:
        param: The parameter.
        elements: (n,) int64, indices into the flattened parameter.

    Returns:
        (m,) int64 positions in `elements`, and (m,) int64 positions in this rank's flattened shard.
    """
    none = torch.arange(0)
    coordinate = param.device_mesh.get_coordinate()
    replicas = [i for i, placement in enumerate(param.placements) if isinstance(placement, Replicate)]
    if coordinate is None or any(coordinate[i] for i in replicas):
        return none, none
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    if 0 in shape:
        return none, none
    at = torch.stack(torch.unravel_index(elements, param.shape), dim=1) - torch.tensor(offset)  # (n, dimensions)
    here = ((at >= 0) & (at < torch.tensor(shape))).all(1).nonzero().view(-1)
    flat = torch.zeros(len(here), dtype=torch.int64)
    for dim, size in enumerate(shape):
        flat = flat * size + at[here, dim]
    return here, flat


def _post_order(module: nn.Module) -> Iterator[FSDPModule]:
    for child in module.children():
        yield from _post_order(child)
    if isinstance(module, FSDPModule):
        yield module


def _params(groups: Sequence[Any]) -> set[Parameter]:
    return {p.sharded_param for g in groups for p in g.fsdp_params}


def check_late_attributes() -> None:
    """Check that this torch has the attributes that a unit gets only in its first gather; before it they are read with a default.

    Raises:
        ValueError: Names the missing one, without which pending gradients cannot be seen.
    """
    for kind, name in ((FSDPParam, "_unsharded_param"), (FSDPParamGroup, "_orig_dtype")):
        if name not in kind.__annotations__:
            raise ValueError(
                f"smartfrz_ds cannot tell whether gradients are pending in an FSDP2 unit: torch {torch.__version__} has no attribute "
                f"{kind.__name__}.{name}"
            )


def _unsupported(module: nn.Module) -> list[str]:
    """Return the names of the model's features that freezing does not support yet."""
    sharded = [p for p in module.parameters() if isinstance(p, DTensor)]
    uses = {
        "tensor parallelism (DTensors cut along more than one dimension of the mesh): leave parallelize_module out": any(
            sum(isinstance(x, Shard) for x in p.placements) > 1 or any(not isinstance(x, Shard | Replicate) for x in p.placements)
            for p in sharded
        ),
        "fully_shard(mesh=…) with a device mesh of some of the ranks: take one of all ranks": any(
            p.device_mesh.size() != dist.get_world_size() for p in sharded
        ),
        "a model of which nothing is sharded on its own mesh: call fully_shard on the model itself": not sharded,
    }
    return [name for name, used in uses.items() if used]
