"""A small batch that runs through the model at each freezing stage, to compare each layer's output with earlier ones.

All ranks run the forward together, because ZeRO-3 gathers the weights for it; rank 0 keeps an [inputs, inputs] matrix
per layer. The forward runs in eval mode without gradients, and leaves the model's modes, random states, gradients and
weights unchanged. Hooks that count FLOPs, check the order or keep a boundary open for recomputation are inactive
meanwhile.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from smartfrz_ds.distributed.devices import own_random_numbers
from smartfrz_ds.model.layers import Layer
from smartfrz_ds.predictor.similarity import centered_gram, probe_rows


class Probe:
    """Runs a probe batch and computes the Gram matrices of the layers' outputs.

    Args:
        model: The model, whose forward accepts the batch.
        layers: All layers.
        batch: A tensor, a tuple or list of positional arguments, or a mapping of keyword arguments. Tensors are cut
            to `inputs` rows along their first dimension.
        inputs: Number of inputs.
        device: Where the batch is moved to.

    Raises:
        ValueError: The batch contains no tensor, or a tensor with fewer than `inputs` rows.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], batch: Any, inputs: int, device: torch.device) -> None:
        self._model, self._layers, self._inputs = model, layers, inputs
        self._args, self._kwargs = _arguments(_cut(batch, inputs, device))

    def grams(self, keep: bool) -> dict[str, Tensor]:
        """Run the forward and compute the centered Gram matrix of each layer's output. Collective.

        The output of a layer is that of its module that ran last: the tensor, or the first one in what the module
        returns. Rows are the inputs; for sequences, (inputs, tokens, features), two tokens of each input
        (`probe_rows`).

        Args:
            keep: Whether this rank needs the matrices.

        Returns:
            For each layer whose output has one row per input, (rows, rows) fp64 on the host; an empty dict if `keep`
            is False.
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
    """Run the body in eval mode; restore each module's mode and all random states afterwards."""
    modes = {module: module.training for module in model.modules()}
    here, numbers = random.getstate(), np.random.get_state()
    devices = dict.fromkeys(p.device for p in model.parameters() if p.device.type not in ("cpu", "meta"))
    with ExitStack() as stack:
        for device in (torch.device("cpu"), *devices):
            stack.enter_context(own_random_numbers(device))
        for module in modes:
            module.training = False  # not train(False), with which some modules do more, such as merging weights
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
            f"smartfrz.probe: got {inputs}, but probe_batch contains a tensor of shape {short[0]}; allowed: at most its first dimension"
        )
    return tree_map(lambda x: x[:inputs].to(device) if isinstance(x, Tensor) and x.ndim > 0 else x, _plain(batch))


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})


def _plain(item: Any) -> Any:
    """Convert mappings that torch's pytree does not know (ModelOutput, BatchEncoding) to dicts."""
    if isinstance(item, Mapping):
        return {key: _plain(value) for key, value in item.items()}
    if type(item) in (tuple, list):
        return type(item)(_plain(value) for value in item)
    return item
