"""Runs an unmodified script with freezing: `deepspeed --module smartfrz_ds train.py …` or `python -m smartfrz_ds train.py …`.

In this process deepspeed.initialize returns freezing engines. The settings come from the script's own DeepSpeed JSON.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

USAGE = "usage: deepspeed --module smartfrz_ds [--local_rank=N] SCRIPT.py [the script's arguments]"


def split_arguments(arguments: list[str]) -> tuple[str, list[str]]:
    """Split the command line into the script and its arguments.

    The launcher passes `--local_rank=N` before the script; scripts expect it among their arguments.

    Raises:
        ValueError: There is no script, or its file does not exist.
    """
    front: list[str] = []
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        front.append(rest.pop(0))
        if front[-1] in ("--local_rank", "--local-rank") and rest:
            front.append(rest.pop(0))
    if not rest:
        raise ValueError(f"no script given. {USAGE}")
    script = rest.pop(0)
    if not Path(script).is_file():
        raise ValueError(f"script {script!r} not found. {USAGE}")
    return script, front + rest


def main() -> None:
    """Run the script as `__main__`, with the hook on deepspeed.initialize installed."""
    try:
        script, arguments = split_arguments(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"smartfrz_ds: {error}")
    from smartfrz_ds.integrations.initialize_hook import (
        install_hook,  # here: errors in the arguments are reported without importing DeepSpeed
    )

    install_hook()
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)  # as if Python had been started with the script
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
