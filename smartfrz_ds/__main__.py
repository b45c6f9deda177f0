"""Run somebody's script with freezing on: `deepspeed --module smartfrz_ds train.py …` or `python -m smartfrz_ds train.py …`.

For the length of this process deepspeed.initialize returns freezing engines; settings come from the script's own DeepSpeed JSON.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

USAGE = "usage: deepspeed --module smartfrz_ds [--local_rank=N] SCRIPT.py [the script's arguments]"


def split_arguments(arguments: list[str]) -> tuple[str, list[str]]:
    """The script and its arguments. The launcher puts `--local_rank=N` in front of the script; scripts expect it behind.

    Raises:
        ValueError: no script, or one that isn't there.
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
    try:
        script, arguments = split_arguments(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"smartfrz_ds: {error}")
    from smartfrz_ds.integrations.initialize_hook import install_hook  # here: what is wrong with the arguments is said at once

    install_hook()
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)  # as if Python had been started with the script
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
