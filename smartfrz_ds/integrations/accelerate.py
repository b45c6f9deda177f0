"""Entry point for Accelerate: `smartfrz_ds.prepare(accelerator, …)` replaces `accelerator.prepare(…)`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DistributedType

from smartfrz_ds.checkpoint.files import SIDE_FILE
from smartfrz_ds.config.own import with_object
from smartfrz_ds.config.settings import FreezeConfig, with_settings
from smartfrz_ds.signals.lr_forecast import total_steps_of

from .deepspeed import ConfigSource
from .initialize_hook import engine_of, install_hook, remove_hook
from .torch import TorchController, attach_torch


def prepare(
    accelerator: Any, *objects: Any, config: ConfigSource = None, probe_batch: Any = None, device_placement: Any = None, **settings: Any
) -> Any:
    """Call accelerator.prepare(*objects) with freezing enabled. Collective.

    The controller is `accelerator.smartfrz` (None with DeepSpeed and `enabled: false`). `accelerator.save_state` and `load_state` include
    the freeze state.

    Args:
        accelerator: Configured for DeepSpeed, FSDP2, DDP or one process.
        objects: Exactly one model and its optimizer, the scheduler if there is one, and anything else that accelerator.prepare takes.
        config: The settings: a dict, the path of a DeepSpeed JSON or a FreezeConfig. None: the "smartfrz" section of the DeepSpeed config,
            without DeepSpeed the defaults.
        probe_batch: As in `attach`.
        device_placement: Passed to accelerator.prepare.
        settings: Single settings by name, which take precedence over `config`. `policy` may be an object of your own
            (`smartfrz_ds.Policy`).

    Returns:
        The result of accelerator.prepare.

    Raises:
        ValueError: Wrong settings, not exactly one model and one optimizer, or a model or optimizer that freezing does not support.
        RanksDisagree: The ranks differ in settings, package version or layers.
    """
    models = [x for x in objects if isinstance(x, torch.nn.Module)]
    if len(models) != 1 or sum(_is_optimizer(x) for x in objects) != 1:
        got = ", ".join(type(x).__name__ for x in objects) or "nothing"
        raise ValueError(f"prepare: got {got}; allowed: exactly one model and one optimizer among the arguments")

    settings = with_object(settings)

    def over(source: ConfigSource) -> FreezeConfig:
        return with_settings(source if config is None else config, settings)

    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        install_hook(over, probe_batch=probe_batch, defer_policy=True)
        try:
            result = accelerator.prepare(*objects, device_placement=device_placement)
        finally:
            remove_hook()
        accelerator.smartfrz = getattr(engine_of(models[0]), "smartfrz", None)
        if accelerator.smartfrz is not None:
            accelerator.smartfrz.set_schedule(scheduler=_as_stepped(result))
        return result
    chosen = over(None)
    result = accelerator.prepare(*objects, device_placement=device_placement)
    model = next(x for x in result if isinstance(x, torch.nn.Module))
    optimizer = next(x for x in result if _is_optimizer(x))
    controller = attach_torch(
        model, optimizer, chosen, scheduler=_as_stepped(result), probe_batch=probe_batch, scaler=getattr(accelerator, "scaler", None)
    )
    accelerator.smartfrz = controller
    _include_in_states(accelerator, controller)
    return result


class PerStep:
    """A scheduler as Accelerate steps it: several times per optimizer step. Used for forecasts and the length of the run.

    Args:
        scheduler: The user's scheduler.
        times: Scheduler steps per optimizer step, >= 1.
    """

    def __init__(self, scheduler: Any, times: int) -> None:
        self.scheduler, self.times = scheduler, times
        length = total_steps_of(scheduler)
        self.total_num_steps = None if length is None else -(-length // times)

    @property
    def optimizer(self) -> Any:
        """The scheduler's optimizer."""
        return self.scheduler.optimizer

    def step(self) -> None:
        """Step as often as Accelerate does in one optimizer step."""
        for _ in range(self.times):
            self.scheduler.step()


def _as_stepped(prepared: Any) -> Any:
    """Return the scheduler from accelerator.prepare, or None: there is none, or the DeepSpeed engine has it."""
    found = next((x for x in prepared if type(x) is AcceleratedScheduler), None)
    if found is None:
        return None
    several = found.step_with_optimizer and not found.split_batches  # accelerate/scheduler.py: step
    return PerStep(found.scheduler, found.optimizers[0].accelerator_state.num_processes if several else 1)


def _is_optimizer(x: Any) -> bool:
    return isinstance(x, torch.optim.Optimizer) or type(x).__name__ == "DummyOptim"  # accelerate/utils/deepspeed.py


def _include_in_states(accelerator: Any, controller: TorchController) -> None:
    """Make save_state and load_state of this accelerator include the freeze state."""
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: controller.save(folder))

    # A wrapper, not Accelerate's hooks: with FSDP they run only after the optimizer was loaded (accelerate/accelerator.py: load_state).
    load_state = accelerator.load_state

    def load(input_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        folder = os.path.expanduser(input_dir) if input_dir is not None else _newest(accelerator)
        if folder is None or not Path(folder).is_dir():
            return load_state(input_dir, *args, **kwargs)  # which reports the error
        there = (Path(folder) / SIDE_FILE).is_file()
        if there:
            controller.restore(folder)
        else:  # a state saved without freezing
            controller.freeze_state.restore_layout(())
        result = load_state(input_dir, *args, **kwargs)
        if not there:
            controller.freeze_state.reset(controller.backend.step_count(), folder)
        return result

    accelerator.load_state = load


def _newest(accelerator: Any) -> str | None:
    """Return the folder that load_state() chooses without an argument, None where it has none."""
    if not accelerator.project_configuration.automatic_checkpoint_naming:
        return None
    folders = [str(x) for x in (Path(accelerator.project_dir) / "checkpoints").iterdir()]
    return max(folders, key=lambda x: int(re.findall(r"[\/]?([0-9]+)(?=[^\/]*$)", x)[0]))
