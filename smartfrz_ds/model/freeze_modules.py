"""What freezing a layer means for its modules, and which of its weights leave the optimizer.

Independent of the engine: the backend removes the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from .layers import Layer, shape_of

TiedMode = Literal["train", "freeze"]
FrozenMode = Literal["eval", "train"]


def check_tied(layers: Sequence[Layer], tied: TiedMode) -> None:
    """Refuse, at start, shared weights whose use cannot be cut out of backward separately.

    With tied == "train", the front layer's use of a shared weight is cut at the module that owns it. This affects
    nothing else only if the module's input carries no gradient, as in embeddings (integer input).

    Args:
        layers: All layers.
        tied: The setting `smartfrz.tied`.

    Raises:
        ValueError: A shared weight has another kind of owner.
    """
    if tied == "freeze":
        return
    for layer in layers:
        cut = {id(p) for leaf in _tied_embeddings(layer) for p in leaf.parameters(recurse=False)}
        stuck = [p for p in layer.tied if id(p) not in cut]
        if stuck:
            raise ValueError(
                f"smartfrz.tied: got 'train', but layer {layer.name!r} shares a weight of shape {shape_of(stuck[0])} with a later layer "
                "outside an embedding, and only an embedding's use of a weight can be cut out of backward; allowed here: 'freeze'"
            )


def freeze_modules(layer: Layer, mode: FrozenMode = "eval", tied: TiedMode = "train") -> None:
    """Make the layer's modules behave as frozen. Idempotent.

    `requires_grad`, gradients and the optimizer are left to the backend. What is added to the modules adds no key to
    state_dict, and is pickled and copied with them.

    Args:
        layer: The layer to freeze.
        mode: "eval": no dropout and no update of running statistics, also after model.train(); "train": modules are
            unchanged.
        tied: "train": an embedding's use of a shared weight is cut out of backward, so that only the other users
            train it.
    """
    before = {module: hook for top in layer.modules for module, hook in _remove_hooks(top).items()}
    for top in layer.modules if mode == "eval" else ():
        was_training, own_eval = top.training, {}
        for module in top.modules():
            own_eval[module] = before[module].own_eval if module in before else was_training and not module.training
        top.eval()
        for module in own_eval:
            vars(module)["train"] = _StayEval(module, own_eval[module])
    for leaf in _tied_embeddings(layer) if tied == "train" else ():
        leaf.register_forward_hook(_cut_use)


def thaw_modules(layer: Layer, training: bool = True) -> None:
    """Undo `freeze_modules`.

    Args:
        layer: The layer to thaw.
        training: The flag of the whole model (`model.training`), which the layer's modules take again. Modules that
            were in eval on their own before the freeze stay so.
    """
    for top in layer.modules:
        thaw_module(top, training)


def thaw_module(top: nn.Module, training: bool = True) -> None:
    """Undo `freeze_modules` for one module of a layer and its submodules.

    Args:
        top: The module.
        training: As in `thaw_modules`.
    """
    for module, hook in _remove_hooks(top).items():
        module.training = training and not hook.own_eval


def remember_modules(tops: Iterable[nn.Module]) -> Callable[[], None]:
    """Return the action that brings flags and hooks of these modules, and of those in them, back to what they are now."""
    modules = dict.fromkeys(m for top in tops for m in top.modules())
    before = [(m, m.training, _stays_eval(m), list(m._forward_pre_hooks.items()), list(m._forward_hooks.items())) for m in modules]

    def restore() -> None:
        for module, training, stays_eval, pre_hooks, hooks in before:
            module.training = training
            if stays_eval is not None:
                vars(module)["train"] = stays_eval
            elif _stays_eval(module) is not None:
                del vars(module)["train"]
            for held, items in ((module._forward_pre_hooks, pre_hooks), (module._forward_hooks, hooks)):
                held.clear()  # in place: the handles of hooks know the dictionary
                held.update(items)

    return restore


def thawed_flags(top: nn.Module, training: bool = True) -> list[bool]:
    """Return the flags that `thaw_module` would set. Changes nothing.

    Args:
        top: The module.
        training: As in `thaw_modules`.

    Returns:
        `training` of the module and its submodules, in the order of `top.modules()`.
    """
    flags = []
    for module in top.modules():
        hook = _stays_eval(module)
        flags.append(module.training if hook is None else training and not hook.own_eval)
    return flags


def leaving_params(frozen: Collection[Layer], layers: Sequence[Layer], tied: TiedMode) -> tuple[nn.Parameter, ...]:
    """Return the parameters that must leave the optimizer (and stop training) when exactly the layers `frozen` are frozen.

    Args:
        frozen: The frozen layers.
        layers: All layers.
        tied: "train": a shared weight stays while a layer that uses it is active; "freeze": it leaves with its front
            layer.

    Returns:
        Parameters in the model's order.
    """
    still_used = {id(p) for layer in layers if layer not in frozen for p in layer.borrowed} if tied == "train" else set()
    return tuple(p for layer in layers if layer in frozen for p in (*layer.params, *layer.copies) if id(p) not in still_used)


def use_is_cut(module: nn.Module) -> bool:
    """Return whether this embedding belongs to a frozen layer and its use of a shared weight is cut out of backward."""
    return any(hook is _cut_use for hook in module._forward_hooks.values())


class _StayEval:
    """Replaces `train` of one module of a frozen layer, so that model.train() leaves it in eval mode. Costs nothing in a forward.

    nn.Module.train calls `train` of each child, and nn.Module.eval is train(False). A class, so that it can be found again
    in a pickled or copied model.
    """

    def __init__(self, module: nn.Module, own_eval: bool) -> None:
        self._module = module
        self.own_eval = own_eval  # the user had put this module, but not the layer, into eval mode

    def __call__(self, mode: bool = True) -> nn.Module:
        return self._module


def _stays_eval(module: nn.Module) -> _StayEval | None:
    found = vars(module).get("train")
    return found if isinstance(found, _StayEval) else None


def _cut_use(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.detach()


def _remove_hooks(top: nn.Module) -> dict[nn.Module, _StayEval]:
    # Handles do not survive a copy of the model; torch/nn/modules/module.py keeps the hooks in this dict.
    removed = {}
    for module in top.modules():
        if (hook := _stays_eval(module)) is not None:
            removed[module] = hook
            del vars(module)["train"]
        for key in [k for k, hook in module._forward_hooks.items() if hook is _cut_use]:
            del module._forward_hooks[key]
    return removed


def _tied_embeddings(layer: Layer) -> list[nn.Module]:
    shared = {id(p) for p in (*layer.tied, *layer.borrowed)}
    return [
        m
        for top in layer.modules
        for m in top.modules()
        if isinstance(m, nn.Embedding | nn.EmbeddingBag) and any(id(p) in shared for p in m.parameters(recurse=False))
    ]
