"""Optimizer state that need not have its parameter's shape: quantized moments with their scales, factored moments, SOAP's matrices.

If the optimizer has one entry per parameter, such state is released and restored as a whole, whatever it contains. A flat partition holds
many parameters: state that cannot be cut at their borders cannot follow them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import Parameter

# Prefixes, in lower case, of the names of optimizers whose update of one weight depends on the others of its tensor: in a flat partition,
# removing a layer would change how the rest is trained, even if the state has the partition's shape.
_WHOLE_TENSOR = ("adafactor", "shampoo", "distributedshampoo", "soap", "lars", "came", "adammini", "adam_mini", "galore", "apollo")
_QUANTIZED = ("8bit", "4bit", "fp8")


@dataclass(frozen=True)
class Piece:
    """This rank's part of a DTensor, on the host.

    Attributes:
        local: The local tensor.
        placements: "S0" (cut along dimension 0) or "R", one per dimension of the mesh.
        shape: Shape of the whole tensor.
        stride: Strides of the whole tensor.
    """

    local: Tensor
    placements: tuple[str, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def about(self) -> dict[str, Any]:
        """Return everything but the tensor, JSON-serializable."""
        return {"placements": list(self.placements), "shape": list(self.shape), "stride": list(self.stride)}

    @classmethod
    def of(cls, local: Tensor, about: Mapping[str, Any]) -> Piece:
        """Rebuild a piece from its tensor and the output of `about`."""
        return cls(local, tuple(about["placements"]), tuple(about["shape"]), tuple(about["stride"]))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the plain tensors of a state entry: those in lists and dicts, and the inner ones of a tensor subclass (a DTensor's shard)."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from tensors_in(getattr(value, name))
        else:
            yield value
    elif isinstance(value, Piece):
        yield value.local
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def state_tensors(state: Mapping[Any, Mapping[str, Any]]) -> list[Tensor]:
    """Return the plain tensors with at least one dimension in an optimizer's state."""
    found: list[Tensor] = []
    for entries in state.values():
        for value in entries.values() if isinstance(entries, dict) else (entries,):
            plain = value._local_tensor if type(value) is DTensor else value
            if type(plain) is not Tensor:
                found += [t for t in tensors_in(value) if t.ndim > 0]
            elif plain.dim():  # nearly all of them; the general way takes several times as long
                found.append(plain)
    return found


def to_host(value: Any) -> Any:
    """Copy a state entry to the host; of a DTensor, this rank's part. A scalar, which is a step count, stays on its device."""
    if isinstance(value, DTensor):
        placements = tuple(f"S{p.dim}" if isinstance(p, Shard) else "R" if isinstance(p, Replicate) else str(p) for p in value.placements)
        # torch/distributed/tensor/_api.py: to_local() would record a gradient
        return Piece(_host_copy(value._local_tensor.detach()), placements, tuple(value.shape), tuple(value.stride()))
    if isinstance(value, Tensor):
        return value.detach().clone() if value.ndim == 0 else _host_copy(value.detach())
    return _mapped(value, to_host)


def to_device(value: Any, param: Tensor, *, scalars_beside: bool) -> Any:
    """Copy a state entry from the output of `to_host` to the device of its parameter.

    Args:
        value: The state entry.
        param: The parameter.
        scalars_beside: Whether step counts belong on the parameter's device (a fused or capturable optimizer). Otherwise they are not
            moved.
    """
    home = param._local_tensor if isinstance(param, DTensor) else param
    if isinstance(value, Piece):
        assert isinstance(param, DTensor)
        placements = [Replicate() if p == "R" else Shard(int(p.removeprefix("S"))) for p in value.placements]
        local = value.local.to(home.device)
        return DTensor.from_local(local, param.device_mesh, placements, run_check=False, shape=torch.Size(value.shape), stride=value.stride)
    if isinstance(value, Tensor):
        return value.to(home.device) if value.ndim > 0 or scalars_beside else value
    return _mapped(value, lambda item: to_device(item, param, scalars_beside=scalars_beside))


def scalars_beside(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch keeps this optimizer's step counts on the device (torch/optim/optimizer.py: load_state_dict)."""
    return any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)


def pack_state(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Split one parameter's kept state into JSON data and tensors.

    Returns:
        The JSON data and the state's own tensors, of which some may share a storage; None, with a warning, if the state has a tensor
        subclass, which cannot be stored in a file here.
    """
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {"numbers": {}, "pieces": {}, "nested": {}}
    for key, value in state.items():
        if _has_subclass(value):
            warnings.warn(
                f"smartfrz: optimizer state ({key!r}, a {type(value).__name__}) that is kept for a thaw is not in the checkpoint: "
                "after a resume, thawed layers start with fresh moments",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        if isinstance(value, Piece):
            tensors[key], about["pieces"][key] = value.local, value.about()
        elif isinstance(value, Tensor):
            tensors[key] = value
        elif next(tensors_in(value), None) is None:
            about["numbers"][key] = value
        else:
            about["nested"][key] = _encoded(value, key, tensors)
    return about, tensors


def unpack_state(about: Mapping[str, Any], tensors: Mapping[str, Tensor], param: Parameter) -> dict[str, Any]:
    """Rebuild a parameter's kept state from the output of `pack_state`."""
    state: dict[str, Any] = dict(about["numbers"])
    used: set[str] = set()
    for key, form in about.get("nested", {}).items():
        state[key] = _decoded(form, tensors, used)
    for key, tensor in tensors.items():
        if key in used:
            continue
        if "pieces" not in about and isinstance(param, DTensor) and tensor.ndim > 0:  # written by 0.1.0
            placements = [f"S{p.dim}" if isinstance(p, Shard) else "R" for p in param.placements]
            state[key] = Piece(tensor, tuple(placements), tuple(param.shape), tuple(param.stride()))
        else:
            piece = about.get("pieces", {}).get(key)
            state[key] = tensor if piece is None else Piece.of(tensor, piece)
    return state


def why_uncuttable(optimizer: torch.optim.Optimizer, masters: Sequence[Tensor]) -> str:
    """Return why the state of these flat partitions cannot be cut at parameter borders; "" if it can, or if there is none yet."""
    name = type(optimizer).__name__
    for master in masters:
        entries = optimizer.state.get(master, {})
        if entries and name.lower().startswith(_WHOLE_TENSOR):
            return f"{name} computes the update of a weight from its whole tensor, here a partition of many parameters"
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.ndim == 0:
                continue
            plain = isinstance(value, Tensor) and not hasattr(value, "__tensor_flatten__")
            if plain and value.shape == master.shape:
                continue
            if next(tensors_in(value), None) is None:
                continue  # a number, a name
            form = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            kind = "" if plain else f" {type(value).__name__}" if isinstance(value, Tensor) else ""
            shapes = f"{key!r} is {form}, the partition {tuple(master.shape)}"
            return f"{name} keeps{kind} state that is not laid out like the weights ({shapes})"
    return ""


def will_be_uncuttable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's state will be uncuttable, judged by its class and settings before the first step creates the state."""
    name = type(optimizer).__name__.lower()
    # bitsandbytes/optim/optimizer.py: args.optim_bits; torchao names its classes by their bits
    bits = getattr(getattr(optimizer, "args", None), "optim_bits", 32)
    return name.startswith(_WHOLE_TENSOR) or any(part in name for part in _QUANTIZED) or bits == 8


class Overrides:
    """Moves bitsandbytes' settings of single parameters (GlobalOptimManager), which it looks up by position, with their parameters.

    Private attributes of bitsandbytes 0.50 used here: optim/optimizer.py: Optimizer8bit.mng, GlobalOptimManager.index2config.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._of: dict[Tensor, Any] = {}

    def before(self) -> None:
        """Note the settings before parameters leave their groups or return."""
        table = self._table()
        for g, group in enumerate(self._optimizer.param_groups if table else ()):
            for i, param in enumerate(group["params"]):
                if (g, i) in table:
                    self._of[param] = table[g, i]

    def after(self) -> None:
        """Restore the settings at the parameters' new positions."""
        if not self._of:
            return
        table = self._table()
        table.clear()
        for g, group in enumerate(self._optimizer.param_groups):
            table.update({(g, i): self._of[p] for i, p in enumerate(group["params"]) if p in self._of})

    def _table(self) -> dict[tuple[int, int], Any]:
        table = getattr(getattr(self._optimizer, "mng", None), "index2config", None)
        return table if isinstance(table, dict) else {}


def _host_copy(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu":
        return tensor.to("cpu")
    if hasattr(tensor, "__tensor_flatten__"):
        return tensor
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _mapped(value: Any, function: Any) -> Any:
    if isinstance(value, dict):
        return {key: function(item) for key, item in value.items()}
    return type(value)(function(item) for item in value) if type(value) in (list, tuple) else value


def _has_subclass(value: Any) -> bool:
    if isinstance(value, Tensor):
        return hasattr(value, "__tensor_flatten__")
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(_has_subclass(item) for item in items)


def _encoded(value: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(value, Piece | Tensor):
        tensors[name] = value.local if isinstance(value, Piece) else value
        return {"tensor": name} | ({"piece": value.about()} if isinstance(value, Piece) else {})
    if isinstance(value, Mapping):
        return {"dict": [[key, _encoded(item, f"{name}.{i}", tensors)] for i, (key, item) in enumerate(value.items())]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_encoded(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    return {"value": value}


def _decoded(form: Mapping[str, Any], tensors: Mapping[str, Tensor], used: set[str]) -> Any:
    if "tensor" in form:
        used.add(form["tensor"])
        tensor = tensors[form["tensor"]]
        return Piece.of(tensor, form["piece"]) if "piece" in form else tensor
    if "dict" in form:
        return {key: _decoded(item, tensors, used) for key, item in form["dict"]}
    for kind in (list, tuple):
        if kind.__name__ in form:
            return kind(_decoded(item, tensors, used) for item in form[kind.__name__])
    return form["value"]
