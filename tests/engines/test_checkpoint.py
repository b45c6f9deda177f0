"""Checkpoints of real 2-rank engines: resume, rollback, other numbers of ranks, DeepSpeed's tools, faults. See worker_checkpoint.py."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from helpers import environment, run_worker
from reference.bounds import FACTOR, distance, noisy, spread
from reference.oracle import Cell, Net, reference
from safetensors.torch import load_file

from smartfrz_ds.checkpoint.files import COMPLETE_FILE, complete_tags, missing_files, pack, unpack, write_atomically, write_complete

PLAN = {
    "3": ["freeze", ["embeddings", "blocks.0", "blocks.1"]],
    "6": ["freeze", ["blocks.2"]],
    "9": ["thaw", ["blocks.1", "blocks.2"]],
}
FROZEN = {2: [], 5: PLAN["3"][1], 8: [*PLAN["3"][1], "blocks.2"], 10: ["embeddings", "blocks.0"]}
SAVES = list(FROZEN)  # before, between and after the freezes, and after the thaw
TWO = [8, 10]  # just before the thaw, so that kept state goes through the checkpoint, and after it
BF16_OPTIMIZER = {"data_types": {"grad_accum_dtype": "fp32"}}
Saw = Callable[..., dict[str, Any]]


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": settings}


DEFAULT = [Cell(f"z{stage}", stage, plan=PLAN) for stage in (0, 1, 2, 3)]
DEFAULT.append(Cell("z1-bf16optimizer", 1, "bf16", plan=PLAN, config=BF16_OPTIMIZER))
# keep_state: what waits on the host for the thaw goes through the checkpoint too. groups=3: the freeze empties parameter groups.
# stage3_param_persistence_threshold 0 and sub-groups of a few weights: whole sub-groups disappear.
SMALL = {"stage3_param_persistence_threshold": 0, "sub_group_size": 900}
SLOW = [
    *[Cell(f"z{stage}-kept-{dtype}", stage, dtype, keep_state=100, plan=PLAN) for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")],
    *[Cell(f"z{stage}-emptied", stage, groups=3, plan=PLAN) for stage in (0, 1, 2, 3)],
    Cell("z1-bf16optimizer-kept", 1, "bf16", groups=2, keep_state=100, plan=PLAN, config=BF16_OPTIMIZER),
    Cell("z3-subgroups", 3, plan=PLAN, config=zero(**SMALL)),
    Cell("z3-subgroups-kept", 3, plan=PLAN, keep_state=100, config=zero(**SMALL)),
    Cell(
        "z3-replicated", 3, plan=PLAN, config=zero(stage3_param_persistence_threshold=0) | {"smartfrz": {"zero3": {"frozen": "replicated"}}}
    ),
    Cell("z3-bf16-offload", 3, "bf16", plan=PLAN, config=zero(offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"})),
    Cell("z2-offload", 2, plan=PLAN, config=zero(offload_optimizer={"device": "cpu"})),
    Cell("z2-roundrobin", 2, plan=PLAN, groups=2, config=zero(round_robin_gradients=True)),
    Cell("z2-accumulation", 2, accumulation=2, plan=PLAN),
]
# Compiled at their first use. FusedAdam has one count for many parameters. Of the last cell everything is thawed again at step 6.
THAWED = {"3": ["freeze", ["embeddings"]], "6": ["thaw", ["embeddings"]]}
COMPILED = [
    *[Cell(f"fused-z{stage}", stage, groups=2, plan=PLAN, optimizer="fused") for stage in (0, 2)],
    Cell("fused-z0-bf16", 0, "bf16", plan=PLAN, keep_state=100, optimizer="fused"),  # FP16_Optimizer
    Cell("fused-z0-thawed", 0, plan=THAWED, optimizer="fused"),
    *[Cell(f"cpuadam-z{stage}", stage, plan=PLAN, optimizer="cpu", config=zero(offload_optimizer={"device": "cpu"})) for stage in (2, 3)],
    Cell("fused-z2-free", 2, groups=2, optimizer="fused"),
    Cell("cpuadam-z2-free", 2, optimizer="cpu", config=zero(offload_optimizer={"device": "cpu"})),
]
# DeepSpeed's compiled optimizers on the CPU multiply their bias corrections up from step to step, but compute them anew after a load: with
# nothing frozen a resumed run is off as well: by how much says the cell of the same optimizer in which nothing freezes.
OWN = {"fused": "fused-z2-free", "cpu": "cpuadam-z2-free"}
CELLS = {cell.name: cell for cell in [*DEFAULT, *SLOW, *COMPILED]}
CASES: list[tuple[str, list[int]]] = [
    ("errors", []),
    ("latest", []),
    ("policy", []),
    ("without_plugin", [2]),
    ("disabled", [3]),
    ("parts", [3]),
    ("guarded", [1]),
    ("guarded", [3]),
]
STAGED = ("without_plugin", "disabled", "parts", "guarded")

pytestmark = pytest.mark.distributed(2)


def launched(
    folder: Path, cells: list[Cell], cases: list[tuple[str, list[int]]], saves: list[int], back: list[int], timeout: float = 500
) -> tuple[Path, Saw]:
    jobs: list[dict[str, Any]] = [{"name": c.name, "cell": dataclasses.asdict(c), "saves": saves, "back": back} for c in cells]
    jobs += [{"name": "-".join([case, *map(str, arguments)]), "case": case, "arguments": arguments} for case, arguments in cases]
    run_worker("checkpoint", jobs, folder, timeout=timeout)
    return folder, lambda name, rank=0: json.loads((folder / f"{name}.{rank}.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Saw]:
    """The default cells, resumed twice and rolled back once, and all cases: one launch."""
    return launched(tmp_path_factory.mktemp("checkpoint"), DEFAULT, CASES, [5, 10], [5])


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Saw]:
    """Cells resumed and rolled back from each of SAVES, the options from two, and the other stages of the cases."""
    folder = tmp_path_factory.mktemp("long")
    launched(folder, [*DEFAULT, *COMPILED], [], SAVES, SAVES, timeout=1500)
    for part in (SLOW[::2], SLOW[1::2]):
        launched(folder, part, [], TWO, TWO, timeout=1500)
    return launched(folder, [], [(case, [stage]) for case in STAGED for stage in (0, 1, 2, 3)], [], [], timeout=1500)


def check_resume(run: tuple[Path, Saw], name: str, saves: list[int], back: list[int]) -> None:
    folder, saw = run
    for rank in (0, 1):
        seen = saw(name, rank)
        for kind, steps in (("resumed", saves), ("rolled_back", back)):
            assert sorted(map(int, seen[kind])) == steps
            for k in steps:
                now = seen[kind][str(k)]
                frozen = FROZEN[k] if CELLS[name].plan == PLAN else ["embeddings"] * (CELLS[name].plan == THAWED and k == 5)
                assert now["start"] == [True, k, frozen], (kind, k, now)
                if CELLS[name] in COMPILED:
                    own = saw(OWN[CELLS[name].optimizer], rank)
                    bound = FACTOR[torch.float32] * max(seen["worst"] for how in ("resumed", "rolled_back") for seen in own[how].values())
                    assert now["worst"] <= bound < 1e-4, (kind, k, now)
                else:
                    assert now["worst"] == 0.0 and now["moments"], (kind, k, now)
                # the user's own, and nothing of ours
                assert now["client"] == {"k": k, "nested": {"a": [1, 2]}}
                assert Path(now["path"]).parent == folder / name / f"global_step{k}"
        assert seen["last_checkpoint"] == str(folder / name / f"global_step{saves[-1]}")


@pytest.mark.parametrize("name", [c.name for c in DEFAULT])
def test_resume_is_bit_identical(run: tuple[Path, Saw], name: str) -> None:
    check_resume(run, name, [5, 10], [5])


@pytest.mark.slow
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("name", CELLS)
def test_resume_is_bit_identical_everywhere(long_run: tuple[Path, Saw], name: str) -> None:
    saves = TWO if CELLS[name] in SLOW else SAVES
    check_resume(long_run, name, saves, saves)


@pytest.mark.parametrize(
    ("case", "words"),
    {
        "lost": ["smartfrz.safetensors is missing"],
        "damaged": ["is damaged"],
        "truncated": ["incomplete", "zero_pp_rank_1_mp_rank_00_optim_states.pt"],
        "unfinished": ["its save did not finish"],
        "model_states": ["can't be read"],
        "fewer_layers": ["does not match this model", "blocks.4"],
        "other_sizes": ["does not match this model", "'embeddings' has 128 weights in the checkpoint, 192 in the model"],
        "absent": ["nothing is missing", "global_step6"],
        "reserved": ["client_state", "'smartfrz_ds'"],
    }.items(),
)
def test_a_broken_checkpoint_is_a_clear_error_and_changes_nothing(run: tuple[Path, Saw], case: str, words: list[str]) -> None:
    for rank in (0, 1):
        seen = run[1]("errors", rank)[case]
        assert seen["type"] == "ValueError" and all(w in seen["message"] for w in words), seen
        assert seen.get("unchanged", True)


def test_another_layout_only_at_a_step_boundary(run: tuple[Path, Saw]) -> None:
    for rank in (0, 1):
        seen = run[1]("errors", rank)["pending"]
        assert seen["type"] == "RuntimeError" and "step boundary" in seen["message"] and seen["unchanged"]


@pytest.mark.parametrize(("case", "step"), [("empty", 6), ("missing", 6), ("incomplete", 4)])
def test_a_torn_latest_falls_back_to_the_newest_complete_tag(run: tuple[Path, Saw], case: str, step: int) -> None:
    for rank in (0, 1):
        seen = run[1]("latest", rank)[case]
        assert Path(seen["path"]).parent.name == f"global_step{step}" and seen["equal"]
        assert len(seen["warnings"]) == (1 if rank == 0 else 0)
    assert f"global_step{step}, the newest complete" in run[1]("latest")[case]["warnings"][0]


def test_no_complete_tag_and_no_latest(run: tuple[Path, Saw]) -> None:
    for rank in (0, 1):
        seen = run[1]("latest", rank)
        assert seen["none"]["type"] == "ValueError" and "nothing to resume from" in seen["none"]["message"]
        assert seen["no_latest"] == [None, None]  # as DeepSpeed


def test_a_checkpoint_without_freeze_state_starts_unfrozen(run: tuple[Path, Saw]) -> None:
    check_without_plugin(run[1], 2)


def test_enabled_false_restores_the_layout_and_decides_nothing(run: tuple[Path, Saw]) -> None:
    check_disabled(run[1], 3)


def test_loading_only_a_part(run: tuple[Path, Saw]) -> None:
    check_parts(run[1], 3)


@pytest.mark.slow
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_in_every_stage(long_run: tuple[Path, Saw], stage: int) -> None:
    for check in (check_without_plugin, check_disabled, check_parts, check_guarded):
        check(long_run[1], stage)


def check_without_plugin(saw: Saw, stage: int) -> None:
    for rank in (0, 1):
        seen = saw(f"without_plugin-{stage}", rank)
        assert seen["frozen"] == [PLAN["3"][1], []] and seen["step"] == 9 and seen["mine"] == 1
        assert seen["worst"] == 0.0


def check_disabled(saw: Saw, stage: int) -> None:
    for rank in (0, 1):
        seen = saw(f"disabled-{stage}", rank)
        assert seen["before"] == seen["unfrozen"] == ["RestoringDeepSpeedEngine", False]
        assert seen["frozen"] == PLAN["3"][1] and seen["worst"] == 0.0 and not seen["marker"]


def check_parts(saw: Saw, stage: int) -> None:
    """Weights only: the run stays what it is, with what it has frozen. Without the optimizer: the run is the checkpoint's."""
    for rank in (0, 1):
        seen = saw(f"parts-{stage}", rank)
        assert seen["module_only"] == [True, 2, ["embeddings"]]
        assert seen["frozen_held"] and 0 < seen["moved"] < 0.1
        assert seen["no_optimizer"] == [True, 6, PLAN["3"][1]]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_mistake_is_taken_back_after_a_resume_within_its_window(run: tuple[Path, Saw], stage: int) -> None:
    check_guarded(run[1], stage)


def check_guarded(saw: Saw, stage: int) -> None:
    """Kept state, the metric's level and the window all go through the checkpoint."""
    for rank in (0, 1):
        seen = saw(f"guarded-{stage}", rank)
        kinds = [[kind, layers] for kind, _, layers in seen["events"]]
        assert kinds == [["freeze", PLAN["3"][1]], ["thaw", PLAN["3"][1]]], kinds
        taken_back = seen["events"][1][1]
        assert 5 < taken_back <= 9  # behind the resume, within the window
        for k, now in seen["resumed"].items():
            assert now["worst"] == 0.0 and now["moments"] and now["guard"], (k, now)
            assert now["events"] == seen["events"], (k, now)


def test_policy_history_and_log_go_on(run: tuple[Path, Saw]) -> None:
    seen = run[1]("policy")
    assert seen["state"] and seen["windows"] and seen["end"] and seen["history"] == 6
    assert [e[1] for e in seen["cut"]] == [4, 8]  # the log without what happened after the checkpoint
    assert seen["log"][0] == seen["log"][1] and len(seen["log"][0]) == 4
    assert seen["events"] == [["freeze", step] for step in (4, 8, 12, 16)]
    assert run[1]("policy", 1)["history"] == 0  # snapshots are kept on rank 0


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """In the order of the model, and nothing else among them."""
    names = [n for n, _ in Net().named_parameters()]
    assert set(weights) == set(names)
    return torch.cat([weights[n].float().view(-1) for n in names])


@pytest.mark.parametrize("name", ["z1", "z2", "z3"])
def test_zero_to_fp32_gives_the_full_model(run: tuple[Path, Saw], name: str) -> None:
    check_zero_to_fp32(run[0] / name, [5, 10])


@pytest.mark.slow
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("name", ["z1-emptied", "z2-emptied", "z3-emptied", "z3-subgroups", "z3-replicated", "z2-roundrobin"])
def test_zero_to_fp32_gives_the_full_model_everywhere(long_run: tuple[Path, Saw], name: str) -> None:
    check_zero_to_fp32(long_run[0] / name, TWO)


def check_zero_to_fp32(folder: Path, saves: list[int]) -> None:
    expected = load_file(folder / "weights.safetensors")
    for k in saves:
        assert torch.equal(flat(get_fp32_state_dict_from_zero_checkpoint(str(folder), f"global_step{k}")), expected[str(k)]), k


def test_another_number_of_ranks(run: tuple[Path, Saw], tmp_path: Path) -> None:
    check_universal(run[0] / "z3", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("name", ["z1", "z2", "z3-subgroups", "z3-replicated"])
def test_another_number_of_ranks_everywhere(long_run: tuple[Path, Saw], tmp_path: Path, name: str) -> None:
    check_universal(long_run[0] / name, tmp_path)


def check_universal(folder: Path, tmp_path: Path) -> None:
    """2 ranks, converted, 1 rank. Exact at load; after that 1 rank and 2 ranks add gradients in another order: the bound is what that makes
    of the same training in plain torch."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state", "--num_extract_workers", "1"]
    command += ["--num_merge_workers", "1", "--input_folder", str(folder / "global_step10"), "--output_folder", str(folder / "universal")]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    jobs = [{"name": case, "case": case, "folder": str(folder)} for case in ("universal", "other_ranks")]
    run_worker("checkpoint", jobs, tmp_path, ranks=1)
    refused = json.loads((tmp_path / "other_ranks.0.json").read_text())
    assert refused["type"] == "ValueError" and "ds_to_universal" in refused["message"] and refused["unchanged"]
    seen = json.loads((tmp_path / "universal.0.json").read_text())
    assert seen["step"] == 10 and seen["frozen"] == FROZEN[10]
    got, expected = load_file(folder / "universal.safetensors"), load_file(folder / "weights.safetensors")
    assert torch.equal(got.pop("loaded"), expected["10"])
    assert sorted(got) == ["11", "12"]
    cell = Cell(**json.loads((folder / "cell.json").read_text()))
    samples = noisy(lambda noise: reference(cell, noise=noise).weights, since=10)
    bound = spread(samples, reference(cell).weights)
    for step, weights in got.items():
        assert distance(weights, expected[step]) <= bound
        # the negative control: the weights did move
        assert distance(weights, expected["10"]) > max(100 * bound, 1e-3)


# --- the file format, without an engine ---------------------------------------------------------------------------------------------


def test_a_state_comes_back_exactly() -> None:
    window = {"steps": torch.tensor([3, 4]), "lr_spent": torch.tensor([0.1, 1 / 3], dtype=torch.float64), "weights": torch.randn(2, 5)}
    state = {"step": 7, "lr_spent": 0.1 + 0.2, "policy": {"state": {"held": {"a/b": 1e-17}}}, "history": {"a/b": window}}
    back = unpack(pack(state))
    assert {k: v for k, v in back.items() if k != "history"} == {k: v for k, v in state.items() if k != "history"}
    assert all(torch.equal(back["history"]["a/b"][k], v) for k, v in window.items())
    assert unpack(pack(state | {"history": {}}))["history"] == {}


@pytest.mark.parametrize(
    "data",
    [b"", b"\x08\0\0\0\0\0\0\0{}      ", pack({"history": {}})[:-1], pack({"history": {}}).replace(b'"1"', b'"9"')],
    ids=["nothing", "no metadata", "cut", "another format"],  # not the bytes: safetensors writes metadata in no fixed order
)
def test_bytes_that_are_no_state(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"it is not a freeze state|it has format 9"):
        unpack(data)


def test_complete_means_all_files_with_their_sizes(tmp_path: Path) -> None:
    for step in (1, 2):
        folder = tmp_path / f"t{step}"
        write_atomically(folder / "a.pt", b"12345")
        assert missing_files(folder) is None
        write_complete(folder, step)
        assert missing_files(folder) == []
    assert complete_tags(tmp_path) == ["t2", "t1"]
    (tmp_path / "t2" / "a.pt").write_bytes(b"123")
    assert missing_files(tmp_path / "t2") == ["a.pt"] and complete_tags(tmp_path) == ["t1"]
    (tmp_path / "t1" / COMPLETE_FILE).write_bytes(b'{"files"')
    assert complete_tags(tmp_path) == []
    assert not list(tmp_path.rglob(".*")), "scratch files are left"
