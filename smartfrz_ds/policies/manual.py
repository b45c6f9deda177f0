"""The `manual` policy: only `engine.smartfrz.freeze(names)` freezes layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smartfrz_ds.model.view import Need, View

from .base import Decision


class ManualPolicy:
    """Never freezes anything by itself."""

    name = "manual"
    needs: frozenset[Need] = frozenset()

    def decide(self, view: View) -> Decision:
        """Return an empty decision."""
        return Decision()

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: there is no state."""
