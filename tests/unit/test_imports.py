"""A run without DeepSpeed must not pay for its import (seconds, and a build of its operators where it is missing a compiler)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WITHOUT = {
    "attach_torch": "import smartfrz_ds; smartfrz_ds.attach_torch, smartfrz_ds.TorchController, smartfrz_ds.Controller",
    "settings and events": "import smartfrz_ds; smartfrz_ds.FreezeConfig, smartfrz_ds.read_events, smartfrz_ds.explained",
    "predictor and policies": "import smartfrz_ds.predictor, smartfrz_ds.policies",
}


@pytest.mark.parametrize("statements", WITHOUT.values(), ids=WITHOUT)
def test_deepspeed_is_not_imported_where_it_is_not_used(statements: str) -> None:
    code = f"import sys; {statements}; print([m for m in sys.modules if m.split('.')[0] == 'deepspeed'])"
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"
