"""attach_torch: freezing in a script without DeepSpeed. One process, DDP, FSDP2 or FSDP1.

The controller listens to the torch optimizer (register_step_pre_hook and register_step_post_hook): a step is an `optimizer.step()`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from smartfrz_ds._version import __version__
from smartfrz_ds.backends.torch.base import TorchBackend, local
from smartfrz_ds.backends.torch.compat import make_torch_backend
from smartfrz_ds.backends.torch.several import SeveralOptimizers, bare_optimizer, refuse_step_within_backward
from smartfrz_ds.checkpoint.torch import restore_from, save_beside
from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.distributed.devices import collective_device
from smartfrz_ds.distributed.failures import compare_before_attach, explained, note_lost_contact, share_timeout
from smartfrz_ds.model.hooks import ModuleHook
from smartfrz_ds.runtime.controller import Controller


class TorchController(Controller):
    """The controller of a run without DeepSpeed. Made by `attach_torch`."""

    _saved: str | None = None  # where `save` wrote last, until that checkpoint is known to be whole
    resumed_by = "controller.restore and your own load go on from"

    @property
    def backend(self) -> TorchBackend:
        """The inside of the model's wrapper and its optimizer."""
        return cast("TorchBackend", self._run.backend)

    def save(self, folder: str | Path) -> None:
        """Write the freeze state into the folder of the user's own checkpoint, beside its files. Collective, between steps.

        Raises:
            OSError or RuntimeError: a file can't be written, on every rank.
        """
        with explained(self, "save"):
            save_beside(self, self.backend, folder)
        self._saved = str(folder)

    def restore(self, folder: str | Path) -> None:
        """Take up what `save` wrote. Collective, at a step boundary, BEFORE the model and the optimizer are loaded: they must have the
        checkpoint's frozen set then. With FSDP2 the number of ranks may be another.

        Raises:
            ValueError: there is no freeze state, it is damaged or of another model; nothing was changed.
        """
        with explained(self, "restore"):
            restore_from(self, self.backend, folder)

    def detach(self) -> None:
        """Give the model, its wrapper and its optimizer back as they were: every layer trains, no hook is left.

        Collective, at a step boundary. Layers that were frozen begin with fresh moments. A second call changes nothing.
        """
        if self.released:
            return
        backend = self.backend
        backend.give_back()
        backend.on_layout_changed(self._run.layers, ())
        super().detach()
        backend.remove()
        self._hooks.remove()
        self._forwards.remove()
        bare = backend.base_optimizer()
        del bare.smartfrz  # type: ignore[attr-defined]
        if isinstance(bare, SeveralOptimizers):
            bare.let_go()

    def set_schedule(self, *, scheduler: Any = None, total_steps: int | None = None, told_by: str = "set_schedule()") -> None:
        """As `Controller.set_schedule`."""
        super().set_schedule(scheduler=scheduler, total_steps=total_steps, told_by=told_by)
        self._hooks.come_last()  # behind what a new policy has hooked

    def _listen(self, hooks: _Hooks) -> None:
        self._hooks = hooks
        self.backend.on_skipped = self.step_skipped
        self._forwards = self.backend.wrapped.register_forward_hook(ModuleHook(self._end_forward), always_call=True)

    def _end_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a forward, and where one raises: in it FSDP gathers weights."""
        if torch.compiler.is_compiling():
            return
        if self._saved is not None:  # whoever trains on has written the rest of that checkpoint
            self.last_checkpoint, self._saved = self._saved, None
        if output is None and (error := sys.exception()) is not None:
            note_lost_contact(self, error, "forward")


class _Hooks:
    """Between a torch optimizer and its controller. The one before the step must be there before the controller is made: a policy that
    scales learning rates hooks the optimizer too, and looks at what this one sets."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.controller: TorchController | None = None
        self._optimizer, self._counts, self._warned = optimizer, True, False
        self._first = optimizer.register_step_pre_hook(self._before)
        self._last: Any = None
        self._load = optimizer.register_load_state_dict_pre_hook(_check_load)

    def listen(self, controller: TorchController) -> None:
        self.controller = controller
        if isinstance(several := self._optimizer, SeveralOptimizers):
            several.ignores = lambda one: _only_makes_state(one, controller)
            several.incomplete = self._incomplete
        self.come_last()
        controller._listen(self)

    def come_last(self) -> None:
        """After the step behind all other hooks: learning rates that were scaled for it are back."""
        if self._last is not None:
            self._last.remove()
        self._last = self._optimizer.register_step_post_hook(self._after)

    def remove(self) -> None:
        for handle in (self._first, self._last, self._load):
            if handle is not None:
                handle.remove()

    def _incomplete(self) -> None:
        """Some of several optimizers began another step before the others had taken this one."""
        assert self.controller is not None
        self.controller.step_skipped()
        if not self._warned:
            self._warned = True
            warnings.warn(
                "smartfrz: the optimizers do not all step equally often; only steps that all of them took are counted, and layers freeze "
                "after those only",
                RuntimeWarning,
                stacklevel=4,
            )

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.controller is None:
            return
        refuse_step_within_backward()
        if any(x is not None for x in (*args[1:], *kwargs.values())):
            raise ValueError("optimizer.step(closure): smartfrz_ds works with optimizer.step() alone, after backward")
        with explained(self.controller, "the optimizer's step"):
            self._counts = not _only_makes_state(optimizer, self.controller)
            if self._counts:
                self.controller.before_step()

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.controller is None or not self._counts:
            return
        self.controller.backend.stepped()
        # torch/amp/grad_scaler.py: a fused optimizer is called in any case, and skips the step itself where this is not zero.
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor) and found_inf.item():
            self.controller.step_skipped()
            return
        with explained(self.controller, "the optimizer's step"):
            self.controller.after_step()


def _only_makes_state(optimizer: torch.optim.Optimizer, controller: TorchController) -> bool:
    """Whether this step is torch.distributed.checkpoint's, which makes an optimizer's state with gradients and rates of zero
    (torch/distributed/checkpoint/state_dict.py, _init_optim_state). Collective where it may be."""
    if optimizer.state or any(float(group["lr"]) != 0.0 for group in optimizer.param_groups):
        return False
    grads = [local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    moves = any(bool(g.any()) for g in grads)
    return controller.ranks.all_reduce_sum([float(moves)])[0] == 0.0


def _check_load(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Before a checkpoint's state is loaded: torch would say no more than that sizes don't match."""
    theirs, ours = ([len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups))
    if len(theirs) == len(ours) and theirs != ours:
        raise ValueError(
            f"the checkpoint's optimizer holds {theirs} parameters in its groups, this one {ours}: other layers were frozen when it was "
            "saved. Call controller.restore(folder) first, with the folder that controller.save wrote to"
        )


# one, a list of them, or a container such as torchtitan's OptimizersContainer
OptimizerLike: TypeAlias = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | Any


def attach_torch(
    model: nn.Module,
    optimizer: OptimizerLike,
    config: FreezeConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    scheduler: Any = None,
    probe_batch: Any = None,
    scaler: Any = None,
    defer_policy: bool = False,
    later: bool = False,
) -> TorchController:
    """Turn freezing on for a model and its torch optimizer, without DeepSpeed. Collective; it then acts after each optimizer.step().

    model: the model as the training loop calls it: plain, DistributedDataParallel, `fully_shard`ed (FSDP2) or FullyShardedDataParallel with
        use_orig_params=True (FSDP1), wrapped before.
    optimizer: made over the wrapped model's parameters. Its groups stay; one that freezes whole becomes an empty one. Several of them, in a
        list or in a container that steps them (torchtitan's), are taken together: a step is one in which each of them steps.
    config: the settings: a FreezeConfig, a dict (the section itself, or a whole config with a "smartfrz" section), a path to such a
        JSON file, or None for the defaults.
    scheduler: of the optimizer (of several, any of theirs, or their container); says how long the run is (`total_steps: "auto"`) and what
        is left of the learning rate.
    probe_batch: inputs on which the layers' outputs are compared, as of `attach`.
    scaler: the torch.amp.GradScaler, where there is one and the policy reads gradients.
    defer_policy: the scheduler and the length of the run come with `controller.set_schedule(…)`, before the first step.
    later: deprecated, the former name of defer_policy.
    An optimizer that has a controller keeps it, and that one is returned.

    Raises:
        ValueError: wrong settings; a model or an optimizer that freezing does not work with, by name.
        RanksDisagree: the ranks differ in package versions, settings, models or optimizers.
    """
    bare = bare_optimizer(optimizer)
    scheduler = next(iter(getattr(scheduler, "schedulers", ())), scheduler)  # a container of one for each optimizer
    there = getattr(bare, "smartfrz", None)
    if isinstance(there, TorchController):
        return there
    share_timeout()
    ranks = Collectives(collective_device(local(p) for p in model.parameters()))
    ranks.assert_same(f"smartfrz_ds {__version__}, torch {torch.__version__}", "package versions")
    settings, backend = ranks.run_on_all_ranks(lambda: _prepare(model, bare, config))
    compare_before_attach(settings, model, bare, ranks)
    backend.scaler = scaler
    backend.listen()
    hooks = _Hooks(bare)
    try:
        controller = TorchController(
            backend.module,
            backend,
            settings,
            scheduler=scheduler,
            probe_batch=probe_batch,
            version=__version__,
            defer_policy=defer_policy or later,
        )
    except BaseException:
        backend.remove()
        hooks.remove()
        raise
    hooks.listen(controller)
    bare.smartfrz = controller  # type: ignore[attr-defined]
    return controller


def _prepare(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: FreezeConfig | Mapping[str, Any] | str | Path | None
) -> tuple[FreezeConfig, TorchBackend]:
    """What a rank can see by itself. Raises ValueError as `attach_torch`."""
    settings = FreezeConfig.load(config)
    if not settings.enabled:
        settings = settings.model_copy(update={"policy": "manual"})
    untested = settings.allow_untested_versions
    backend = make_torch_backend(model, optimizer, fsdp_frozen=settings.fsdp.frozen, allow_untested_versions=untested)
    own = {p: name for name, p in model.named_parameters() if p.requires_grad}
    held = {p for group in backend.groups for p in group}
    if not held.intersection(own):
        raise ValueError(
            "the optimizer holds none of the model's trainable parameters: make it after the model is wrapped (fully_shard, FSDP), "
            "over model.parameters()"
        )
    if left := [name for p, name in own.items() if p not in held]:
        backend.warnings.append(
            f"this optimizer does not hold all that trains: {', '.join(left[:3])}{', …' if len(left) > 3 else ''} ({len(left)} in all) "
            "never freeze, not even with their layer. Put all parameters into one optimizer, or freeze those in the others yourself"
        )
    return settings, backend
