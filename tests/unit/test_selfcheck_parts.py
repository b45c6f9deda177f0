"""The parts of the self-check that start no ranks: what is checked, the verdicts, their cache, the environment of its processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.integrations.selfcheck import judge, start, verdict
from smartfrz_ds.integrations.selfcheck.case import Case, of_config, of_wrapper
from smartfrz_ds.integrations.selfcheck.plain import FROZEN, PLAN, STEPS, Net, frozen_elements, train_plainly
from smartfrz_ds.integrations.selfcheck.verdict import Verdict

VERSIONS = {"deepspeed": "1.0", "torch": "2.0"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMARTFRZ_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_verdict_is_read_back(cache: Path) -> None:
    said: list[str] = []
    assert verdict.read("k", said.append) is None and not said
    verdict.write("k", Verdict("self-checked", "it passed", 12.5), said.append)
    assert verdict.read("k", said.append) == Verdict("self-checked", "it passed", 12.5, cached=True) and not said


DAMAGED = [
    "",
    "{",
    "[]",
    '{"key": "other", "verdict": {"kind": "self-checked", "text": "x"}}',
    '{"key": "k", "verdict": {"kind": "tested", "text": "x"}}',
    '{"key": "k", "verdict": {"kind": "refused"}}',
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_cache_is_left_out_with_a_line(cache: Path, text: str) -> None:
    cache.mkdir()
    (cache / "selfcheck-k.json").write_text(text)
    said: list[str] = []
    assert verdict.read("k", said.append) is None
    assert len(said) == 1 and "selfcheck-k.json cannot be used" in said[0]


def test_a_cache_that_cannot_be_written_is_a_line(cache: Path) -> None:
    cache.write_text("a file, not a folder")
    said: list[str] = []
    verdict.write("k", Verdict("refused", "it failed"), said.append)
    assert len(said) == 1 and "cannot be stored" in said[0] and "SMARTFRZ_CACHE_DIR" in said[0]


def test_the_key_depends_on_versions_options_and_sources(tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text("1")
    cases = [Case("deepspeed", stage=2), Case("deepspeed", stage=3), Case("pipeline", stage=2), Case("deepspeed", stage=2, half=True)]
    keys = [verdict.key_of(case, VERSIONS, [tmp_path]) for case in cases]
    keys.append(verdict.key_of(cases[0], {**VERSIONS, "torch": "2.1"}, [tmp_path]))
    assert verdict.key_of(Case("deepspeed", stage=2), VERSIONS, [tmp_path]) == keys[0]
    source.write_text("2")
    keys.append(verdict.key_of(cases[0], VERSIONS, [tmp_path]))
    assert len(set(keys)) == len(keys)


def test_the_case_follows_the_config() -> None:
    raw: dict[str, Any] = {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}, "overlap_comm": True, "round_robin_gradients": "auto"},
        "fp16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {}},
    }
    case = of_config(raw, frozen="replicated", device="cuda")
    assert str(case) == "ZeRO-3, bf16, offload_param, overlap_comm: true, frozen weights replicated"
    assert [part.split(":")[0].split(",")[0] for part in case.unchecked] == ["fp16", "DeepSpeed's own optimizer", "NVMe", "cuda devices"]
    assert Case.from_json(case.to_json()) == case
    plain = of_config({"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}})
    assert plain == Case("deepspeed", stage=1)
    assert str(of_wrapper("fsdp2", frozen="unsharded")) == "FSDP2, frozen weights unsharded"
    assert of_wrapper("ddp", frozen="unsharded") == Case("ddp")
    assert case.config()["zero_optimization"]["offload_param"] == {"device": "cpu"}


def test_its_processes_do_not_take_themselves_for_ranks_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    made = start.environment(tmp_path, 1)
    assert (made["RANK"], made["WORLD_SIZE"], made["DS_ACCELERATOR"], made["CUDA_VISIBLE_DEVICES"]) == ("1", "2", "cpu", "")
    assert made["HF_HOME"] == "/somewhere" and "7" not in made.values()


def test_the_setting_decides_without_a_check(cache: Path) -> None:
    ranks = Collectives(torch.device("cpu"))

    def asked(untested: str | None, setting: Any) -> Verdict:
        return judge(ranks, untested, lambda: pytest.fail("a check began"), setting, versions=VERSIONS, library=None)

    assert asked(None, "check") == Verdict("tested")
    allowed = asked("DeepSpeed 1.0 is not among the tested versions", "allow")
    assert allowed.kind == "allowed" and 'unchecked because smartfrz.untested_versions is "allow"' in allowed.text
    with pytest.raises(ValueError, match=r'DeepSpeed 1.0 is not .*Install a tested one, or set smartfrz.untested_versions to "check"'):
        asked("DeepSpeed 1.0 is not among the tested versions", "refuse")


@pytest.mark.parametrize(("old", "new"), [(True, "allow"), (False, "check")])
def test_the_former_key_still_works(old: bool, new: str) -> None:
    with pytest.warns(FutureWarning, match=f"allow_untested_versions is deprecated: set smartfrz.untested_versions to '{new}'"):
        assert FreezeConfig.load({"allow_untested_versions": old}).untested_versions == new
    with pytest.raises(ValueError, match="allow_untested_versions: unknown key"):
        FreezeConfig.load({"allow_untested_versions": True, "untested_versions": "check"})


def test_plain_torch_freezes_what_the_plan_says() -> None:
    weights = train_plainly(Case("ddp"), PLAN).weights
    frozen, thawed = frozen_elements(FROZEN), frozen_elements(["blocks.0"])
    first, last = sorted(PLAN)
    assert weights.shape[0] == STEPS and frozen.shape[0] == sum(p.numel() for p in Net().parameters())
    assert torch.equal(weights[first - 1][frozen], weights[last - 1][frozen]) and not torch.equal(weights[0][frozen], weights[1][frozen])
    assert not torch.equal(weights[last - 1][thawed], weights[last][thawed])
    assert not torch.equal(weights[-2][~frozen], weights[-1][~frozen])
