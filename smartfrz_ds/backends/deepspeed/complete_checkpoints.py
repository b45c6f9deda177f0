"""Makes DeepSpeed's checkpoints complete although layers are frozen.

Private attributes of DeepSpeed used here:
  runtime/engine.py   _load_checkpoint, _load_zero_checkpoint (bf16 without ZeRO), _common_checkpoint_state or, before 0.19.3,
                      _save_checkpoint (stage 1 leaves frozen parameters out of the file), _get_zero_param_shapes, param_names,
                      module_state_dict, load_module_state_dict, _get_zero_frozen_param_attributes, _get_param_shape_func,
                      _get_param_fragment_func, FreezingMixin's super() calls (integrations/deepspeed.py)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch.nn import Parameter

from smartfrz_ds.backends.deepspeed.flat.backend import PLACEHOLDER

from . import names

EMPTY: Mapping[str, Any] = MappingProxyType({})


class CompleteCheckpoints:
    """The part of a freezing engine that saves every weight, so that zero_to_fp32.py finds the whole model.

    With `exclude_frozen_parameters` (which the Trainer sets for PEFT models), parameters that the user froze are left out; those that this
    package froze are not.
    """

    _left_out: Collection[str] = ()  # names, during a save

    @contextmanager
    def _leaving_out(self, wanted: bool) -> Iterator[bool]:
        """Prepare a save, which is the block.

        Yields:
            The value of `exclude_frozen_parameters` for DeepSpeed.
        """
        ours: Collection[Parameter] = self.smartfrz.backend.frozen  # type: ignore[attr-defined]
        trainable = [p for p in ours if p.requires_grad]  # after `detach`; DeepSpeed reads the flag
        if wanted and ours:
            named = self.module.named_parameters()  # type: ignore[attr-defined]
            self._left_out = {n for n, p in named if not p.requires_grad and p not in ours}
        for param in trainable:
            param.requires_grad_(False)
        try:
            yield wanted and not ours
        finally:
            self._left_out = ()
            for param in trainable:
                param.requires_grad_(True)

    def module_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Call DeepSpeedEngine.module_state_dict, without the parameters that are left out."""
        state = super().module_state_dict(*args, **kwargs)  # type: ignore[misc]
        for name in self._left_out:
            state.pop(name, None)
        return state

    def _get_zero_frozen_param_attributes(self, attr_func: Any) -> Any:
        found = super()._get_zero_frozen_param_attributes(attr_func)  # type: ignore[misc]
        for name in self._left_out:
            found.pop(name, None)
        return found

    def load_module_state_dict(self, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        """Call DeepSpeedEngine.load_module_state_dict. Parameters that were left out of the checkpoint keep their values."""
        fragments = checkpoint.get("frozen_param_fragments")
        if fragments is not None:  # the current values of parameters that were left out: DeepSpeed looks for all
            for param, name in self.param_names.items():  # type: ignore[attr-defined]
                if not param.requires_grad and name not in fragments:
                    fragments[name] = self._get_param_fragment_func(param)  # type: ignore[attr-defined]
        return super().load_module_state_dict(checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _common_checkpoint_state(self, module_state_dict: Any, zero_optimizer_state: Any, save_frozen_param: bool) -> Any:
        # _save_checkpoint asks for the frozen parameters in stages 2 and 3 only, unless the user excludes them.
        if zero_optimizer_state and not save_frozen_param and isinstance(module_state_dict, Mapping):
            named = self.module.named_parameters()  # type: ignore[attr-defined]
            left = [n for n, p in named if not p.requires_grad and n not in self._left_out]
            save_frozen_param = bool(left) and all(n in module_state_dict for n in left)
        return super()._common_checkpoint_state(module_state_dict, zero_optimizer_state, save_frozen_param)  # type: ignore[misc]

    def _save_checkpoint(
        self, save_dir: str, tag: str, client_state: Mapping[str, Any] = EMPTY, exclude_frozen_parameters: bool = False
    ) -> Any:
        engine: Any = self
        more: dict[str, Any] = {}
        # A pipeline's layers have files of their own.
        stage1 = (
            engine.zero_optimization() and not engine.zero_optimization_partition_gradients() and not isinstance(engine, PipelineEngine)
        )
        if stage1 and not exclude_frozen_parameters and not names.has_common_checkpoint_state(engine):
            # this method builds the file itself, and adds the client's entries last
            more["frozen_param_shapes"] = self._get_zero_frozen_param_attributes(engine._get_param_shape_func)
            more["frozen_param_fragments"] = self._get_zero_frozen_param_attributes(engine._get_param_fragment_func)
        return super()._save_checkpoint(  # type: ignore[misc]
            save_dir, tag, client_state={**client_state, **more}, exclude_frozen_parameters=exclude_frozen_parameters
        )

    def _load_checkpoint(self, load_dir: str, tag: str, *args: Any, **kwargs: Any) -> Any:
        """Load a BF16_Optimizer without ZeRO (a pipeline in bf16) from its own files, as for ZeRO-1.

        DeepSpeed 0.19.8 writes its partitions as ZeRO's, and then passes it the copy in the model file, which it cannot load (KeyError: 0).
        """
        engine: Any = self
        if not isinstance(engine.optimizer, BF16_Optimizer) or engine.zero_optimization():
            return super()._load_checkpoint(load_dir, tag, *args, **kwargs)  # type: ignore[misc]
        wanted = kwargs.get("load_optimizer_states", True) and not kwargs.get("load_module_only", False)
        path, client_state = super()._load_checkpoint(load_dir, tag, *args, **{**kwargs, "load_optimizer_states": False})  # type: ignore[misc]
        if path is not None:
            client_state.pop("optimizer", None)
            if not wanted or not engine._load_zero_checkpoint(load_dir, tag):
                engine.optimizer._restore_from_bit16_weights()
        return path, client_state

    def _get_zero_param_shapes(self) -> Any:
        shapes = super()._get_zero_param_shapes()  # type: ignore[misc]
        for group in shapes:
            for name in [n for n in group if n.startswith(PLACEHOLDER)]:
                del group[name]
        return shapes
