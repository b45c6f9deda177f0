"""The checks of launch/gpu_check.sh, one after the other in one launch. Launched by test_launchers.py."""

from __future__ import annotations

import sys

from helpers import ROOT
from workers import ranks

sys.path.append(str(ROOT / "launch"))
import gpu_check


def main() -> None:
    with ranks.job() as (checks, folder):
        rows = []
        for words in checks:
            with ranks.case(" ".join(words)):
                rows.append(gpu_check.row(gpu_check.arguments([*words, "--out", str(folder / "table.md")])))
        ranks.write(folder, "rows", rows)


if __name__ == "__main__":
    main()
