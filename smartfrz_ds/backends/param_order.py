"""The order of the parameters in a parameter group."""

from __future__ import annotations

from collections.abc import Mapping

from torch.nn import Parameter


def insert_in_order(group: list[Parameter], param: Parameter, order: Mapping[Parameter, int]) -> None:
    """Insert `param` in front of the first parameter of `group` that follows it in the model. order: positions in the model."""
    place = order[param]
    at = next((k for k, other in enumerate(group) if order.get(other, -1) > place), len(group))
    group.insert(at, param)
