"""Engines of a DeepSpeed or a torch that nobody has tested: what the start says, and what it starts. Launched by test_selfcheck.py."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from typing import Any

from packaging.specifiers import SpecifierSet
from workers import ranks
from workers.worker_refusals import base, plain

import smartfrz_ds
from smartfrz_ds.config.versions import TESTED

#: A DeepSpeed in which a method that is called again after a freeze also clears the first moments.
CLEARS = """
import sys
if any("selfcheck.toy" in word for word in sys.orig_argv):
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Zero
    own = Zero._enable_universal_checkpoint
    def clearing(self):
        own(self)
        for entries in self.optimizer.state.values():
            if "exp_avg" in entries:
                entries["exp_avg"].zero_()
    Zero._enable_universal_checkpoint = clearing
"""


def start(setting: str = "check") -> dict[str, Any]:
    raw = base(2)
    raw["smartfrz"] |= {"untested_versions": setting}
    engine, began, said = plain(raw), time.monotonic(), ""
    try:
        smartfrz_ds.attach(engine)
        warned = [w for w in engine.smartfrz.backend.warnings if "not among the tested" in w]
    except ValueError as error:
        said, warned = str(error), []
    engine.destroy()
    return {"said": said, "warned": warned, "seconds": time.monotonic() - began}


def main() -> None:
    with ranks.job() as (_, folder):
        nothing = SpecifierSet("==0.1")
        own, TESTED["torch"] = TESTED["torch"], nothing
        out = {}
        scratch = folder / "scratch"
        scratch.mkdir(exist_ok=True)
        tempfile.tempdir = str(scratch)
        os.environ["SMARTFRZ_CACHE_DIR"] = str(folder / "cache")
        out["checked"] = start()
        os.environ["SMARTFRZ_SELFCHECK_SECONDS"] = "0.01"  # a process that began now would be ended at once
        out["again"] = start()
        os.environ["SMARTFRZ_CACHE_DIR"] = str(folder / "another")
        out["no time"] = start()
        out["no time, again"] = start()
        out["allowed"] = start("allow")
        TESTED["deepspeed"] = nothing
        out["refused"] = start("refuse")
        TESTED["torch"] = own
        del os.environ["SMARTFRZ_SELFCHECK_SECONDS"]
        broken = folder / "broken"
        broken.mkdir(exist_ok=True)
        (broken / "sitecustomize.py").write_text(CLEARS)
        sys.path.insert(0, str(broken))
        out["broken"] = start()
        os.environ["SMARTFRZ_SELFCHECK_SECONDS"] = "0.01"
        out["broken, again"] = start()
        left = [p.name for p in scratch.iterdir()]
        ranks.write(folder, "out", out | {"left": left})


if __name__ == "__main__":
    main()
