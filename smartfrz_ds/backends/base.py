"""What every backend offers the controller, and the parts that they share. Torch alone: nothing of an engine is imported here."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from smartfrz_ds.errors import FreezeError
from smartfrz_ds.model.layers import Layer, find_layers
from smartfrz_ds.model.view import Need

from .memory import MemoryNeed
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


@dataclass(frozen=True)
class Released:
    """What one change of the layout did on this rank.

    bytes: optimizer bytes (master weights where they are separate, and state) before minus after; negative for a thaw.
    moved_bytes: bytes that crossed ranks for it, over all ranks.
    """

    bytes: int
    moved_bytes: int


class Backend(ABC):
    """All that knows the inside of one kind of engine.

    Made once, at attach, when the optimizer has its full layout. `change` is collective and is called at a step boundary only.
    """

    #: what a report calls this engine
    name: str

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.frozen: set[Parameter] = set()
        self._kept: dict[Parameter, Any] = {}  # released state that waits on the host for a thaw
        self.warnings: list[str] = []

    @property
    def rank(self) -> int:
        """This process among those that must agree."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def is_sampling_rank(self) -> bool:
        """Whether this process reads samples of what every data-parallel rank holds alike."""
        return self.rank == 0

    def find_layers(self, model: nn.Module, patterns: str | Sequence[str]) -> tuple[Layer, ...]:
        """The layers with only those parameters that the optimizer holds: the others are the user's.

        Raises ValueError as layers.find_layers.
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

    #: what this engine can't give a policy (gradients, activations, lr_scale) -> the words for it
    missing: Mapping[Need, str] = {}

    #: whether a change may put weights elsewhere in memory
    moves_weights = True

    #: whether the data-parallel ranks are not alike: each process holds a part of the model (a pipeline's stage)
    is_pipeline = False

    def partition(self) -> list[int] | None:
        """Where the stages of a pipeline begin and end in its list of layers, (stages + 1,); None where there are none."""
        return None

    def pipeline(self, ranks: Collectives, settings: PipelineSettings, tied: TiedMode) -> Pipeline | None:
        """What the controller asks of a pipeline beyond a backend's verbs; None where this engine is not one. Called once, at attach.

        tied: the setting `smartfrz.tied`.
        """
        return None

    def forward_module(self, model: nn.Module) -> nn.Module:
        """What to call for a forward of `model`, all ranks together."""
        return model

    def gradients_now(self) -> Iterable[Parameter]:
        """Parameters that have a gradient before a step and run no hook of their own when they get it."""
        return ()

    #: whether a parameter's post-accumulate-grad hooks run when it gets a gradient
    runs_grad_hooks = True

    def stored(self, param: Parameter) -> Tensor:
        """Return what this rank stores of a parameter of the model between two steps."""
        return param.data

    def takes_part(self, param: Parameter) -> bool:
        """Whether a frozen parameter would get, or holds, a gradient."""
        return param.requires_grad or param.grad is not None

    def take_out(self, param: Parameter) -> None:
        """Switch a frozen parameter off again that other code has switched on."""
        param.grad = None
        param.requires_grad_(False)

    def on_layout_changed(self, layers: Sequence[Layer], frozen: Collection[str]) -> None:  # noqa: B027 (most engines have nothing to do)
        """Called after every change of the layout, and at the start: what the engine does beyond its optimizer. frozen: names."""

    def equalize_copies(self, layers: Sequence[Layer], back: Collection[str], tx: Transaction) -> None:  # noqa: B027 (pipelines only)
        """Give weights of the layers `back`, which train again, the optimizer state of their copies on other ranks. Collective."""

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
        """What losses are multiplied by now before backward (fp16), else 1."""

    @property
    def device(self) -> torch.device:
        """Where this engine's parameters live."""
        return next(p for group in self.groups for p in group).device

    def active(self, index: int) -> list[Parameter]:
        """The parameters of group `index` that are not frozen, in their order."""
        return [p for p in self.groups[index] if p not in self.frozen]

    def trained(self) -> list[Parameter]:
        """All parameters that are not frozen, group by group."""
        return [p for index in range(len(self.groups)) for p in self.active(index)]

    def group_options(self) -> list[dict[str, str]]:
        """The settings of each parameter group of the torch optimizer, as text."""
        return [{k: repr(v) for k, v in g.items() if k != "params"} for g in self.base_optimizer().param_groups]

    #: layers of a pipeline that aren't among its layers, because the user froze all of them before the start
    user_frozen_entries: tuple[str, ...] = ()

    #: why parameters that required no gradient at attach can't train later on this engine; empty where they can
    takes_none: str = ""

    def given_group(self, param: Parameter) -> int | None:
        """The index in `groups` of the group in which the optimizer was given this parameter, which it does not step; None: unknown."""
        return None

    def check_adopt(self, params: Mapping[Parameter, int], names: Mapping[Parameter, str]) -> None:
        """Raise ValueError, by name, for parameters that can't train in these groups. To be called before `adopt`."""
        for param in params:
            if not param.is_floating_point():
                raise ValueError(
                    f"thaw: {names[param]!r} has dtype {param.dtype}: weights that are stored quantized can't be trained; allowed: "
                    "floating-point weights"
                )

    def adopt(self, params: Mapping[Parameter, int], order: Mapping[Parameter, int]) -> None:
        """Count parameters that required no gradient at attach as frozen ones, so that `change` can thaw them. Only bookkeeping.

        params: each with the index of its group in `groups`. order: every parameter's place in the model. In its group a parameter stands
        in front of the first one that comes behind it in the model: the order in which an optimizer over all of them would have it.
        """
        for param, index in params.items():
            insert_in_order(self.groups[index], param, order)
        self.frozen.update(params)

    def disown(self, params: Collection[Parameter]) -> None:
        """The inverse of `adopt`, for parameters that are frozen."""
        for group in self.groups:
            group[:] = [p for p in group if p not in params]
        self.frozen.difference_update(params)
        self.forget(params)

    @abstractmethod
    def is_boundary(self) -> bool:
        """Whether no gradient is pending: the optimizer may be changed now."""

    def gradients_pending(self) -> bool:
        """Whether the wrapper holds gradients, besides the parameters' own, that no step has used yet."""
        return False

    def pending_params(self) -> list[Parameter]:
        """The active parameters that have, or may have, a gradient that no step has used."""
        return [p for p in self.trained() if p.grad is not None]

    def drop_gradients(self) -> None:
        """Forget the gradients of active parameters that no step has used."""
        for param in self.trained():
            param.grad = None

    #: the moment in the engine's own words
    boundary_words: str

    def not_a_boundary(self) -> str:
        """The error's text where `is_boundary` is False: which gradients are pending, and what to do."""
        module = self.engine.module if hasattr(self.engine, "module") else self.engine
        names = {p: name.removeprefix("module.") for name, p in module.named_parameters()}
        held = [names.get(p, f"one of shape {tuple(p.shape)}") for p in self.pending_params()]
        some = f"{', '.join(held[:3])}{', …' if len(held) > 3 else ''}"
        text = f"freeze and thaw only at a step boundary: {self.boundary_words}. "
        if held:
            text += f"Gradients are pending that no step has used: of {len(held)} parameters ({some}). "
        else:
            text += "A step has begun. "
        return (
            f"{text}Finish the step first; or, where these are left over because another model's backward went through this one (a GAN, a "
            "reward model), call drop_gradients() of the controller (engine.smartfrz, or what attach_torch returned), which forgets them"
        )

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """This rank's fp32 master tensors where they are separate from the model's weights, else nothing."""

    @abstractmethod
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer that holds the state."""

    def optimizer_bytes(self) -> int:
        """Bytes of optimizer state and separate master weights on this rank, counted over the live storages."""
        return storage_bytes([*self.masters(), *state_tensors(self.base_optimizer().state)])

    @abstractmethod
    def reduced_bytes(self) -> int | None:
        """Bytes of gradients that this rank hands to reductions in a step, without padding; 0 where no other rank shares them; None: not
        known."""

    @abstractmethod
    def sampler(self, requests: Sequence[SampleRequest], numel: int) -> Sampler:
        """Compile requests against the layout of now. A sampler is dead after the next `change`."""

    @abstractmethod
    def change_cost(self, out: Collection[Parameter], *, keep: bool) -> Cost:
        """The bytes of a change after which exactly the parameters `out` are out of the optimizer: what its pause is predicted from.

        Changes nothing, communicates nothing; the same on every rank.
        keep: as `change`.
        """

    def check(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter]) -> None:
        """Raise before anything is changed if this change can't be done.

        Raises:
            RuntimeError: not at a step boundary.
            ValueError: parameters that this optimizer does not hold, state that can't follow them, or nothing would be left to train.
        """
        if not self.is_boundary():
            raise RuntimeError(self.not_a_boundary())
        known = {p for group in self.groups for p in group}
        unknown = [p for p in (*freeze, *thaw) if p not in known]
        if unknown:
            raise ValueError(f"{len(unknown)} parameters are not in the optimizer, first of shape {tuple(unknown[0].shape)}")
        if not known - self.frozen - set(freeze) | set(thaw):
            raise ValueError("nothing would be left to train: keep at least one layer active")
        if why := self.uncuttable((*freeze, *thaw)):
            raise ValueError(why)

    def uncuttable(self, changed: Collection[Parameter]) -> str:
        """Why the optimizer's state can't follow these parameters out of the optimizer, or back; "" where it can. Not collective."""
        return ""

    def memory_need(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter], *, keep: bool) -> MemoryNeed:
        """Return what `change` holds at most above the level before it, on this rank. Not collective. Where unknown, nothing is refused."""
        return MemoryNeed()

    @abstractmethod
    def change(self, freeze: Sequence[Parameter], thaw: Sequence[Parameter], *, keep: bool, tx: Transaction) -> Released:
        """Take `freeze` out of the optimizer and put `thaw` back in. Collective, within a transaction that the caller ends.

        Afterwards the active parameters' weights, masters, moments and step counts are bit-identical to before.

        Args:
            freeze: Parameters that leave.
            thaw: Parameters that return.
            keep: Whether the released state is kept on the host, so that a thaw can bring it back exactly.
            tx: Takes the change back where it fails on any rank.
        """

    def forget(self, params: Iterable[Parameter]) -> None:
        """Drop the state that was kept for these parameters."""
        for param in params:
            self._kept.pop(param, None)

    def keep(self, entries: Mapping[Parameter, Any]) -> None:
        """Keep released state of these parameters."""
        self._kept.update(entries)

    def kept_entries(self) -> dict[Parameter, Any]:
        """Return what is kept of each parameter, for `set_kept_entries`."""
        return dict(self._kept)

    def set_kept_entries(self, entries: Mapping[Parameter, Any]) -> None:
        """Bring back what `kept_entries` returned."""
        self._kept.clear()
        self._kept.update(entries)

    @abstractmethod
    def kept_state(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What this rank holds back for a thaw, as JSON and tensors (its own part); None where there is nothing."""

    @abstractmethod
    def load_kept_state(self, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The inverse, on the same number of ranks. The layout has the checkpoint's frozen set already."""

    def leave(self) -> None:  # noqa: B027 # most backends have nothing
        """Take back, when freezing ends, what would outlive the engine on the model's parameters; no collective calls."""

    def verify(self) -> None:
        """Check, after a change, what the contract promises and a glance can see; collective calls are not allowed here.

        Raises:
            FreezeError: names what is wrong.
        """
        held = {id(p) for p in self.trained()}
        for param in self.frozen:
            if param.requires_grad or param.grad is not None:
                raise FreezeError(f"a frozen parameter of shape {tuple(param.shape)} still takes part in backward")
            if id(param) in held:
                raise FreezeError(f"a frozen parameter of shape {tuple(param.shape)} is still in the optimizer")

    def step_count(self) -> int:
        """Steps that the optimizer has taken, from its own counter where it has one, else 0. A thawed layer has begun to count anew."""
        return max((int(state["step"]) for state in self.base_optimizer().state.values() if "step" in state), default=0)


def insert_in_order(group: list[Parameter], param: Parameter, order: Mapping[Parameter, int]) -> None:
    """Put `param` in front of the first parameter of `group` that comes behind it in the model. order: places in the model."""
    place = order[param]
    at = next((k for k, other in enumerate(group) if order.get(other, -1) > place), len(group))
    group.insert(at, param)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`: a view that pins a large buffer counts in full."""
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors) if s.nbytes()}
    return sum(storages.values())


def detach_from_training(param: Parameter) -> None:
    """Make `param` a plain constant of the model that shares no storage with any flat buffer."""
    param.grad = None
    param.requires_grad_(False)
    # One view would keep a whole flat buffer alive.
    if param.data.untyped_storage().nbytes() != param.data.nbytes:
        param.data = param.data.clone()
