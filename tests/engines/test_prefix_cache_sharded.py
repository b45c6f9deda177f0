"""The prefix cache on real 2-rank engines that gather weights in forward: ZeRO-3 and FSDP2.

All ranks skip the frozen layers or none does. Each case trains four epochs of 32 rows, dealt out anew to the ranks in each epoch, with the
cache and without it: the weights after each step and the losses must be equal bit for bit. Case keys are explained in the worker.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_worker
from reference import oracle
from safetensors.torch import load_file

ROWS, EPOCHS, WORLD = 32, 4, 2
STEPS = ROWS // WORLD // oracle.BATCH  # of an epoch, on each rank
ALL_HIT = STEPS * (EPOCHS - 1) - 1  # from the second epoch on; one is compared
EXCHANGE = 17 * WORLD  # bytes of an exchange before a forward
ON = {"mode": "on", "memory": "16MiB"}
AUTO = {"mode": "auto", "memory": "16MiB", "min_gain": 1}
ZERO3: dict[str, Any] = {"kind": "deepspeed", "stage": 3, "zero": {"stage3_param_persistence_threshold": 0}}
TIGHT = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
FSDP2: dict[str, Any] = {"kind": "fsdp2"}
ODD = {"short": [5, 10], "deeper": 7}

Facts = dict[str, Any]
pytestmark = pytest.mark.distributed(2)


def trained(
    cases: dict[str, dict[str, Any]], folder: Path, *, cache: dict[str, Any] = ON, worker: str = "prefix_cache"
) -> dict[str, list[tuple[Facts, Facts]]]:
    """Train each case without the cache and with it, require equal bits, and return what each rank reports of both."""
    modes = {"off": {"mode": "off"}, "on": cache}
    jobs = [{"name": f"{name}-{mode}", **case, "cache": about} for name, case in cases.items() for mode, about in modes.items()]
    run_worker(worker, jobs, folder, ranks=WORLD)
    found: dict[str, list[tuple[Facts, Facts]]] = {}
    for name in cases:
        for rank in range(WORLD):
            off, on = (load_file(folder / f"{name}-{mode}.{rank}.safetensors") for mode in modes)
            assert torch.equal(off["losses"], on["losses"]), name
            assert torch.equal(off["weights"], on["weights"]), name
            assert len(set(off["losses"].tolist())) > STEPS and off["losses"].isfinite().all()  # it trains
            told = [json.loads((folder / f"{name}-{mode}.{rank}.json").read_text()) for mode in modes]
            found.setdefault(name, []).append((told[0], told[1]))
    return found


def all_hit(found: dict[str, list[tuple[Facts, Facts]]]) -> None:
    for name, ranks in found.items():
        for off, on in ranks:
            assert off["hits"] == 0 and on["rows"] == ROWS, (name, on)
            assert on["hits"] == ALL_HIT, (name, on)


def test_equal_with_rows_of_the_other_rank(tmp_path: Path) -> None:
    """Two micro-batches a step; ZeRO-3 keeps small parameters gathered, FSDP2 gathers two units ahead. More are where bytes count."""
    cases = {
        "z3-persistent": {"kind": "deepspeed", "stage": 3, "accumulation": 2},
        "fsdp2": FSDP2 | {"ahead": True, "accumulation": 2},
    }
    all_hit(trained(cases, tmp_path))


def test_no_rank_waits_for_another(tmp_path: Path) -> None:
    """Short batches on one rank only, a border that moves, evaluations; on rank 0 alone where all weights are gathered."""
    cases = {
        "z3": {"kind": "deepspeed", "stage": 3, "alone": [2, 5, 9, 13], **ODD},
        "fsdp2": FSDP2 | {"evaluations": [5, 9], **ODD},
    }
    for name, ranks in trained(cases, tmp_path).items():
        assert [on["hits"] for _, on in ranks] == [ranks[0][1]["hits"]] * WORLD, name
        assert ranks[0][1]["hits"] > 0 and ranks[0][1]["carried"] > 0, (name, ranks[0][1])


def test_a_hit_gathers_nothing_of_the_prefix(tmp_path: Path) -> None:
    """One layer behind the border is frozen, too: it is gathered as before. Gathers are counted in all that a forward and backward call."""
    frozen = [0, 1, 2, 4]  # by position: the embeddings, blocks 0 and 1; and block 3
    cases = {
        "prefetching": ZERO3 | {"frozen": frozen},
        "fsdp2": FSDP2 | {"frozen": frozen, "ahead": True},
    }
    for name, ranks in trained(cases, tmp_path).items():
        for off, on in ranks:
            # ZeRO-3 pads a shard to whole elements, FSDP2 one to whole rows
            sizes = {n: 4 * WORLD * -(-size // WORLD) for n, size in on["sizes"].items()}
            prefix = sum(size for n, size in sizes.items() if n.startswith(("inp.", "blocks.0.", "blocks.1.")))
            complete, skipped = (sum(told["wire"][-2]) for told in (off, on))
            assert on["hits"] == ALL_HIT and prefix > 0
            assert complete - (skipped - EXCHANGE) == prefix, (name, complete, skipped, prefix)
            last = sum(on["wire"][-1])
            assert last == skipped, (name, on["wire"])


def test_fsdp1_is_off_by_name(tmp_path: Path) -> None:
    run_worker("prefix_cache", [{"name": "fsdp1", "kind": "fsdp1", "refused": True}], tmp_path, ranks=WORLD)
    for rank in range(WORLD):
        told = json.loads((tmp_path / f"fsdp1.{rank}.json").read_text())
        assert len(told["errors"]) == len(told["notes"]) == 1, told
        assert told["errors"][0].startswith("smartfrz.cache.mode: got 'on', but FSDP1 keeps the weights of a unit in one flat"), told
        assert told["notes"][0].startswith("off: FSDP1 keeps"), told


@pytest.mark.slow
def test_hit_rates_that_differ_between_ranks(tmp_path: Path) -> None:
    """Rank 1 never sees a row again, so that no rank skips."""
    for name, ranks in trained({"z3": ZERO3 | {"noise": 1}, "fsdp2": FSDP2 | {"noise": 1}}, tmp_path).items():
        assert all(on["hits"] == 0 for _, on in ranks), name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["z3", "fsdp2"])
def test_a_proof_that_fails_on_one_rank_ends_it_on_all(tmp_path: Path, engine: str) -> None:
    """The model raises for NaN in the middle of a forward, on both ranks or on rank 0 alone, where rank 1 continues to gather."""
    base = ZERO3 if engine == "z3" else FSDP2
    cases = {model: base | {"model": model} for model in ("raises", "raises-on-0", "reads")}
    for name, ranks in trained(cases, tmp_path, cache=AUTO).items():
        for _, on in ranks:
            assert on["hits"] == 0, (name, on)
            words = "reads what a skipped layer returned" if name == "reads" else "the model raises ArithmeticError"
            assert words in on["note"], (name, on)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["z3", "fsdp2"])
def test_a_write_into_the_shard_of_one_rank(tmp_path: Path, engine: str) -> None:
    """The other rank's shard is as it was, but its rows are stale, too: from then on all keys are others."""
    base = ZERO3 if engine == "z3" else FSDP2
    for name, ranks in trained({engine: base | {"write": 9}}, tmp_path).items():
        for _, on in ranks:
            assert 0 < on["hits"] < ALL_HIT and on["rows"] > ROWS, (name, on)


@pytest.mark.slow
def test_zero3_with_its_options(tmp_path: Path) -> None:
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
    cases = {
        "bf16": ZERO3 | {"dtype": "bf16"},
        "offloaded optimizer": ZERO3 | {"zero": ZERO3["zero"] | offload},
        "offloaded weights": ZERO3 | {"zero": ZERO3["zero"] | offload | {"offload_param": {"device": "cpu", "pin_memory": False}}},
        "replicated": ZERO3 | {"smartfrz": {"zero3": {"frozen": "replicated"}}},
        "two micro-batches": ZERO3 | {"accumulation": 2},
        "tight": ZERO3 | {"zero": ZERO3["zero"] | TIGHT, "accumulation": 2},
        "reentrant": ZERO3 | {"model": "reentrant"},
        "non-reentrant": ZERO3 | {"model": "non-reentrant"},
        "deepspeed": ZERO3 | {"model": "deepspeed"},
    }
    all_hit(trained(cases, tmp_path))


@pytest.mark.slow
def test_fsdp2_with_its_options(tmp_path: Path) -> None:
    cases = {
        "mixed precision": FSDP2 | {"dtype": "bf16"},
        "offloaded": FSDP2 | {"offload": True},
        "gathered after forward": FSDP2 | {"reshard": False},
        "unsharded": FSDP2 | {"smartfrz": {"fsdp": {"frozen": "unsharded"}}},
        "reentrant": FSDP2 | {"model": "reentrant"},
        "non-reentrant": FSDP2 | {"model": "non-reentrant"},
    }
    all_hit(trained(cases, tmp_path))


@pytest.mark.slow
def test_a_thaw_of_a_part_of_the_prefix(tmp_path: Path) -> None:
    """The border moves forward: rows of the longer prefix are of no more use."""
    for name, ranks in trained({"z3": ZERO3 | {"thaw": 6}, "fsdp2": FSDP2 | {"thaw": 6}}, tmp_path).items():
        assert all(0 < on["hits"] < ALL_HIT for _, on in ranks), (name, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["z3", "fsdp2"])
def test_models_of_transformers(tmp_path: Path, engine: str) -> None:
    """Tied weights, adapters, experts (a leaf module of ZeRO-3), and the layers' own activation checkpointing. All batches hit but one."""
    names = ["gpt2", "bert-reentrant", "bert-non-reentrant", "llama", "lora", *(["mixtral"] if engine == "z3" else [])]
    cases = {f"{engine}-{name}": {"engine": engine, "model": name} for name in names}
    for name, ranks in trained(cases, tmp_path, worker="prefix_cache_models").items():
        for _, on in ranks:
            assert on["hits"] == 2 * STEPS - 1, (name, on)
