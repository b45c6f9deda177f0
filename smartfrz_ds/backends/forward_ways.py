"""What an engine must be told of forwards in which the prefix cache skips frozen layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import Parameter

#: The modules that a forward runs: all; those behind the frozen prefix; those behind an earlier, shorter one; those behind the prefix, in a
#: forward without a backward.
ForwardKind = Literal["complete", "skip", "carry", "probe"]


class ForwardWays:
    """The part of an engine that must know which modules run. This one is of engines that need not.

    Args:
        refusal: Why the prefix cache can't be used with this engine; "" if it can.

    Attributes:
        communicates: Whether a forward communicates, so that all ranks must run the same modules.
        own_attributes: Names of attributes of modules in which the engine counts.
    """

    communicates = False
    own_attributes: frozenset[str] = frozenset()

    def __init__(self, refusal: str = "") -> None:
        self.refusal = refusal

    def before(self, kind: ForwardKind, skipped: Sequence[nn.Module], *, together: bool) -> None:
        """Prepare a forward of the model.

        Args:
            kind: The modules that it runs.
            skipped: Those modules that it skips, each as large as possible.
            together: Whether all ranks run such a forward now. Else, as in an evaluation, this rank may be alone.
        """

    def after_probe(self) -> None:
        """Forget a forward of kind "probe"."""

    def end(self) -> None:
        """Forget all that skipped modules made necessary: none are skipped from now on."""

    def objection(self, tops: Sequence[nn.Module]) -> str:
        """Return why these modules can't be skipped with this engine; "" if they can."""
        return ""

    def held(self, param: Parameter) -> Tensor:
        """Return the tensor whose address and version counter change when this rank's part of a parameter is written."""
        return param
