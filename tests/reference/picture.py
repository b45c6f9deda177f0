"""Everything that an engine's layout consists of, as text: two equal pictures are one state, bit for bit.

The walk begins at the model, the backend and the optimizer, and goes through everything that belongs to them: containers, and objects
of this package's backends, of DeepSpeed's and torch's optimizers and of FSDP2. Of a tensor it notes type, shape, bits, and which other
tensors share its storage; of an object that occurs several times, where it occurred first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# What is walked through attribute by attribute; of everything else only the type is noted.
_OWN = (
    "smartfrz_ds.backends",
    "smartfrz_ds.model.run_state",
    "deepspeed.runtime.zero",
    "deepspeed.runtime.fp16",
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.ops.adam",
    "deepspeed.runtime.base_optimizer",
    "torch.optim",
    "torch.distributed.fsdp._fully_shard",
)
# The way back to the whole engine; clocks; what is looked up once, when it is first needed; a plan that is compared before its use; a hook
# that stays once it is there.
_SKIPPED = {
    "engine",
    "module",
    "wrapped",
    "timers",
    "_handles",
    "_whole_of",
    "_planned",
    "_hooked",
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
}
# Where BF16_Optimizer gathers gradients: all zero between two steps. What stands for an emptied group is made once and then kept.
_SKIPPED |= {"non_expert_gradients", "fp32_groups_gradient_dict", "fp32_groups_gradients", "fp32_groups_gradients_flat"}
_SKIPPED |= {"fp32_groups_actual_gradients_flat", "fp32_groups_gradient_flat_partition", "placeholders", "param_names"}
# What the next step makes anew: a mask, staging areas, the order of modules that ZeRO-3 records.
_SKIPPED |= {"flatten_grad_norm_mask_list", "has_executed_step", "param_buffer_of_bit16_for_cpu_offload_groups", "offload_gradient_dict"}
_SKIPPED |= {
    "param_coordinator",
    "_last_complete",
    "grad_partitions_flat_buffer",
    "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",
}


def picture(**roots: Any) -> dict[str, str]:
    """Return what is reachable from the roots: path -> what is there. Modules first: their parameters' names stand for them elsewhere."""
    walk = _Walk()
    for name, root in roots.items():
        walk.seen.update(walk.of(root, name))
    walk.seen.update(walk.rest())
    return walk.seen


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Return, path by path, where two pictures differ."""
    return [f"{path}: {one.get(path)} -> {other.get(path)}" for path in {**one, **other} if one.get(path) != other.get(path)]


class _Walk:
    def __init__(self) -> None:
        self.seen: dict[str, str] = {}
        self._first: dict[int, str] = {}
        self._alive: list[Any] = []  # an id is one object's as long as it lives
        self._storages: dict[int, str] = {}
        self._late: list[tuple[str, Mapping[Any, Any]]] = []  # by tensors that have no name yet

    def rest(self) -> Iterator[tuple[str, str]]:
        """Go through what was put off."""
        for path, thing in self._late:
            for number, (key, value) in enumerate(thing.items()):
                if isinstance(key, Tensor) and id(key) not in self._first:
                    yield from self.of(key, f"{path}.keys[{number}]")
                yield from self.of(value, f"{path}[{self._name(key)}]")

    def of(self, thing: Any, path: str) -> Iterator[tuple[str, str]]:
        if thing is None or isinstance(thing, bool | int | float | str | bytes | torch.dtype | torch.device | torch.Size):
            yield path, repr(thing)
            return
        if id(thing) in self._first and not isinstance(thing, list):
            yield path, f"is {self._first[id(thing)]}"
            return
        self._first[id(thing)] = path
        self._alive.append(thing)
        if isinstance(thing, nn.Module):
            yield from self._module(thing, path)
        elif isinstance(thing, Tensor):
            yield from self._tensor(thing, path)
        elif isinstance(thing, Mapping):
            thing = {key: value for key, value in thing.items() if value is not None}
            yield path, f"{type(thing).__name__} of {len(thing)}"
            if any(isinstance(key, Tensor) and id(key) not in self._first for key in thing):
                self._late.append((path, thing))
                return
            for key, value in thing.items():
                yield from self.of(value, f"{path}[{self._name(key)}]")
        elif isinstance(thing, set | frozenset):
            yield path, f"{type(thing).__name__} {sorted(map(self._name, thing))}"
        elif isinstance(thing, Sequence):
            yield path, f"{type(thing).__name__} of {len(thing)}"
            for index, value in enumerate(thing):
                yield from self.of(value, f"{path}[{index}]")
        elif type(thing).__module__.startswith(_OWN) and hasattr(thing, "__dict__"):
            yield path, type(thing).__name__
            for name, value in vars(thing).items():
                if name not in _SKIPPED and not callable(value):
                    yield from self.of(value, f"{path}.{name}")
        else:
            yield path, type(thing).__qualname__

    def _module(self, top: nn.Module, path: str) -> Iterator[tuple[str, str]]:
        for name, module in top.named_modules():
            hooks = [*module._forward_pre_hooks.values(), "|", *module._forward_hooks.values()]
            named = [getattr(h, "__qualname__", None) or f"{type(h).__name__}({getattr(h, 'own_eval', '')})" for h in hooks if h != "|"]
            stays = getattr(vars(module).get("train"), "own_eval", None)
            behind = len(module._backward_hooks)
            yield f"{path}<{name}>", f"training {module.training}, stays in eval {stays}, hooks {named}, {behind} in backward"
        for kind, tensors in (("", top.named_parameters()), ("buffer ", top.named_buffers())):
            for name, tensor in tensors:
                yield from self.of(tensor, f"{path}:{kind}{name}")

    @torch.no_grad()
    def _tensor(self, tensor: Tensor, path: str) -> Iterator[tuple[str, str]]:
        flags = type(tensor).__name__
        if path.startswith("model"):
            flags += f" trains {tensor.requires_grad}, gradient {tensor.grad is not None}"
        inside = getattr(tensor, "_local_tensor", None)
        if tensor.is_meta:
            yield path, f"{flags}, meta {tuple(tensor.shape)} {tensor.dtype}"
            return
        if isinstance(inside, Tensor):
            yield path, f"{flags}, {tensor.placements}"  # type: ignore[attr-defined]
            yield from self.of(inside, f"{path}.local")
            return
        storage = tensor.untyped_storage()
        place = ""
        if storage.nbytes():
            owner = self._storages.setdefault(storage.data_ptr(), path)
            place = f" in {storage.nbytes()} bytes of {owner} at {tensor.storage_offset()} by {tensor.stride()}"
        bits = "freed"
        if tensor.is_meta:
            bits = "meta"
        elif storage.nbytes() >= tensor.nbytes:
            own = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # numpy() forbids its tensor to be resized
            data = own.reshape(-1).view(torch.uint8).numpy().tobytes()
            bits = hashlib.sha1(data, usedforsecurity=False).hexdigest()[:12]
        yield path, f"{flags}, {tensor.dtype} {tuple(tensor.shape)} {bits}{place}"
        for name in ("ds_tensor", "_hp_mapping", "grad_accum", "ds_status"):  # what DeepSpeed hangs on a parameter
            if getattr(tensor, name, None) is not None:
                yield from self.of(getattr(tensor, name), f"{path}.{name}")

    def _name(self, key: Any) -> str:
        if isinstance(key, Tensor | nn.Module):
            return self._first.get(id(key), f"an unknown {type(key).__name__}")
        return type(key).__name__ if type(key).__repr__ is object.__repr__ else repr(key)
