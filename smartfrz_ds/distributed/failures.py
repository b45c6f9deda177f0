"""Failures that concern all ranks: ranks that differ at the start, a rank lost in mid-run, a file that one rank cannot write.

docs/faults.md lists the faults; tests/faults/test_faults.py provokes each of them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import nn

from smartfrz_ds._version import __version__
from smartfrz_ds.config.settings import FreezeConfig, digest
from smartfrz_ds.errors import FreezeError
from smartfrz_ds.model.layers import shape_of

from .collectives import Collectives
from .devices import collective_device, device_kind

# Sections of the DeepSpeed JSON that determine the collectives. Others, such as log paths, may differ between ranks.
_COLLECTIVE = (
    "zero_optimization",
    "bf16",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "communication_data_type",
    "data_types",
    "optimizer",
    "pipeline",
)
# Gloo raises a plain RuntimeError: its text names one of its source files, or a lost socket.
_GLOO = ("gloo", "connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting")


def compare_before_start(model: Any, settings: FreezeConfig, config: Any, *, deepspeed_version: str) -> None:
    """Check that all ranks are about to build the same engine. Collective; does nothing if there is no process group yet.

    A difference that is not found here shows later as a hang, or as an error of the communication library that names no cause.

    Args:
        model: An nn.Module whose parameters are compared; None: no comparison (the stages of a pipeline have different layers).
        settings: This package's settings.
        config: The DeepSpeed JSON as a dict, its path, or None.
        deepspeed_version: Version of DeepSpeed.

    Raises:
        RanksDisagree: The ranks differ. Raised on every rank, with its versions, settings or model.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    ranks = Collectives(collective_device())
    ranks.assert_same(f"smartfrz_ds {__version__}, deepspeed {deepspeed_version}, torch {torch.__version__}", "package versions")
    ranks.assert_same(f"settings {digest(settings)}", "smartfrz settings")
    ranks.assert_same(_collective_part(config), "DeepSpeed settings")
    if isinstance(model, nn.Module):
        ranks.assert_same(_outline(model), "models")


def _collective_part(config: Any) -> str:
    if isinstance(config, str | Path) and Path(config).is_file():
        config = json.loads(Path(config).read_text())
    if not isinstance(config, Mapping):
        return "DeepSpeed settings that are neither a file nor a dict"
    return json.dumps({key: config[key] for key in _COLLECTIVE if key in config}, sort_keys=True, default=lambda x: type(x).__name__)


def _outline(model: nn.Module) -> str:
    about = [(name, tuple(shape_of(p)), p.dtype, p.requires_grad) for name, p in model.named_parameters()]
    total = sum(prod(shape) for _, shape, _, _ in about)
    trained = sum(requires_grad for *_, requires_grad in about)
    short = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    return f"{type(model).__name__} with {len(about)} parameters, {trained} trainable, {total} weights; names, shapes and dtypes {short}"


def compare_before_attach(settings: FreezeConfig, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Collectives) -> None:
    """Check that all ranks attach to the same model and optimizer, without DeepSpeed. Collective.

    The model is wrapped already; FSDP2's wrapper compares nothing.

    Args:
        settings: This package's settings.
        model: The wrapped model.
        optimizer: Its optimizer.
        ranks: The collectives of all ranks.

    Raises:
        RanksDisagree: The ranks differ. Raised on every rank, with its settings, model or optimizer.
    """
    if ranks.alone:
        return
    ranks.assert_same(f"settings {digest(settings)}", "smartfrz settings")
    ranks.assert_same(_outline(model), "models")
    groups = [len(group["params"]) for group in optimizer.param_groups]
    ranks.assert_same(f"{type(optimizer).__name__} with {groups} parameters in its groups", "optimizers")


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error means that another rank, or the connection to it, is lost."""
    if isinstance(error, dist.DistError):  # NCCL and the store
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _GLOO)


def note_lost_contact(controller: Any, error: BaseException, doing: str) -> None:
    """Add a note to an error that was caused by a lost rank, once: the step, the usual causes and how to resume.

    Args:
        controller: The run's controller.
        error: Any error. Others than those of a lost rank are left unchanged.
        doing: The operation that failed, for the note.
    """
    if not is_lost_contact(error) or any(note.startswith("smartfrz") for note in getattr(error, "__notes__", ())):
        return
    last = controller.last_checkpoint
    way = "; this process has neither saved nor loaded a checkpoint yet"
    if last is not None:
        way = f": {controller.resumed_by} the last complete checkpoint, {last}"
    _add_note(
        error,
        f"smartfrz: rank {controller.ranks.rank} lost contact with another rank in {doing}, {controller.step} steps into the run. "
        "That rank ended (its own output says why), hangs for longer than the process group's timeout, or the link to it is down. "
        f"What to do: end all ranks and start the run again{way}",
    )


def _add_note(error: BaseException, note: str) -> None:
    if sys.version_info >= (3, 11):
        error.add_note(note)
    else:  # a traceback shows no notes: the text goes to the end of the message
        vars(error).setdefault("__notes__", []).append(note)
        error.args = (f"{error}\n{note}",)


def share_timeout() -> None:
    """Set the timeout of the main group for every process group that has torch's default.

    DeepSpeed 0.19.8 creates its groups without the timeout passed to init_distributed (comm/torch.py: new_group), and so does torch for the
    dimensions of a device mesh. A lost rank would be noticed after torch's 10 minutes (NCCL) or 30 (gloo) even if the user set less, and
    a slow rank would not be waited for if the user set more.

    A group has one backend for each kind of device ("cpu:gloo,cuda:nccl"), each with a timeout of its own. Each takes that of the main
    group's backend for the same kind; without one, that of the device on which this process trains.
    """
    if not dist.is_initialized():
        return
    main = {kind: timeout for kind, (_, timeout) in _timeouts(dist.group.WORLD).items()}
    otherwise = main.get(device_kind().type, next(iter(main.values()), None))
    for group in list(c10d._world.pg_map):
        for kind, (backend, own) in _timeouts(group).items():
            wanted = main.get(kind, otherwise)
            if wanted is not None and own != wanted and own in _default_timeouts(group, backend):
                backend._set_default_timeout(wanted)


def shortest_timeout() -> float | None:
    """Return the shortest timeout of the main group's backends, in seconds; None without a group, or where it is unknown."""
    if not dist.is_initialized():
        return None
    return min((timeout.total_seconds() for _, timeout in _timeouts(dist.group.WORLD).values()), default=None)


def _timeouts(group: Any) -> dict[str, tuple[Any, Any]]:
    """Return the backend and the timeout for each kind of device of this process's group, as far as the backend has one."""
    found: dict[str, tuple[Any, Any]] = {}
    if c10d._rank_not_in_group(group):
        return found
    for device in group._device_types:
        backend = group._get_backend(device)
        timeout = getattr(getattr(backend, "options", None), "_timeout", None)
        if timeout is not None and hasattr(backend, "_set_default_timeout"):
            found[torch.device(device).type] = backend, timeout
    return found


def _default_timeouts(group: Any, backend: Any) -> set[Any]:
    """Return torch's defaults for a backend of a group: it takes the one of the group's whole string, or of the backend alone."""
    return {c10d._get_default_timeout(kind) for kind in (dist.get_backend(group), c10d.Backend(backend.name()))}


@contextmanager
def explained(controller: Any, doing: str) -> Iterator[None]:
    """Add a note to an error of a lost rank that a block of collectives raises.

    Args:
        controller: The run's controller.
        doing: The operation, for the note ("backward").
    """
    try:
        yield
    except FreezeError:
        raise  # its own text is complete
    except RuntimeError as error:
        note_lost_contact(controller, error, doing)
        raise


class Writes:
    """Failed writes during DeepSpeed's save.

    A rank that cannot write a file must still take part in DeepSpeed's collectives, in which the others would wait for it. So the error is
    held back, and all ranks raise afterwards.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.path = Path()

    @contextmanager
    def watched(self, checkpoint_engine: Any) -> Iterator[None]:
        """Hold back errors of a checkpoint engine within the block.

        Args:
            checkpoint_engine: DeepSpeed's (runtime/checkpoint_engine). It writes all files through makedirs and save.
        """
        originals = {name: getattr(checkpoint_engine, name) for name in ("makedirs", "save")}

        def guarded(original: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if self.error is not None:
                    return None
                try:
                    return original(*args, **kwargs)
                except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if the disk is full
                    # makedirs(path, ...) and save(state_dict, path)
                    paths = [x for x in (*args, *kwargs.values()) if isinstance(x, str | Path)]
                    self.error, self.path = error, Path(paths[0]) if paths else Path()
                    return None

            return call

        for name, original in originals.items():
            setattr(checkpoint_engine, name, guarded(original))
        try:
            yield
        finally:
            for name in originals:
                delattr(checkpoint_engine, name)

    def check(self) -> None:
        """Raise the error that was held back.

        Raises:
            OSError: A file could not be written.
        """
        if self.error is None:
            return
        there = next((p for p in self.path.absolute().parents if p.is_dir()), Path("/"))
        free = shutil.disk_usage(there).free / 1e6
        raise OSError(f"{self.path} could not be written ({free:.0f} MB are free there): {self.error}") from self.error
