"""Any model, any plan of freezes and thaws, any engine configuration: the run equals the single process, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import run_worker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.oracle import Cell, reference
from safetensors.torch import load_file

STEPS = 8


@st.composite
def cells(draw: st.DrawFn) -> Cell:
    """A cell without clipping, so that equality is exact."""
    stage = draw(st.sampled_from([0, 1, 2, 3]))
    zero: dict[str, Any] = {"reduce_bucket_size": draw(st.sampled_from([200, 3000, 100_000]))}
    if stage in (1, 2):
        zero |= draw(st.fixed_dictionaries({}, optional={"round_robin_gradients": st.just(True), "overlap_comm": st.just(True)}))
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = draw(st.sampled_from([0, 100, 10**5]))
        zero["sub_group_size"] = draw(st.sampled_from([100, 1000, 10**9]))
        zero["stage3_prefetch_bucket_size"] = draw(st.sampled_from([0, 500, 10**6]))
    if stage and draw(st.booleans()):
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {"zero_optimization": zero}
    dtype = draw(st.sampled_from(["fp32", "bf16"]))
    if stage == 1 and dtype == "bf16" and "offload_optimizer" not in zero and draw(st.booleans()):
        zero.pop("round_robin_gradients", None)
        config["data_types"] = {"grad_accum_dtype": "fp32"}  # BF16_Optimizer
    if stage == 3:
        config["smartfrz"] = {"zero3": {"frozen": draw(st.sampled_from(["sharded", "replicated", "auto"]))}}
    blocks = draw(st.integers(2, 5))
    return Cell(
        name="drawn",
        stage=stage,
        dtype=dtype,
        accumulation=draw(st.sampled_from([1, 2])),
        groups=draw(st.sampled_from([1, 2])),
        keep_state=draw(st.sampled_from([0, 100])),
        steps=STEPS,
        plan=draw(plans(["embeddings", *(f"blocks.{i}" for i in range(blocks))])),
        config=config,
        width=draw(st.sampled_from([5, 8, 16])),
        blocks=blocks,
    )


@st.composite
def plans(draw: st.DrawFn, layers: list[str]) -> dict[str, list[Any]]:
    """Freezes of active layers and thaws of frozen ones at some of the steps; the head always trains."""
    frozen: set[str] = set()
    plan: dict[str, list[Any]] = {}
    for step in sorted(draw(st.sets(st.integers(0, STEPS - 1), max_size=4))):
        active = [x for x in layers if x not in frozen]
        thaws = bool(frozen) and (not active or draw(st.booleans()))
        pool = sorted(frozen) if thaws else active
        chosen = draw(st.lists(st.sampled_from(pool), min_size=1, unique=True))
        plan[str(step)] = ["thaw" if thaws else "freeze", chosen]
        frozen = frozen - set(chosen) if thaws else frozen | set(chosen)
    return plan


class Server:
    """Two ranks that run cells (worker_serve.py)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            run_worker("serve", None, self.folder, timeout=1000)
        except AssertionError as error:
            (self.folder / "died").write_text(str(error))

    def run(self, cell: Cell) -> Path:
        """The stem of the result's files."""
        part = self.folder / "job.part"
        part.write_text(json.dumps(dataclasses.asdict(cell)))
        part.rename(self.folder / f"job-{self.number}.json")
        wanted = [self.folder / f"{self.number}.{rank}.json" for rank in (0, 1)]
        while not all(path.exists() for path in wanted):
            if (self.folder / "died").exists():
                pytest.fail((self.folder / "died").read_text())
            time.sleep(0.02)
        self.number += 1
        return self.folder / str(self.number - 1)

    def stop(self) -> None:
        (self.folder / "stop").touch()
        self._thread.join(60)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.stop()


def check(server: Server, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(cell=cells())
    def equals_single_process(cell: Cell) -> None:
        stem = server.run(cell)
        expected = reference(cell)
        for rank in (0, 1):
            difference = (load_file(f"{stem}.{rank}.safetensors")["weights"] - expected.weights).abs().amax(1)
            assert difference.max() == 0, difference.tolist()
            assert json.loads(Path(f"{stem}.{rank}.json").read_text())["drift"] == 0

    equals_single_process()


@pytest.mark.distributed(2)
def test_any_run_equals_the_single_process(server: Server) -> None:
    check(server, 25)


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_many_runs_equal_the_single_process(server: Server) -> None:
    check(server, 300)
