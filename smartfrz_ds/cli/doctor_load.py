"""`smartfrz doctor --model`: build the model that the user names, and say what to do where that fails."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

TOKENS = 128
"""Length of the text for which a Hugging Face model's FLOPs are counted."""

_HOW = "pass MODULE:CALLABLE, importable from the current folder, or a folder written by save_pretrained"


class NotBuilt(ValueError):
    """A model that cannot be built.

    Attributes:
        remedy: What to do.
    """

    def __init__(self, text: str, remedy: str) -> None:
        super().__init__(text)
        self.remedy = remedy


def load_model(name: str) -> tuple[nn.Module, Any]:
    """Build a model.

    Args:
        name: MODULE:CALLABLE, which is called without arguments and returns a module, or a module and the input of its forward; or the name
            or folder of a Hugging Face model, which is built on the meta device, without weights.

    Returns:
        The model, and the input of its forward; None where there is none.

    Raises:
        NotBuilt: The model cannot be built.
    """
    module, colon, function = name.rpartition(":")
    if colon and not Path(name).exists():
        return _called(name, _imported(name, module, function))
    return _from_config(name)


def _imported(name: str, module: str, function: str) -> Callable[[], Any]:
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            text = f"--model {name}: there is no module {error.name!r} in {os.getcwd()} or in this environment"
            raise NotBuilt(text, "start the doctor in the folder of the script, or pass a folder written by save_pretrained") from error
        raise NotBuilt(f"--model {name}: {module} imports {error.name!r}, which is not installed", f"pip install {error.name}") from error
    except AttributeError as error:
        known = ", ".join(key for key, value in vars(sys.modules[module]).items() if callable(value) and value.__module__ == module)
        raise NotBuilt(f"--model {name}: {error}", f"functions and classes of {module}: {known or 'none'}") from error
    except Exception as error:
        raise NotBuilt(
            f"--model {name}: importing {module} failed: {_short(error)}", f"python -c 'import {module}' shows it whole"
        ) from error
    if isinstance(found, nn.Module):
        raise NotBuilt(f"--model {name}: {function} is a model", f"pass a function that returns it: def build(): return {function}")
    if not callable(found):
        raise NotBuilt(f"--model {name}: {function} is a {type(found).__name__}", _HOW)
    return found


def _called(name: str, function: Callable[[], Any]) -> tuple[nn.Module, Any]:
    try:
        made = function()
    except Exception as error:
        needs = isinstance(error, TypeError) and "required positional argument" in str(error)
        remedy = "pass a function that takes no arguments" if needs else "mend it, or pass a function that needs no data and no network"
        raise NotBuilt(f"--model {name}: it raised {_short(error)}", remedy) from error
    model, batch = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        text = f"--model {name}: it returned {type(made).__name__}; expected a torch.nn.Module, or a pair of a module and its input"
        raise NotBuilt(text, "return the model")
    return model, batch


def _from_config(name: str) -> tuple[nn.Module, Any]:
    import transformers

    local = Path(name)
    if not local.is_dir() and (local.is_absolute() or name.startswith((".", "~")) or local.exists()):
        raise NotBuilt(f"--model {name}: there is no such folder", _HOW)
    if local.is_dir() and not (local / "config.json").is_file():
        raise NotBuilt(f"--model {name}: there is no config.json in it", "pass a folder written by save_pretrained")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], None)
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config) if kind in (None, transformers.AutoModel) else kind(config)
    except Exception as error:
        raise NotBuilt(f"--model {name}: {_short(error)}", _HOW) from error
    return model, {"input_ids": torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")}


def _short(error: Exception) -> str:
    """One line: the kind of an error, its text, and the user's line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"
