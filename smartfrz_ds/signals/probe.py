"""A small batch that is sent through the model at each freezing stage, to see how alike each layer's output is to what it was.

All ranks run the forward together, since under ZeRO-3 the weights are gathered for it; rank 0 keeps an [inputs, inputs] matrix a layer.
The model is left as it was: modes, random numbers, gradients, weights. The forward runs in eval mode and without gradients, and the hooks
that count FLOPs, check the order and keep a boundary open for recomputation do nothing then.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from smartfrz_ds.model.layers import Layer
from smartfrz_ds.predictor.similarity import centered_gram, probe_rows


class Probe:
    """The batch and where it is looked at.

    model: its forward takes the batch. layers: all of them. batch: a tensor, a tuple or list of positional arguments or a mapping of
    keyword arguments; tensors of it with a first dimension are cut to `inputs` along that. device: where the batch is moved to.

    Raises ValueError: no tensor in the batch, or one with fewer than `inputs` rows.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], batch: Any, inputs: int, device: torch.device) -> None:
        self._model, self._layers, self._inputs = model, layers, inputs
        self._args, self._kwargs = _arguments(_cut(batch, inputs, device))

    def grams(self, keep: bool) -> dict[str, Tensor]:
        """For each layer whose output has one row an input: its centered Gram matrix, (rows, rows) fp64 on the host. Collective.

        Rows are the inputs; of a sequence, (inputs, tokens, features), two tokens of each input (probe_rows).

        A layer's output is that of the module of it that ran last: the tensor, or the first one in what it returns.
        keep: whether this rank wants them; else an empty dict.
        """
        found: dict[str, Tensor] = {}

        def look(name: str, output: Any) -> None:
            tensor = next((x for x in tree_leaves(_plain(output)) if isinstance(x, Tensor) and x.is_floating_point()), None)
            if tensor is not None and tensor.ndim > 1 and tensor.shape[0] == self._inputs:
                found[name] = centered_gram(probe_rows(tensor)).cpu()  # the rows that the predictor was trained on

        hooks = []
        if keep:
            for layer in self._layers:
                for module in layer.modules:
                    hooks.append(module.register_forward_hook(lambda _m, _a, output, name=layer.name: look(name, output)))
        try:
            with _undisturbed(self._model), torch.no_grad():
                self._model(*self._args, **self._kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        return found


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module's own mode and all random numbers are as before."""
    modes = {module: module.training for module in model.modules()}
    here, numbers = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None})
    with torch.random.fork_rng(devices=devices):
        for module in modes:
            module.training = False  # not by train(False): some modules do more then, as merging weights
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            random.setstate(here)
            np.random.set_state(numbers)


def _cut(batch: Any, inputs: int, device: torch.device) -> Any:
    tensors = [x for x in tree_leaves(_plain(batch)) if isinstance(x, Tensor) and x.ndim > 0]
    if not tensors:
        raise ValueError(f"probe_batch: got {type(batch).__name__} without a tensor; allowed: a tensor, or a tuple or dict of tensors")
    short = [tuple(x.shape) for x in tensors if x.shape[0] < inputs]
    if short:
        raise ValueError(
            f"smartfrz.probe: got {inputs}, but probe_batch holds a tensor of shape {short[0]}; allowed: at most its first dimension"
        )
    return tree_map(lambda x: x[:inputs].to(device) if isinstance(x, Tensor) and x.ndim > 0 else x, _plain(batch))


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})


def _plain(item: Any) -> Any:
    """Mappings that torch's pytree does not know (ModelOutput, BatchEncoding) as dicts."""
    if isinstance(item, Mapping):
        return {key: _plain(value) for key, value in item.items()}
    if type(item) in (tuple, list):
        return type(item)(_plain(value) for value in item)
    return item
