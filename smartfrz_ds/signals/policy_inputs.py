"""Inputs that some policies need beyond sampled weights (gradients, a probe batch, per-layer learning rates), and their check at start."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from smartfrz_ds.backends.base import Backend, SampleRequest
from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.model.layers import Layer
from smartfrz_ds.model.view import Need, layer_infos
from smartfrz_ds.policies import check_needs
from smartfrz_ds.policies.base import Policy, SetsLr

from .gradients import GradientSums
from .lr_scale import LrScale
from .probe import Probe
from .snapshots import Snapshots

_MOST_PROBE = 128  # a policy may store an [inputs, inputs] matrix per layer in its state, which goes into the header of a checkpoint file


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """Facts about the run.

    Attributes:
        total_steps: Steps of the whole run; None if unknown.
        freeze_interval: Steps between two freezing stages.
        keep_active: Names of the layers that no policy may freeze.
        probe_batch: A batch for the model's forward; None if the user gave none.
    """

    total_steps: int | None
    freeze_interval: int
    keep_active: frozenset[str]
    probe_batch: Any = None


class PolicyInputs:
    """Provides what the run's policy needs, and nothing else.

    Args:
        policy: The policy; `needs` names its inputs.
        config: The settings.
        model: The user's model.
        layers: All layers, front to back.
        backend: The backend, which reads weights and gradients.
        snapshots: The snapshots of weights.
        run: Facts about the run.

    Attributes:
        seen: Inputs of the policy's view at a freezing stage, on rank 0: `gradients` and `grams`.

    Raises:
        ValueError: The run cannot provide what the policy needs, or `probe` is set without a fitting batch; names the
            setting.
    """

    def __init__(
        self,
        policy: Policy,
        config: FreezeConfig,
        model: nn.Module,
        layers: Sequence[Layer],
        backend: Backend,
        snapshots: Snapshots,
        run: RunInfo,
    ) -> None:
        self._policy, self._layers, self._backend, self._run = policy, layers, backend, run
        self._interval = run.freeze_interval
        self._probe: Probe | None = None
        self._sums: GradientSums | None = None
        self._scale: LrScale | None = None
        if config.probe is not None and config.policy != "manual":
            if backend.is_pipeline:  # its layers are on different ranks
                raise ValueError(f"smartfrz.probe: got {config.probe}; allowed in a pipeline: null")
            if config.probe > _MOST_PROBE:
                raise ValueError(f"smartfrz.probe: got {config.probe}; allowed: an integer from 2 to {_MOST_PROBE}, or null")
            if run.probe_batch is None:
                raise ValueError(
                    f"smartfrz.probe: got {config.probe}, but no batch was given; allowed: null, or pass probe_batch=… to "
                    "smartfrz_ds.initialize or attach"
                )
            self._probe = Probe(backend.forward_module(model), layers, run.probe_batch, config.probe, backend.device)
        given: set[Need] = {"weights", "gradients", "lr_scale"}
        given -= set(backend.missing)
        why: dict[Need, str] = dict(backend.missing)
        if self._probe is not None:
            given.add("activations")
        if run.total_steps is not None:
            given.add("total_steps")
        if "lr_scale" in policy.needs and "lr_scale" in given and not config.dry_run:
            try:
                self._scale = LrScale(backend.base_optimizer(), backend.param_groups, layers)
            except ValueError as error:
                given.remove("lr_scale")
                why["lr_scale"] = str(error)
        check_needs(policy, given, why)
        if self._scale is not None:
            self._scale.start()
        if "gradients" in policy.needs:
            names = [layer.name for layer in layers]
            self._sums = GradientSums(names, snapshots.requests, config.sample_size, backend.device, backend.loss_scale_on_device)
        self._spent: dict[str, float] = {}
        self.seen: dict[str, Mapping[str, Tensor]] = {}

    def try_probe(self) -> None:
        """Run the probe batch once, so that an unsuitable batch is found before training. A forward of the engine, as `run_probe`.

        Raises:
            ValueError: The model's forward does not accept `probe_batch`.
        """
        if self._probe is None:
            return
        try:
            self._probe.grams(keep=False)
        except Exception as error:
            raise ValueError(f"probe_batch: the model's forward does not accept it ({type(error).__name__}: {error})") from error

    # --- in every step
    # ---------------------------------------------------------------------------------------------------

    def before_step(self, step: int) -> None:
        """Prepare for the optimizer step that follows `step` steps."""
        if self._sums is not None and step % self._interval == 0:  # an interval has ended, whether or not it led to a freezing stage
            self._sums.restart()
        if self._scale is not None and isinstance(self._policy, SetsLr):
            self._scale.set(self._policy.lr_scales(step, self._run.total_steps, layer_infos(self._layers), self._run.keep_active))

    def end_step(self, *, applied: bool) -> None:
        """Finish a step that the optimizer has taken (`applied`) or skipped."""
        if self._sums is not None:
            self._sums.end_step(applied=applied)
        if self._scale is not None and applied:
            for name, lr in self._scale.rates.items():
                self._spent[name] = self._spent.get(name, 0.0) + lr

    def lr_spent(self, schedule: float) -> float | Mapping[str, float]:
        """Return the sum of the learning rates of all steps so far.

        Args:
            schedule: That sum according to the schedule.

        Returns:
            A sum for each layer if learning rates are scaled per layer, else `schedule`.
        """
        return schedule if self._scale is None else {info.name: self._spent.get(info.name, 0.0) for info in layer_infos(self._layers)}

    # --- at a freezing stage --------------------------------------------------------------------------------------------------

    def gather(self, active: Collection[str]) -> None:
        """Fill `seen`, except for the probe. Collective if there is anything to gather.

        Args:
            active: Names of the layers whose gradients are wanted.
        """
        if self._sums is not None:
            self.seen["gradients"] = self._sums.take(active)

    @property
    def has_probe(self) -> bool:
        """Whether the policy's inputs include the outputs of a probe batch."""
        return self._probe is not None

    def run_probe(self) -> None:
        """Run the probe batch, and add its outputs to `seen`, on all ranks together. A forward of the engine: it can fail on one rank."""
        if self._probe is not None:
            self.seen["grams"] = self._probe.grams(keep=self._backend.rank == 0)

    def remove(self) -> None:
        """Remove all hooks."""
        if self._sums is not None:
            self._sums.remove()
        if self._scale is not None:
            self._scale.remove()

    def regroup(self) -> None:
        """Update the parameter groups after layers that the user had frozen have joined or left them.

        Raises:
            ValueError: Learning rates are scaled per layer and a group now contains weights of several layers.
        """
        if self._scale is not None:
            try:
                self._scale.regroup(self._backend.param_groups, self._layers)
            except ValueError as error:
                raise ValueError(
                    f"thaw: policy {self._policy.name!r} scales learning rates per layer and needs {error}. A layer that required no "
                    "gradient at the start has no group of its own; allowed: leave it trainable at the start and call freeze for it before "
                    "the first step, or use another policy"
                ) from error

    def watch(self, requests: Sequence[Sequence[SampleRequest]]) -> None:
        """Update the sampled weights after a change of the layout, which may have added layers that the user had frozen.

        Args:
            requests: The sampled weights of each layer.
        """
        if self._sums is not None:
            self._sums.watch(requests)

    def thawed(self, names: Collection[str]) -> None:
        """Record that the layers `names` train again."""
        if self._sums is not None:
            self._sums.forget(names)

    # --- checkpoints ----------------------------------------------------------------------------------------------------------

    def sync_for_checkpoint(self) -> None:
        """Reduce to rank 0 what the ranks hold separately. Collective; call before saving a state."""
        if self._sums is not None:
            self._sums.sync_for_checkpoint()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-able data; complete on rank 0 after `sync_for_checkpoint`."""
        return {"gradients": None if self._sums is None else self._sums.state_dict(), "lr_spent": dict(self._spent)}

    def restart(self, policy: Policy) -> None:
        """Discard everything gathered so far, for another policy of the same kind."""
        self._policy = policy
        self.load_state_dict({})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore rank 0's state on every rank; an empty one starts over."""
        if self._sums is not None:
            self._sums.load_state_dict(state.get("gradients"))
        self._spent = {name: float(lr) for name, lr in state.get("lr_spent", {}).items()}
