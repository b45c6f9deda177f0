"""attach_torch: freezing in a script without DeepSpeed, in one process or with DDP, FSDP2 or FSDP1.

The controller hooks the torch optimizer (register_step_pre_hook and register_step_post_hook): a step is an `optimizer.step()`.
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
from smartfrz_ds.backends.torch.compat import make_torch_backend, wrapper_of
from smartfrz_ds.backends.torch.several import SeveralOptimizers, bare_optimizer, refuse_step_within_backward
from smartfrz_ds.checkpoint.torch import restore_from, save_beside
from smartfrz_ds.config.own import by_name
from smartfrz_ds.config.settings import FreezeConfig, with_settings
from smartfrz_ds.config.versions import untested
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.distributed.devices import collective_device
from smartfrz_ds.distributed.failures import compare_before_attach, explained, note_lost_contact, share_timeout
from smartfrz_ds.errors import FreezeError
from smartfrz_ds.model.hooks import ModuleHook
from smartfrz_ds.policies.base import Policy
from smartfrz_ds.runtime.controller import Controller

from .closures import RanClosure
from .selfcheck import judge
from .selfcheck.case import of_wrapper


class TorchController(Controller):
    """The controller of a run without DeepSpeed. Created by `attach_torch`."""

    _saved: str | None = None  # folder of the last `save`, until that checkpoint is known to be complete
    resumed_by = "controller.restore and your own load resume from"

    @property
    def backend(self) -> TorchBackend:
        """The backend of the model's wrapper and its optimizer."""
        return cast("TorchBackend", self._run.backend)

    def save(self, folder: str | Path) -> None:
        """Write the freeze state into the folder of the user's own checkpoint, beside its files. Collective, between steps.

        Args:
            folder: The checkpoint's folder, created if missing.

        Raises:
            OSError, RuntimeError: Some rank cannot write a file. Raised on every rank.
        """
        with explained(self, "save"):
            save_beside(self, self.backend, folder)
        self._saved = str(folder)

    def restore(self, folder: str | Path) -> None:
        """Load the freeze state that `save` wrote. Collective, at a step boundary.

        Call it BEFORE the model and the optimizer are loaded: at their load they must have the checkpoint's frozen set. With FSDP2 the
        number of ranks may differ.

        Args:
            folder: The checkpoint's folder.

        Raises:
            ValueError: The freeze state is missing, damaged or of another model. Nothing was changed.
        """
        with explained(self, "restore"):
            restore_from(self, self.backend, folder)

    def detach(self) -> None:
        """Restore the model, its wrapper and its optimizer: every layer trains, and no hook remains. Collective, at a step boundary.

        Layers that were frozen start with fresh moments. A second call changes nothing.
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

    def _set_schedule(self, scheduler: Any = None, total_steps: int | None = None, told_by: str = "set_schedule()") -> None:
        super()._set_schedule(scheduler, total_steps, told_by)
        self._hooks.come_last()  # after the hooks of a new policy

    def _listen(self, hooks: _Hooks) -> None:
        self._hooks = hooks
        self.backend.on_skipped = self.step_skipped
        self._forwards = self.backend.wrapped.register_forward_hook(ModuleHook(self._end_forward, self.backend.time), always_call=True)

    def _end_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Run after a forward, also one that raised: FSDP gathers weights in it, so a lost rank can show there."""
        if torch.compiler.is_compiling():
            return
        if self._saved is not None:  # training goes on, so the user has written the rest of that checkpoint
            self.last_checkpoint, self._saved = self._saved, None
        if output is None and (error := sys.exc_info()[1]) is not None:
            note_lost_contact(self, error, "forward")


class _Hooks:
    """The hooks that connect a torch optimizer to its controller.

    The hook before the step must be registered before the controller is created: a policy that scales learning rates also hooks the
    optimizer, and reads what this hook sets.
    """

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
        """Make the hook after the step the last one, when learning rates that were scaled for the step have been restored."""
        if self._last is not None:
            self._last.remove()
        self._last = self._optimizer.register_step_post_hook(self._after)

    def remove(self) -> None:
        for handle in (self._first, self._last, self._load):
            if handle is not None:
                handle.remove()

    def _explain(self, error: RuntimeError) -> None:
        if not isinstance(error, FreezeError):  # whose own text is complete
            note_lost_contact(self.controller, error, "the optimizer's step")

    def _incomplete(self) -> None:
        """Count a step as skipped: some of several optimizers began the next step before the others had taken this one."""
        assert self.controller is not None
        self.controller.step_skipped()
        if not self._warned:
            self._warned = True
            warnings.warn(
                "smartfrz: the optimizers do not all step equally often; only steps that all of them took are counted, and layers freeze "
                "only after such steps",
                RuntimeWarning,
                stacklevel=4,
            )

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.controller is None:
            return
        refuse_step_within_backward()
        given = [x for x in (*args[1:], *kwargs.values()) if x is not None] if kwargs or len(args) > 1 else ()
        if given and not all(isinstance(x, RanClosure) for x in given):
            raise ValueError("optimizer.step(closure): smartfrz_ds does not support a closure; allowed: optimizer.step() after backward")
        try:  # not `with explained(…)`, which costs more than the rest of a plain step
            self._counts = not _only_makes_state(optimizer, self.controller)
            if self._counts and given and given[0].is_empty(optimizer):
                self._counts = False  # nothing to step with
                self.controller.step_skipped()
            if self._counts:
                self.controller.before_step()
        except RuntimeError as error:
            self._explain(error)
            raise

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.controller is None or not self._counts:
            return
        self.controller.backend.stepped()
        # torch/amp/grad_scaler.py: a fused optimizer is always called, and skips the step itself if this is not zero.
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor) and found_inf.item():
            self.controller.step_skipped()
            return
        try:
            self.controller.after_step()
        except RuntimeError as error:
            self._explain(error)
            raise


def _only_makes_state(optimizer: torch.optim.Optimizer, controller: TorchController) -> bool:
    """Whether this step only creates optimizer state: torch.distributed.checkpoint does that, with gradients and learning rates of zero.

    Collective if the optimizer has no state and all its rates are zero.

    Source: torch/distributed/checkpoint/state_dict.py, _init_optim_state.
    """
    if optimizer.state or any(float(group["lr"]) != 0.0 for group in optimizer.param_groups):
        return False
    grads = [local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    moves = any(bool(g.any()) for g in grads)
    return controller.ranks.all_reduce_sum([float(moves)])[0] == 0.0


def _check_load(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Check a checkpoint's state before it is loaded: torch would only report that sizes do not match."""
    theirs, ours = ([len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups))
    if len(theirs) == len(ours) and theirs != ours:
        raise ValueError(
            f"the checkpoint's optimizer holds {theirs} parameters in its groups, this one {ours}: other layers were frozen when it was "
            "saved. First call controller.restore(folder) with the folder that was passed to controller.save"
        )


# one optimizer, a list of them, or a container such as torchtitan's OptimizersContainer
OptimizerLike: TypeAlias = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | Any


def attach_torch(
    model: nn.Module,
    optimizer: OptimizerLike,
    config: FreezeConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    scheduler: Any = None,
    probe_batch: Any = None,
    policy: str | Policy | None = None,
    scaler: Any = None,
    defer_policy: bool = False,
    later: bool = False,
    **settings: Any,
) -> TorchController:
    """Enable freezing for a model and its torch optimizer, without DeepSpeed. Collective. It acts after each optimizer.step().

    Args:
        model: The model as the training loop calls it, already wrapped: plain, DistributedDataParallel, `fully_shard`ed (FSDP2) or
            FullyShardedDataParallel with use_orig_params=True (FSDP1).
        optimizer: Created over the wrapped model's parameters. Its groups remain; a group that is frozen as a whole becomes empty. Several
            optimizers, in a list or in a container that steps them (torchtitan's), are treated as one: a step is complete when each of
            them has stepped.
        config: The settings: a FreezeConfig, a dict (the section itself, or a whole config with a "smartfrz" section), the path of such a
            JSON file, or None for the defaults.
        scheduler: The optimizer's scheduler (of several, any of theirs, or their container). It determines the length of the run
            (`total_steps: "auto"`) and the remaining learning rate.
        probe_batch: Inputs on which the outputs of the layers are compared, as in `attach`.
        policy: The policy that decides, by name or as an object of your own (`smartfrz_ds.Policy`); it takes precedence over `config`.
        scaler: The torch.amp.GradScaler, if there is one and the policy reads gradients.
        defer_policy: The scheduler and the length of the run follow with `controller.set_schedule(…)`, before the first step.
        later: Deprecated, the former name of `defer_policy`.
        settings: Single settings by name, which take precedence over `config`.

    Returns:
        The controller. If the optimizer already has one, that one.

    Raises:
        ValueError: Wrong settings, or a model or optimizer that freezing does not support, by name.
        RanksDisagree: The ranks differ in package versions, settings, models or optimizers.
    """
    bare = bare_optimizer(optimizer)
    scheduler = next(iter(getattr(scheduler, "schedulers", ())), scheduler)  # a container with one scheduler per optimizer
    there = getattr(bare, "smartfrz", None)
    if isinstance(there, TorchController):
        return there
    share_timeout()
    ranks = Collectives(collective_device(local(p) for p in model.parameters()))
    ranks.assert_same(f"smartfrz_ds {__version__}, torch {torch.__version__}", "package versions")
    loaded, backend = ranks.run_on_all_ranks(lambda: _prepare(model, bare, with_settings(config, by_name(policy, settings))))
    compare_before_attach(loaded, model, bare, ranks)
    wrapper = wrapper_of(model)
    verdict = judge(
        ranks,
        untested(torch=torch.__version__) if wrapper is not None else None,
        lambda: of_wrapper(str(wrapper), frozen=loaded.fsdp.frozen, device=backend.device.type),
        loaded.untested_versions,
        versions={"torch": torch.__version__},
        library=None,
    )
    backend.warnings += [verdict.text] if verdict.text else []
    backend.use_scaler(scaler)
    backend.listen()
    hooks = _Hooks(bare)
    try:
        controller = TorchController(
            backend.module,
            backend,
            loaded,
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
    controller.begin()
    return controller


def _prepare(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: FreezeConfig | Mapping[str, Any] | str | Path | None
) -> tuple[FreezeConfig, TorchBackend]:
    """Do the checks of `attach_torch` that need no other rank.

    Raises:
        ValueError: As in `attach_torch`.
    """
    settings = FreezeConfig.load(config)
    if not settings.enabled:
        settings = settings.model_copy(update={"policy": "manual"})
    backend = make_torch_backend(model, optimizer, fsdp_frozen=settings.fsdp.frozen)
    own = {p: name for name, p in model.named_parameters() if p.requires_grad}
    held = {p for group in backend.groups for p in group}
    if not held.intersection(own):
        raise ValueError(
            "the optimizer holds none of the model's trainable parameters: create it over model.parameters() after the model has been "
            "wrapped (fully_shard, FSDP)"
        )
    if left := [name for p, name in own.items() if p not in held]:
        backend.warnings.append(
            f"the optimizer does not hold all trainable parameters: {', '.join(left[:3])}{', …' if len(left) > 3 else ''} ({len(left)} in "
            "all) never freeze, not even with their layer. Pass all optimizers as a list, or put all parameters into one"
        )
    return settings, backend
