"""The state of the frozen prefix: everything besides a row's inputs on which the row's result depends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from .keys import KEY_BYTES
from .proof import named_modules, refusal

_PROBES = 4  # weights of each tensor that are looked at in each forward
_CHECK_EVERY = 50  # forwards between two complete readings of the weights
_CHUNK = 1 << 24  # elements hashed at once


class PrefixState:
    """Watches weights, buffers, modes and adapters of the prefix.

    A cheap look comes with each forward: version counters, addresses and a few elements of each tensor, flags, adapters, settings of
    torch that choose kernels. All weights are hashed when the cheap look shows a change, after `suspect`, and once in 50 forwards: a write
    through `.data` leaves no trace in the version counter.

    Args:
        model: The model.
        tops: The modules of the prefix.
        later: Those of the layers behind it. Frozen weights and buffers of the model in neither (a position embedding of the model itself)
            count as the prefix's.
        stored: Returns this rank's stored part of a parameter.
        restore_flags: Switches frozen parameters off again that other code has switched on (`requires_grad`).
    """

    def __init__(
        self,
        model: nn.Module,
        tops: Sequence[nn.Module],
        later: Sequence[nn.Module],
        *,
        stored: Callable[[nn.Parameter], Tensor],
        restore_flags: Callable[[], None],
    ) -> None:
        self._restore_flags = restore_flags
        self._model, self._tops, self._later, self._stored = model, tops, later, stored
        self._looked: tuple[Any, ...] | None = None
        self._until_reading = 0
        self._token = b""
        self.refusal = ""
        self.changes = 0  # how often the weights turned out to be others
        self._weights = b""
        self.weights_read = False
        self._collect()

    def suspect(self) -> None:
        """Read all weights before the next use: other code has had the model."""
        self._until_reading = 0

    def token(self) -> bytes:
        """Return the digest of the current state. `refusal` says then whether, and why, the prefix can't be cached."""
        look = self._look()
        self._until_reading -= 1
        if look == self._looked and self._until_reading > 0:
            return self._token
        if any(p.requires_grad for p in self._params):
            self._restore_flags()
        self._collect()
        weights = self._read()
        if self._weights and weights != self._weights:
            self.changes += 1
        self._weights, self._until_reading = weights, _CHECK_EVERY
        self._looked = self._look()
        digest = blake2b(self._weights, digest_size=KEY_BYTES)
        digest.update(repr((self._names, self._looked[0])).encode())
        self._token = digest.digest()
        self.refusal = refusal(self._named)
        return self._token

    def _collect(self) -> None:
        self._named = named_modules(self._model, self._tops)
        self._modules = [module for _, module in self._named]
        self._names = [(name, type(module).__qualname__) for name, module in self._named]
        self._adapted = [m for m in self._modules if hasattr(m, "active_adapters") or hasattr(m, "merged_adapters")]
        behind = {m for top in self._later for m in top.modules()}.difference(self._modules)
        of_model = [m for m in self._model.modules() if m not in behind]
        own = set(self._modules)
        # torch/nn/modules/module.py: what a module holds directly
        params = dict.fromkeys(p for m in of_model for p in m._parameters.values() if p is not None and (m in own or not p.requires_grad))
        buffers = dict.fromkeys(b for m in of_model for b in m._buffers.values() if b is not None)
        self._params = list(params)
        self._tensors: list[Tensor] = [*(self._stored(p) for p in params), *buffers]
        self._held = [*params, *buffers]
        self._samples: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in self._tensors:
            flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else None
            if flat is None or not flat.numel():
                continue
            picked = [flat[(2 * k + 1) * flat.numel() // (2 * _PROBES)] for k in range(_PROBES)]
            self._samples.setdefault((flat.device, flat.dtype), []).extend(picked)

    def _look(self) -> tuple[Any, ...]:
        flags = (
            tuple(m.training for m in self._modules),
            tuple((_as_text(m, "active_adapters"), _as_text(m, "merged_adapters"), _as_text(m, "disable_adapters")) for m in self._adapted),
            _environment(self._tensors[0].device if self._tensors else torch.device("cpu")),
        )
        tensors = tuple((x._version, x.data_ptr(), x.requires_grad) for x in self._held)
        probes = tuple(torch.stack(values).view(torch.uint8).cpu().numpy().tobytes() for values in self._samples.values())
        return flags, tensors, probes

    def _read(self) -> bytes:
        digest = blake2b(digest_size=KEY_BYTES)
        for tensor in self._tensors:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
            flat = tensor.detach().contiguous().reshape(-1)
            for start in range(0, flat.numel(), _CHUNK):
                digest.update(flat[start : start + _CHUNK].view(torch.uint8).cpu().numpy().data)
        return digest.digest()


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
