"""Shared set-up: tests run on one thread and on the CPU accelerator, like the ranks that they launch."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
