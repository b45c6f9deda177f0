"""Installs releases of DeepSpeed into folders, runs the cells of cells.py with each, and prints a table. See docs/versions.md.

    ./tests/run.sh --versions                 the default releases, all groups
    ./tests/run.sh --versions 0.18.9 0.19.2   these only
    ./tests/run.sh --versions --quick …       only the exactness cells
    ./tests/run.sh --versions --fresh …       once more what an earlier call has finished
    ./tests/run.sh --versions --table         only the table of what is finished

A release takes two to five minutes. An interrupted call goes on where it was: each group of cells is kept when it is finished. Exit code 1
if a cell has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
RELEASES = ("0.16.4", "0.16.9", "0.17.6", "0.18.6", "0.18.9", "0.19.2", "0.19.6")
GROUPS = ("stage 0", "stage 1", "stage 2", "stage 3", "offload", "BF16_Optimizer", "checkpoints", "universal", "pipelines")
QUICK = GROUPS[:4]
WORDS = ("passed", "as unfrozen", "not supported", "DeepSpeed", "failed")


def cache() -> Path:
    """The folder of the releases and their results, in the environment."""
    return Path(os.environ.get("SMARTFRZ_VERSIONS", Path(sys.prefix) / "deepspeed_versions"))


def install(release: str) -> Path:
    """The folder of a release, made if it is missing. The environment itself does not change."""
    folder = cache() / release
    if not (folder / "deepspeed" / "__init__.py").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder)]
        subprocess.run([*command, f"deepspeed=={release}"], check=True, env=os.environ | {"DS_BUILD_OPS": "0"})
    return folder


def run(release: str, groups: list[str]) -> None:
    """Run groups of cells with a release. Its extensions are built apart: two releases would build the same one in turns."""
    folder = install(release)
    path = [str(folder), str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([sys.executable, str(TESTS / "versions" / "cells.py"), str(results_of(release)), *groups], env=environment, check=False)


def results_of(release: str) -> Path:
    return cache() / f"{release}.json"


def finished(release: str) -> dict[str, dict[str, list[str]]]:
    """The verdicts by group and cell."""
    file = results_of(release)
    return json.loads(file.read_text()) if file.exists() else {}


def entry(verdicts: dict[str, list[str]]) -> str:
    """The verdicts of a group: how many cells have which."""
    counts = Counter(verdict for verdict, _ in verdicts.values())
    return ", ".join(f"{counts[word]} {word}" for word in WORDS if counts[word])


def table(releases: list[str]) -> str:
    """A Markdown table: releases by groups of cells."""
    lines = ["| DeepSpeed | " + " | ".join(GROUPS) + " |", "| --- " * (len(GROUPS) + 1) + "|"]
    for release in releases:
        done = finished(release)
        lines.append(f"| {release} | " + " | ".join(entry(done[g]) if g in done else "-" for g in GROUPS) + " |")
    return "\n".join(lines)


def reasons(releases: list[str]) -> list[str]:
    """Why cells did not pass, each reason once."""
    found: dict[str, list[str]] = {}
    for release in releases:
        for group, verdicts in finished(release).items():
            for cell, (verdict, why) in verdicts.items():
                if verdict != "passed":
                    found.setdefault(f"{verdict}: {why}", []).append(f"{release} {group} {cell}")
    return [f"{', '.join(where)}: {why}" for why, where in found.items()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/run.sh --versions", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("releases", nargs="*", default=list(RELEASES), metavar="X", help=f"default: {' '.join(RELEASES)}")
    parser.add_argument("--quick", action="store_true", help="only the exactness cells")
    parser.add_argument("--fresh", action="store_true", help="run finished groups again")
    parser.add_argument("--table", action="store_true", help="only print what is finished")
    given = parser.parse_args()
    groups = QUICK if given.quick else GROUPS
    cache().mkdir(parents=True, exist_ok=True)
    for release in given.releases if not given.table else ():
        if given.fresh:
            results_of(release).unlink(missing_ok=True)
        if missing := [g for g in groups if g not in finished(release)]:
            print(f"DeepSpeed {release}: {', '.join(missing)}", flush=True)
            run(release, missing)
    print(table(given.releases))
    for line in reasons(given.releases):
        print(f"- {line}")
    if given.table:
        return 0
    done = [finished(release) for release in given.releases]
    failed = any(verdict == "failed" for found in done for cells in found.values() for verdict, _ in cells.values())
    return int(failed or any(g not in found for found in done for g in groups))


if __name__ == "__main__":
    sys.exit(main())
