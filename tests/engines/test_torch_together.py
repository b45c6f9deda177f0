"""attach_torch together with what people use beside it (worker_torch_together.py): two ranks against one process on both' batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_worker
from reference import oracle
from reference.bounds import rounding
from workers import worker_torch_together as together


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one launch wrote: all cases but `compiled`."""
    out = tmp_path_factory.mktemp("together")
    together.save_on_one_rank(out / "ck-one")
    cases = [case.__name__ for case in together.ALL if case is not together.compiled]
    return run_worker("torch", {"cells": [], "cases": cases}, out, timeout=200)


def saw(folder: Path, name: str, rank: int = 0) -> Any:
    return json.loads((folder / f"{name}.{rank}.json").read_text())


@pytest.mark.distributed(2)
def test_clipping(folder: Path) -> None:
    """Of what is active. FSDP2 sums the norm over shards, in another order, so that its last bits differ."""
    seen = saw(folder, "clipped")
    assert seen["found"]["ddp"] == 0.0 and seen["found"]["fsdp2"] <= seen["bound"]
    assert seen["without"] > max(100 * seen["bound"], 1e-3) and min(seen["norms"]["alone"]) > 0.02, "it clips in every step"
    assert seen["norms"]["ddp"] == seen["norms"]["alone"]
    # a norm differs by its own rounding, and follows the weights
    off = rounding(len(list(oracle.Net().parameters())), 1.0) + seen["norm_bound"]
    assert seen["norms"]["fsdp2"] == pytest.approx(seen["norms"]["alone"], rel=off) and off < 1e-3


@pytest.mark.distributed(2)
def test_checkpointing_that_is_not_reentrant(folder: Path) -> None:
    assert saw(folder, "nonreentrant") == {"ddp": 0.0, "fsdp2": 0.0, "fsdp1": 0.0}


@pytest.mark.distributed(2)
def test_batch_norm(folder: Path) -> None:
    """Running statistics of a frozen layer stay (`frozen_mode: "eval"`) or go on moving ("train"). DDP hands rank 0's to all before each
    forward; FSDP2 doesn't, so that each rank has its own, and a frozen layer in eval mode normalises by them."""
    seen = saw(folder, "batch_norm")
    for mode in ("eval", "train"):
        for kind in ("alone", "ddp", "fsdp2"):
            moved = seen[f"{mode}-{kind}"]
            assert moved["0 thawed"] > 1e-3 and moved["1 active"] > 1e-3
            for layer in ("0 frozen", "2 frozen"):
                assert moved[layer] == 0.0 if mode == "eval" else moved[layer] > 1e-3
        assert seen[f"{mode}-ddp"] == seen[f"{mode}-alone"]
    assert seen["train-fsdp2"] == seen["train-alone"]  # batches' own statistics: those that run matter only in evaluation


@pytest.mark.distributed(2)
def test_tensor_parallelism_is_refused(folder: Path) -> None:
    for rank in (0, 1):
        for said in saw(folder, "tensor_parallel", rank).values():
            assert said.startswith("ValueError: smartfrz_ds does not work yet with: tensor parallelism"), said


@pytest.mark.distributed(2)
def test_resume_on_another_number_of_ranks(folder: Path) -> None:
    """From one to two and back, bit for bit; what one rank held back for a thaw can't be dealt to two."""
    seen = saw(folder, "resized")
    assert seen["difference"] == 0.0 and seen["step"] == 9
    assert len(seen["said"]) == 1 and "was saved by 1 rank(s)" in seen["said"][0] and "is lost" in seen["said"][0]
    assert saw(folder, "resized", 1)["said"] == [], "told once"
    with pytest.warns(RuntimeWarning, match=r"was saved by 2 rank\(s\)"):
        weights, step = together.go_on_on_one_rank(folder / "ck-two")
    assert step == 9 and torch.equal(weights, torch.tensor(seen["weights"]))


@pytest.mark.distributed(2)
def test_ranks_that_differ_all_raise(folder: Path) -> None:
    for rank in (0, 1):
        seen = saw(folder, "disagreeing", rank)
        assert seen.pop("a file that is missing").endswith("settings.1.json: not a readable DeepSpeed JSON: no such file")
        about = {
            "version": "package versions",
            "settings": "smartfrz settings",
            "shapes in fsdp2": "models",
            "shapes in fsdp1": "models",
            "frozen by the user": "models",
            "optimizers": "optimizers",
        }
        assert seen.keys() == about.keys()
        for name, what in about.items():
            assert seen[name].startswith(f"RanksDisagree: the ranks have different {what}"), (name, seen[name])
            assert f"This is rank {rank}." in seen[name]


@pytest.mark.distributed(2)
def test_a_rank_that_cannot_save_stops_all_and_the_run_goes_on(folder: Path) -> None:
    for rank in (0, 1):
        said = saw(folder, "unwritable", rank)
        assert said[rank].startswith("NotADirectoryError") and said[1 - rank].startswith(
            f"RuntimeError: nothing was changed: rank {1 - rank}"
        )
    assert (folder / "ck-unwritable" / "smartfrz.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_compiled_models(tmp_path: Path) -> None:
    """torch.compile in and around DDP and FSDP2, freezes and thaws in mid-run: they compile anew, and end as one process that doesn't."""
    run_worker("torch", {"cells": [], "cases": ["compiled"]}, tmp_path, timeout=200)
    assert set(saw(tmp_path, "compiled").values()) == {0.0}
