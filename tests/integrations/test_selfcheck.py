"""The self-check of versions that nobody has tested, in its own processes, on the installed DeepSpeed and torch."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers import run_worker

from smartfrz_ds.integrations.selfcheck import start
from smartfrz_ds.integrations.selfcheck.case import Case

pytestmark = pytest.mark.distributed(2)

CASES = [
    Case("deepspeed", stage=0),
    Case("deepspeed", stage=0, half=True),
    Case("deepspeed", stage=1, half=True),
    Case("deepspeed", stage=1, half=True, fp32_gradients=True),
    Case("deepspeed", stage=2, offload=("optimizer",)),
    Case("deepspeed", stage=2, switches={"overlap_comm": True, "round_robin_gradients": True}),
    Case("deepspeed", stage=3),
    Case("deepspeed", stage=3, half=True, offload=("optimizer", "param")),
    Case("deepspeed", stage=3, frozen="replicated"),
    Case("pipeline"),
    Case("pipeline", stage=1),
    Case("ddp"),
    Case("fsdp1"),
    Case("fsdp2"),
    Case("fsdp2", frozen="unsharded"),
]
QUICK = {"FSDP2"}  # ZeRO-2 is checked below


@pytest.mark.parametrize("case", [pytest.param(c, id=str(c), marks=() if str(c) in QUICK else pytest.mark.slow) for c in CASES])
def test_the_installed_version_passes(case: Case) -> None:
    assert start.run(case, 200) == start.Ended([])


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = run_worker("selfcheck", [], tmp_path_factory.mktemp("selfcheck"), timeout=280)
    first, second = (json.loads((folder / f"out.{rank}.json").read_text()) for rank in (0, 1))
    for name in ("checked", "again", "no time", "allowed", "refused", "broken"):
        assert {k: first[name][k] for k in ("said", "warned")} == {k: second[name][k] for k in ("said", "warned")}, "both ranks are told"
    return first


def test_an_untested_torch_that_is_right_starts_with_a_warning(said: dict[str, Any]) -> None:
    assert said["checked"]["said"] == ""
    (text,) = said["checked"]["warned"]
    assert text.startswith("torch 2.") and "DeepSpeed 0" not in text, "DeepSpeed is tested, torch is not"
    assert "is not among the tested versions (==0.1). A self-check of it passed: with a toy model (ZeRO-2, fp32)" in text


def test_it_is_checked_once(said: dict[str, Any]) -> None:
    assert said["again"]["warned"] == said["checked"]["warned"] and said["again"]["said"] == ""


def test_a_check_that_has_no_time_is_no_verdict_for_later(said: dict[str, Any]) -> None:
    for name in ("no time", "no time, again"):
        assert "did not come to its end: it did not end within 0 s" in said[name]["said"]
        assert 'set smartfrz.untested_versions to "allow"' in said[name]["said"]


def test_the_setting_skips_it(said: dict[str, Any]) -> None:
    assert said["allowed"]["said"] == "" and 'smartfrz.untested_versions is "allow"' in said["allowed"]["warned"][0]
    text = said["refused"]["said"]
    assert text.startswith("DeepSpeed 0.") and ", and torch 2." in text and text.count("tested versions (==0.1)") == 2
    assert "Install a tested one" in text


def test_a_deepspeed_that_computes_something_else_after_a_freeze_is_refused(said: dict[str, Any]) -> None:
    text = said["broken"]["said"]
    assert text.startswith("DeepSpeed 0.") and "torch 2." not in text
    assert "its self-check failed with ZeRO-2, fp32: with layers frozen, its weights differ from plain torch by" in text
    assert "(with nothing frozen: 0.0e+00)" in text and said["broken"]["warned"] == []
    assert said["broken, again"]["said"] == text, "from the cache"


def test_nothing_of_it_is_left(said: dict[str, Any]) -> None:
    assert said["left"] == []
