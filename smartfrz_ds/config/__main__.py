"""Regenerate the table of settings in a page: `python -m smartfrz_ds.config docs/configuration.md`."""

from __future__ import annotations

import sys
from pathlib import Path

from .table import update_docs

if len(sys.argv) != 2:
    sys.exit("usage: python -m smartfrz_ds.config docs/configuration.md")
target = Path(sys.argv[1])
target.write_text(update_docs(target.read_text(encoding="utf-8")), encoding="utf-8")
