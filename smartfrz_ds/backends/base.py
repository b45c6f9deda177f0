"""The interface between the controller and a backend, and the parts that backends share. Imports torch, but no engine."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from smartfrz_ds.errors import FreezeError
from smartfrz_ds.model.hooks import PluginTime
from smartfrz_ds.model.layers import Layer, find_layers
from smartfrz_ds.model.view import Need

from .forward_ways import ForwardWays
from .memory import MemoryNeed, storage_bytes
from .memory import Released as Released
from .param_order import insert_in_order
from .rank_groups import RankGroups as RankGroups
from .sampler import Sampler as Sampler
from .sampler import SampleRequest as SampleRequest
from .state_layout import state_tensors

if TYPE_CHECKING:
    from smartfrz_ds.backends.pipeline.protocol import Pipeline
    from smartfrz_ds.config.sections import PipelineSettings
    from smartfrz_ds.distributed.collectives import Collectives
    from smartfrz_ds.model.freeze_modules import TiedMode

    from .cost import Cost
    from .transaction import Transaction


class Backend(ABC):
    """The code that depends on the internals of one kind of engine.

    Created once, at attach, when the optimizer has its full layout. `change` is collective and is called at a step boundary only.
    """

    #: the name of this engine in reports
    name: str

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.frozen: set[Parameter] = set()
        self._kept: dict[Parameter, Any] = {}  # released state that waits on the host for a thaw
        self.time = PluginTime()  # of the whole run: the first hooks are the backend's
        self.warnings: list[str] = []

    @property
    def rank(self) -> int:
        """This process among those that must agree."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def is_sampling_rank(self) -> bool:
        """Whether this process reads the samples of tensors that are identical on all data-parallel ranks."""
        return self.rank == 0

    def find_layers(self, model: nn.Module, patterns: str | Sequence[str]) -> tuple[Layer, ...]:
        """Return the layers, with only those parameters that the optimizer holds: the others are the user's.

        Raises:
            ValueError: As in model.layers.find_layers, whose arguments these are.
        """
        held = {p for group in self.groups for p in group}

        def keep(params: Sequence[Parameter]) -> tuple[Parameter, ...]:
            return tuple(p for p in params if p in held)

        def held_part(layer: Layer) -> Layer:
            part = dataclasses.replace(layer, params=keep(layer.params), tied=keep(layer.tied), borrowed=keep(layer.borrowed))
            # A layer that trains, but in another optimizer, is not one that the user froze.
            elsewhere = bool(layer.params) and not part.params
            return dataclasses.replace(part, user_frozen=(), user_frozen_borrowed=()) if elsewhere else part

        return tuple(held_part(layer) for layer in find_layers(model, patterns))

    #: inputs that this engine can't give a policy (gradients, activations, lr_scale) -> their names in messages
    missing: Mapping[Need, str] = {}

    #: whether a change may put weights elsewhere in memory
    moves_weights = True
    #: whether the data-parallel ranks are not alike: each process holds a part of the model (a pipeline's stage)
    is_pipeline = False

    def partition(self) -> list[int] | None:
        """Bounds of a pipeline's stages in its list of layers, (stages + 1,); None if the engine is not a pipeline."""
        return None

    def pipeline(self, ranks: Collectives, settings: PipelineSettings, tied: TiedMode) -> Pipeline | None:
        """Return the interface to the pipeline's stages; None if this engine is not a pipeline. Called once, at attach.

        Args:
            ranks: The collectives of this run.
            settings: The settings of pipelines.
            tied: The setting `smartfrz.tied`.
        """
        return None

    def forward_module(self, model: nn.Module) -> nn.Module:
        """Return the module to call for a forward of `model` on all ranks together."""
        return model

    def gradients_now(self) -> Iterable[Parameter]:
        """Parameters that have a gradient before a step and run no hook of their own when they get it."""
        return ()

    #: whether a parameter's post-accumulate-grad hooks run when it gets a gradient
    runs_grad_hooks = True

    def stored(self, param: Parameter) -> Tensor:
        """Return this rank's stored part of a parameter between two steps: of its dtype, whole or a shard of any shape.

        Args:
            param: A parameter of the model.
        """
        return param.data

    def takes_part(self, param: Parameter) -> bool:
        """Whether a frozen parameter would get, or holds, a gradient."""
        return param.requires_grad or param.grad is not None

    def take_out(self, param: Parameter) -> None:
        """Freeze a frozen parameter again after other code has set `requires_grad`."""
        param.grad = None
        param.requires_grad_(False)

    def on_layout_changed(self, layers: Sequence[Layer], frozen: Collection[str]) -> None:  # noqa: B027 (most engines have nothing to do)
        """Adapt the engine outside of its optimizer, after every change of the layout and at the start.

        Args:
            layers: All layers, front to back.
            frozen: Names of the frozen ones.
        """

    def equalize_copies(self, layers: Sequence[Layer], back: Collection[str], tx: Transaction) -> None:  # noqa: B027 (pipelines only)
        """Give weights that train again the optimizer state of their copies on other ranks. Collective.

        Args:
            layers: All layers, front to back.
            back: Names of the layers that train again.
            tx: Takes the exchange back if it fails on any rank.
        """

    @property
    def sharded(self) -> bool:
        """Whether the masters are spread over ranks, so that reading samples takes a collective."""
        return False

    @property
    @abstractmethod
    def groups(self) -> list[list[Parameter]]:
        """The model's parameters of each parameter group as they were at attach, frozen ones included."""

    @property
    def param_groups(self) -> list[list[Parameter]]:
        """The model's parameters of each parameter group of the torch optimizer, as they were at attach."""
        return self.groups

    @abstractmethod
    def loss_scale(self) -> float:
        """Return the current factor of losses before backward (fp16), else 1."""

    def rank_groups(self) -> RankGroups:
        """Return the groups of ranks that have something of their own to exchange."""
        return RankGroups()

    #: whether a forward of the model communicates, as it gathers weights
    gathers_in_forward = False
    #: what must know which modules a forward runs, where the prefix cache skips some
    forward_ways: ForwardWays = ForwardWays()

    def loss_scale_on_device(self) -> float | Tensor:
        """Return `loss_scale`, as a tensor where reading its value would make the host wait for the device."""
        return self.loss_scale()

    @property
    def device(self) -> torch.device:
        """The device of this engine's parameters."""
        return next(p for group in self.groups for p in group).device

    def active(self, index: int) -> list[Parameter]:
        """Return the parameters of group `index` that are not frozen, in their order."""
        return [p for p in self.groups[index] if p not in self.frozen]

    def trained(self) -> list[Parameter]:
        """All parameters that are not frozen, group by group."""
        return [p for index in range(len(self.groups)) for p in self.active(index)]

    def group_options(self) -> list[dict[str, str]]:
        """Return the settings of each parameter group of the torch optimizer, as text."""
        return [{k: repr(v) for k, v in g.items() if k != "params"} for g in self.base_optimizer().param_groups]

    #: layers of a pipeline that aren't among its layers, because the user froze all of them before the start
    user_frozen_entries: tuple[str, ...] = ()
    #: why parameters that required no gradient at attach can't train later on this engine; empty where they can
    takes_none: str = ""

    def given_group(self, param: Parameter) -> int | None:
        """Return the index in `groups` of the group in which the optimizer got this parameter, which it does not step; None: unknown."""
        return None

    def check_adopt(self, params: Mapping[Parameter, int], names: Mapping[Parameter, str]) -> None:
        """Check, before `adopt`, that these parameters can train in these groups.

        Args:
            params: Each with the index of its group in `groups`.
            names: Names of the parameters.

        Raises:
            ValueError: Some cannot; names them.
        """
        for param in params:
            if not param.is_floating_point():
                raise ValueError(
                    f"thaw: {names[param]!r} has dtype {param.dtype}: weights that are stored quantized can't be trained; allowed: "
                    "floating-point weights"
                )

    def adopt(self, params: Mapping[Parameter, int], order: Mapping[Parameter, int]) -> None:
        """Count parameters that required no gradient at attach as frozen ones, so that `change` can thaw them. Only bookkeeping.

        Args:
            params: Each with the index of its group in `groups`. It is inserted in front of the first parameter of the group that follows
                it in the model, which is the order of an optimizer over all of them.
            order: Position of every parameter in the model.
        """
        for param, index in params.items():
            insert_in_order(self.groups[index], param, order)
        self.frozen.update(params)

    def disown(self, params: Collection[Parameter]) -> None:
        """Undo `adopt`, for parameters that are frozen."""
        for group in self.groups:
            group[:] = [p for p in group if p not in params]
        self.frozen.difference_update(params)
        self.forget(params)

    @abstractmethod
    def is_boundary(self) -> bool:
        """Whether no gradient is pending, so that the optimizer may be changed."""

    def gradients_pending(self) -> bool:
        """Whether the wrapper holds gradients, besides the parameters' own, that no step has used yet."""
        return False

    def pending_params(self) -> list[Parameter]:
        """Return the active parameters that have, or may have, a gradient that no step has used."""
        return [p for p in self.trained() if p.grad is not None]

    def drop_gradients(self) -> None:
        """Forget the gradients of active parameters that no step has used."""
        for param in self.trained():
            param.grad = None

    boundary_words: str  # the step boundary in the engine's own terms

    def not_a_boundary(self) -> str:
        """Return the error's text for `is_boundary` False: the pending gradients, and the remedy."""
        names = {p: name.removeprefix("module.") for name, p in getattr(self.engine, "module", self.engine).named_parameters()}
        held = [names.get(p, f"one of shape {tuple(p.shape)}") for p in self.pending_params()]
        some = f"{', '.join(held[:3])}{', …' if len(held) > 3 else ''}"
        why = f"Gradients are pending that no step has used: of {len(held)} parameters ({some})" if held else "A step has begun"
        return (
            f"freeze and thaw only at a step boundary: {self.boundary_words}. {why}. Finish the step first; or, where these are left over "
            "because another model's backward went through this one (a GAN, a reward model), call drop_gradients() of the controller"
        )

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """Return this rank's fp32 master tensors if they are separate from the model's weights, else nothing."""

    @abstractmethod
    def base_optimizer(self) -> torch.optim.Optimizer:
        """Return the torch optimizer that holds the state."""

    def optimizer_bytes(self) -> int:
        """Return the bytes of optimizer state and separate master weights on this rank, counted over the live storages."""
        return storage_bytes([*self.masters(), *state_tensors(self.base_optimizer().state)])

    @abstractmethod
    def reduced_bytes(self) -> int | None:
        """Return the bytes of gradients in a step's reductions, without padding; 0 if no other rank shares them; None if unknown."""

    @abstractmethod
    def sampler(self, requests: Sequence[SampleRequest], numel: int) -> Sampler:
        """Compile requests for a snapshot against the current layout. The next `change` invalidates the sampler.

        Args:
            requests: The sampled weights of all layers.
            numel: Number of elements of the snapshot, layers * sample_size.
        """

    @abstractmethod
    def change_cost(self, out: Collection[Parameter], *, keep: bool) -> Cost:
        """Return the bytes of a change, from which its pause is predicted. Changes and communicates nothing; the same on every rank.

        Args:
            out: All parameters that are outside of the optimizer afterwards.
            keep: As in `change`.
        """

    def check(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter]) -> None:
        """Check that a change is possible. Changes nothing.

        Args:
            freeze: Parameters that would leave the optimizer.
            thaw: Parameters that would return.

        Raises:
            RuntimeError: This is not a step boundary.
            ValueError: The optimizer does not hold a parameter, its state cannot follow, or nothing would be left to train.
        """
        if not self.is_boundary():
            raise RuntimeError(self.not_a_boundary())
        known = {p for group in self.groups for p in group}
        if unknown := [p for p in (*freeze, *thaw) if p not in known]:
            raise ValueError(f"{len(unknown)} parameters are not in the optimizer, first of shape {tuple(unknown[0].shape)}")
        if not known - self.frozen - set(freeze) | set(thaw):
            raise ValueError("nothing would be left to train: keep at least one layer active")
        if why := self.uncuttable((*freeze, *thaw)):
            raise ValueError(why)

    def uncuttable(self, changed: Collection[Parameter]) -> str:
        """Return why the optimizer's state cannot follow these parameters out of the optimizer or back; "" if it can. Not collective."""
        return ""

    def memory_need(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter], *, keep: bool) -> MemoryNeed:
        """Return the peak memory of `change`, with these arguments, above the level before it, on this rank. Not collective."""
        return MemoryNeed()

    @abstractmethod
    def change(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter], *, keep: bool, tx: Transaction) -> Released:
        """Take `freeze` out of the optimizer and put `thaw` back in. Collective, within a transaction that the caller ends.

        The weights, masters, moments and step counts of parameters that stay active keep their values bit for bit.

        Args:
            freeze: Parameters that leave.
            thaw: Parameters that return.
            keep: Whether the released state is kept on the host, so that a thaw can bring it back exactly.
            tx: Takes the change back if it fails on any rank.
        """

    def forget(self, params: Iterable[Parameter]) -> None:
        """Drop the state that was kept for these parameters."""
        for param in params:
            self._kept.pop(param, None)

    def keep(self, entries: Mapping[Parameter, Any]) -> None:
        """Keep released state of these parameters."""
        self._kept.update(entries)

    def kept_entries(self) -> dict[Parameter, Any]:
        """Return the kept state of each parameter, for `set_kept_entries`."""
        return dict(self._kept)

    def set_kept_entries(self, entries: Mapping[Parameter, Any]) -> None:
        """Restore the output of `kept_entries`."""
        self._kept.clear()
        self._kept.update(entries)

    @abstractmethod
    def kept_state(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return this rank's part of the state that is kept for a thaw, as JSON data and tensors; None if there is nothing."""

    @abstractmethod
    def load_kept_state(self, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restore the output of `kept_state`, on the same number of ranks. The layout has the checkpoint's frozen set already.

        Args:
            about: Its JSON data.
            tensors: Its tensors, on the host.
        """

    def leave(self) -> None:  # noqa: B027 # most backends have nothing
        """Remove, when freezing ends, everything that would outlive the engine on the model's parameters; no collective calls."""

    def verify(self) -> None:
        """Check, after a change, the parts of the contract that are cheap to check; collective calls are not allowed here.

        Raises:
            FreezeError: The contract is broken; names where.
        """
        held = {id(p) for p in self.trained()}
        for param in self.frozen:
            if param.requires_grad or param.grad is not None:
                raise FreezeError(f"a frozen parameter of shape {tuple(param.shape)} still takes part in backward")
            if id(param) in held:
                raise FreezeError(f"a frozen parameter of shape {tuple(param.shape)} is still in the optimizer")

    def step_count(self) -> int:
        """Return the steps that the optimizer has taken, from its own counter if it has one, else 0. A thawed layer counts anew."""
        return max((int(state["step"]) for state in self.base_optimizer().state.values() if "step" in state), default=0)
