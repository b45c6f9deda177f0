"""Print the table of all settings; with a page, update the defaults in it: `python -m smartfrz_ds.config docs/configuration.md`."""

from __future__ import annotations

import sys
from pathlib import Path

from .table import to_markdown, update_docs

if len(sys.argv) > 2:
    sys.exit("usage: python -m smartfrz_ds.config [docs/configuration.md]")
if len(sys.argv) == 1:
    print(to_markdown(), end="")
else:
    target = Path(sys.argv[1])
    target.write_text(update_docs(target.read_text(encoding="utf-8")), encoding="utf-8")
