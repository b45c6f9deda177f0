"""The `manual` policy: nobody decides; `engine.smartfrz.freeze(names)` does."""

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
        return Decision()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
