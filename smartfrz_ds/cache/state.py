"""The state of the frozen prefix: everything besides a row's inputs on which the row's result depends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from .keys import KEY_BYTES
from .proof import hook_refusal, named_modules, refusal

_PROBES = 4  # weights of each tensor that are looked at in each forward
_CHECK_EVERY = 50  # forwards between two complete readings of the weights
_STATES = 16  # recent states; as many new ones in a row end the use of the cache
_PLAIN = (bool, int, float, str, type(None))
_DTYPES = ("dtype", "torch_dtype")  # of a configuration of transformers; set to the model's by the first save
# Likewise, by the first save or the first forward of a classifier. Only the head and the loss read the last one.
_OF_NO_PREFIX = ("architectures", "transformers_version", "_name_or_path", "problem_type")
_CHUNK = 1 << 24  # elements hashed at once


class PrefixState:
    """Watches weights, buffers, modes and adapters of the prefix.

    A cheap look comes with each forward: version counters, addresses and a few elements of each tensor; attributes of the modules and of
    their configuration that are numbers or text; hooks, adapters, and settings of torch that choose kernels. All weights are hashed when a
    tensor shows a change, after `suspect`, and once in 50 forwards: a write through `.data` leaves no trace in the version counter.

    Args:
        model: The model.
        tops: The modules of the prefix.
        later: Those of the layers behind it. Frozen weights and buffers of the model in neither (a position embedding of the model itself)
            count as the prefix's.
        stored: Returns this rank's stored part of a parameter.
        held: Returns the tensor whose address and version counter show that it was written.
        restore_flags: Switches frozen parameters off again that other code has switched on (`requires_grad`).
        device: The device on which the model runs.
        ignored: Names of attributes of modules that are an engine's own.

    Attributes:
        weights: Digest of this rank's part of the weights, as read last.
        shared: Digest of the parts of all ranks, where weights are sharded: it takes the place of `weights`, which differ by rank.
    """

    def __init__(
        self,
        model: nn.Module,
        tops: Sequence[nn.Module],
        later: Sequence[nn.Module],
        *,
        stored: Callable[[nn.Parameter], Tensor],
        held: Callable[[nn.Parameter], Tensor],
        restore_flags: Callable[[], None],
        device: torch.device,
        ignored: Collection[str] = (),
    ) -> None:
        self._restore_flags, self._device, self._ignored = restore_flags, device, ignored
        self._model, self._tops, self._later, self._stored, self._held_of = model, tops, later, stored, held
        self._seen_flags: tuple[Any, ...] = ()
        self._seen_tensors: tuple[Any, ...] = ()
        self._seen_hooks: tuple[int, ...] = ()
        self._until_reading = 0
        self._tokens: dict[bytes, None] = {}
        self._new_in_a_row = 0
        self._token = b""
        self.refusal = ""
        self.changes = 0  # how often the weights turned out to be others
        self.weights = self.shared = b""
        self._seen_shared = b""
        self._collect()

    def suspect(self) -> None:
        """Read all weights before the next use: other code has had the model."""
        self._until_reading = 0

    def token(self) -> bytes:
        """Return the digest of the current state. `refusal` says then whether, and why, the prefix can't be cached."""
        flags, tensors, hooks = self._flags(), self._traces(), self._hooks()
        self._until_reading -= 1
        due = tensors != self._seen_tensors or self._until_reading <= 0
        if flags == self._seen_flags and hooks == self._seen_hooks and self.shared == self._seen_shared and not due:
            return self._token
        if any(p.requires_grad for p in self._params):
            self._restore_flags()
        if due:
            self._collect()
            weights = self._read()
            if self.weights and weights != self.weights:
                self.changes += 1
            self.weights, self._until_reading = weights, _CHECK_EVERY
        flags, self._seen_tensors, self._seen_hooks, self._seen_shared = self._flags(), self._traces(), self._hooks(), self.shared
        self.refusal = refusal(self._named) or hook_refusal(self._between, self._model)
        digest = blake2b(self.shared or self.weights, digest_size=KEY_BYTES)
        digest.update(repr((self._names, flags)).encode())
        self._token = digest.digest()
        self._note_new(flags)
        self._seen_flags = flags
        return self._token

    def _note_new(self, flags: tuple[Any, ...]) -> None:
        """Refuse a state that never comes back: its rows would not, either."""
        self._new_in_a_row = 0 if self._token in self._tokens else self._new_in_a_row + 1
        self._tokens[self._token] = None
        if len(self._tokens) > _STATES:
            del self._tokens[next(iter(self._tokens))]
        if self._new_in_a_row >= _STATES and not self.refusal:
            old = self._seen_flags[0] if self._seen_flags else ()
            changed = [key for (_, key), x, y in zip(self._attributes, old, flags[0], strict=False) if x != y]
            what = f"the attribute {changed[0]!r} of a module" if changed else "a weight or a buffer"
            self.refusal = f"{what} that the frozen layers may read changes in every forward"

    def _collect(self) -> None:
        self._named = named_modules(self._model, self._tops)
        inside = {module for _, module in self._named}
        behind = {m for top in self._later for m in top.modules()}.difference(inside)
        of_model = [(name, m) for name, m in self._model.named_modules() if m not in behind]
        self._between = [(name, m) for name, m in of_model if m not in inside]
        self._modules = [m for _, m in of_model]
        self._names = [(name, type(m).__qualname__) for name, m in of_model]
        self._adapted = [m for m in self._modules if hasattr(m, "active_adapters") or hasattr(m, "merged_adapters")]
        configs = {id(x): x for m in self._modules if hasattr(x := vars(m).get("config"), "__dict__")}
        self._configs = [vars(x) for x in configs.values()]
        self._attributes = [
            (held, key)
            for held in (*map(vars, self._modules), *self._configs)
            for key, value in held.items()
            if isinstance(value, _PLAIN)
            and key not in self._ignored
            and not (key in (*_DTYPES, *_OF_NO_PREFIX) and any(held is x for x in self._configs))
        ]
        of_weights = next((p.dtype for p in self._model.parameters() if p.is_floating_point()), None)
        self._dtype = _short(of_weights)
        # torch/nn/modules/module.py: what a module holds directly
        every = (p for m in self._modules for p in m._parameters.values() if p is not None and (m in inside or not p.requires_grad))
        buffers = dict.fromkeys(b for m in self._modules for b in m._buffers.values() if b is not None)
        self._params = list(dict.fromkeys(every))
        self._tensors: list[Tensor] = [*(self._stored(p) for p in self._params), *buffers]
        self._held: list[Tensor] = [*(self._held_of(p) for p in self._params), *buffers]
        self._samples: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in self._tensors:
            flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else None
            if flat is None or not flat.numel():
                continue
            picked = [flat[(2 * k + 1) * flat.numel() // (2 * _PROBES)] for k in range(_PROBES)]
            self._samples.setdefault((flat.device, flat.dtype), []).extend(picked)

    def _flags(self) -> tuple[Any, ...]:
        return (
            tuple(_plain(held.get(key)) for held, key in self._attributes),
            tuple((_as_text(m, "active_adapters"), _as_text(m, "merged_adapters"), _as_text(m, "disable_adapters")) for m in self._adapted),
            tuple(p.requires_grad for p in self._params),
            tuple(self._dtype if held.get(key) is None else _short(held[key]) for held in self._configs for key in _DTYPES),
            _environment(self._device),
        )

    def _hooks(self) -> tuple[int, ...]:
        return tuple(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self._modules)

    def _traces(self) -> tuple[Any, ...]:
        """Return what a change of a tensor most likely shows in."""
        tensors = tuple((x._version, x.data_ptr()) for x in self._held)
        probes = tuple(torch.stack(values).view(torch.uint8).cpu().numpy().tobytes() for values in self._samples.values())
        return tensors, probes

    def _read(self) -> bytes:
        digest = blake2b(digest_size=KEY_BYTES)
        for tensor in self._tensors:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
            flat = tensor.detach().contiguous().reshape(-1)
            for start in range(0, flat.numel(), _CHUNK):
                digest.update(flat[start : start + _CHUNK].view(torch.uint8).cpu().numpy().data)
        return digest.digest()


def _plain(value: Any) -> Any:
    """Return an attribute's value, or only its type where the model has made it an object (a tensor, for example) since."""
    return value if isinstance(value, _PLAIN) else type(value).__name__


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _as_text(module: nn.Module, name: str) -> str:
    value = getattr(module, name, None)
    return "" if callable(value) else repr(value)


def _environment(device: torch.device) -> tuple[Any, ...]:
    """Return the settings of torch that choose kernels and dtypes."""
    cuda = torch.backends.cuda
    return (
        torch.is_autocast_enabled(device.type),
        str(torch.get_autocast_dtype(device.type)),
        torch.get_num_threads(),
        str(torch.get_default_dtype()),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.backends.mkldnn.enabled,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )
