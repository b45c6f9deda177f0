"""Entry point for Axolotl: a plugin that adds the callback to the trainer that Axolotl builds. Only Axolotl imports this module.

plugins:
  - smartfrz_ds.integrations.axolotl.FreezePlugin
smartfrz:
  policy: linear
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from .transformers import FreezeCallback


class FreezeArgs(BaseModel):
    """The key `smartfrz` of an Axolotl configuration, which Axolotl merges into its own schema.

    Attributes:
        smartfrz: Single settings by name. They take precedence over the "smartfrz" section of the DeepSpeed JSON.
    """

    smartfrz: dict[str, Any] | None = None


class FreezePlugin(BasePlugin):  # type: ignore[misc]
    """Freeze layers in Axolotl's trainers.

    Source:
        axolotl/integrations/base.py: BasePlugin, PluginManager.
    """

    def get_input_args(self) -> str:
        """Return the path of the class whose fields Axolotl accepts in a configuration."""
        return f"{FreezeArgs.__module__}.{FreezeArgs.__name__}"

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the names of the settings before a model is loaded.

        Args:
            cfg: The configuration as it was written.

        Raises:
            TypeError: `smartfrz` is not a mapping.
            ValueError: A setting is unknown.
        """
        FreezeCallback(**_settings(cfg))

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[FreezeCallback]:
        """Return a new callback, which Axolotl adds to this trainer.

        Args:
            cfg: The validated configuration.
            trainer: The trainer that has just been built.
        """
        return [FreezeCallback(**_settings(cfg))]


def _settings(cfg: Any) -> dict[str, Any]:
    """Return the settings under `smartfrz` as plain dicts and lists: Axolotl's are of a class of its own, with None for missing keys."""
    given = cfg.get("smartfrz")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise TypeError(f"smartfrz: got {given!r}; allowed: a mapping of settings, such as {{policy: linear}}")
    return {str(key): _plain(value) for key, value in given.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
