"""Every check of `smartfrz doctor` is made to fail for real: a real lock, a real port that is taken, a real file that is wrong."""

from __future__ import annotations

import json
import mmap
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

from smartfrz_ds.cli import doctor
from smartfrz_ds.cli.doctor import examine, render
from smartfrz_ds.cli.doctor_config import check_config, check_model, traps
from smartfrz_ds.cli.doctor_load import NotBuilt, load_model
from smartfrz_ds.cli.doctor_refusals import wrong_values
from smartfrz_ds.cli.findings import Finding
from smartfrz_ds.config.refusals import refused_by
from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.config.versions import TESTED
from smartfrz_ds.integrations.selfcheck import verdict
from smartfrz_ds.integrations.selfcheck.case import of_config
from smartfrz_ds.integrations.selfcheck.judge import _key

GOOD: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 5000, "warmup_num_steps": 10}},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 5_000_000},
    "smartfrz": {"log_path": "log.jsonl"},
}


def only(findings: list[Finding], level: str) -> Finding:
    """The one finding of this level; all that aren't fine have an answer."""
    (found,) = (f for f in findings if f.level == level)
    assert all(bool(f.answer) == (f.level != "ok") for f in findings)
    return found


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


# ---- the machine


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of self-checks."""
    monkeypatch.setenv("SMARTFRZ_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_untested_deepspeed_waits_for_its_self_check(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    found = doctor.check_versions()
    assert "DeepSpeed 0.19.8: tested" in [f.text for f in found] and not [f for f in found if f.level == "problem"]
    monkeypatch.setattr(deepspeed, "__version__", "0.99.2")
    waiting = only(doctor.check_versions(), "warning")
    assert waiting.check == "deepspeed" and f"0.99.2 is not among the tested versions ({TESTED['deepspeed']})" in waiting.text
    assert "not checked here yet (ZeRO-0, fp32; ZeRO-1, fp32; ZeRO-2, fp32; ZeRO-3, fp32)" in waiting.text
    assert "--self-check" in waiting.answer and f"pip install 'deepspeed{TESTED['deepspeed']}'" in waiting.answer


@pytest.mark.parametrize(("kind", "level"), [("self-checked", "warning"), ("refused", "problem")])
def test_the_verdict_of_an_earlier_self_check_is_told(kind: Any, level: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "0.99.2")
    raw = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    case = of_config(raw, device="cpu" if torch.accelerator.device_count() == 0 else torch.accelerator.current_accelerator().type)
    key = _key(case, {"deepspeed": "0.99.2", "torch": torch.__version__}, Path(deepspeed.__file__).parent / "runtime")
    verdict.write(key, verdict.Verdict(kind, "what was found"), print)
    found = only(doctor.check_versions(raw, FreezeConfig()), level)
    assert found.text == "what was found"


@pytest.mark.parametrize(("setting", "level", "words"), [("allow", "warning", "used unchecked"), ("refuse", "problem", "refused at start")])
def test_an_untested_version_by_the_setting(setting: str, level: str, words: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "0.99.2")
    found = only(doctor.check_versions({}, FreezeConfig.load({"untested_versions": setting})), level)
    assert words in found.text and f'smartfrz.untested_versions is "{setting}"' in found.text


def test_untested_torch_is_a_warning(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    warned = [f for f in doctor.check_versions() if f.level == "warning"]
    assert [f.check for f in warned] == ["deepspeed", "torch"], "engines of DeepSpeed check themselves too"
    assert all("torch 2.6.0+cpu is not among the tested versions" in f.text for f in warned)
    assert all(f"pip install 'torch{TESTED['torch']}'" in f.answer and "deepspeed" not in f.answer for f in warned)


def test_cpu_build_beside_a_gpu_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "nvidia-smi", "echo")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    if torch.version.cuda:
        pytest.skip("torch's CUDA build is installed here")
    assert "CPU build) on a machine with an NVIDIA driver" in only(doctor.check_versions(), "problem").text


def test_packages_of_another_version_and_missing_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "accelerate-0.20.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 0.20.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = only(doctor.check_packages(["accelerate"]), "warning")
    assert found.text == "accelerate 0.20.0 was not tested with this package (tested: >=1.10)"
    assert "not installed" in only(doctor.check_packages(["no-such-package"]), "ok").text


def test_missing_compiler_headers_and_ninja(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    found = doctor.check_compiler()
    assert [f.level for f in found] == ["problem"] * 3
    assert "no C++ compiler (c++)" in found[0].text and "Python.h" in found[1].text and "no ninja on PATH" in found[2].text
    program(tmp_path, "my-c++", "")
    monkeypatch.setenv("CXX", "my-c++")
    assert doctor.check_compiler()[0].level == "ok"


def test_two_ninja_versions_rebuild_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Path(sys.executable).with_name("ninja")
    if not own.exists():
        pytest.skip("no ninja in this environment")
    monkeypatch.setenv("PATH", f"{own.parent}{os.pathsep}{os.environ['PATH']}")
    assert doctor.check_compiler()[-1].level == "ok"
    program(tmp_path, "ninja", "echo 1.5.0")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = doctor.check_compiler()[-1]
    assert (found.check, found.level) == ("ninja", "warning")
    assert f"{tmp_path / 'ninja'} is 1.5.0" in found.text and found.answer.endswith(f"PATH={own.parent}:$PATH")


def test_a_build_lock_is_told_with_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held open, as torch's builder holds it; then left by a builder that was killed. More in test_build_locks.py."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert only(doctor.check_build_locks(), "ok").text == f"no build lock in {tmp_path}"
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w"):
        found = only(doctor.check_build_locks(), "warning")
        assert str(lock) in found.text and "is building" in found.text and found.answer == "wait for it"
    hour_ago = lock.stat().st_mtime - 3600
    os.utime(lock, (hour_ago, hour_ago))
    found = only(doctor.check_build_locks(), "problem")
    assert f"{lock} is 60 minutes old: no process has it open" in found.text and found.answer.endswith(f"rm '{lock}'")
    subprocess.run(found.answer.split(": ", 1)[1], shell=True, check=True)
    assert doctor.check_build_locks()[0].level == "ok"


def test_mpi_with_half_of_it_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other half is a module of the right name: whatever MPI is installed here, it's not looked at."""
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin", "mpirun", "")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").touch()
    (tmp_path / "mpi4py" / "MPI.py").write_text("raise RuntimeError('cannot load MPI library')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert "cannot load MPI library" in only(doctor.check_mpi(), "problem").text
    (tmp_path / "mpi4py" / "MPI.py").write_text("def Get_library_version():\n    return 'Some MPI 9.9'")
    assert "Some MPI 9.9" in only(doctor.check_mpi(), "ok").text
    (tmp_path / "bin" / "mpirun").unlink()
    assert "no mpirun on PATH" in only(doctor.check_mpi(), "warning").text


def test_mpirun_without_mpi4py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    assert "no MPI" in only(doctor.check_mpi(), "ok").text
    program(tmp_path, "mpirun", "")
    assert "mpi4py is not" in only(doctor.check_mpi(), "warning").text


def test_a_host_name_that_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    found = only(doctor.check_host("localhost"), "warning")
    assert "'localhost' resolves to" in found.text and "GLOO_SOCKET_IFNAME" in found.answer
    found = only(doctor.check_host("no-such-host.invalid"), "problem")
    assert "cannot be resolved" in found.text and "/etc/hosts" in found.answer
    assert only(doctor.check_host("192.0.2.7"), "ok").text.endswith("resolves to 192.0.2.7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    assert "no such interface" in only(doctor.check_host(), "problem").text
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert only(doctor.check_host(), "ok")


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        found = only(doctor.check_port(), "warning")
    assert f"the launcher's port {port} cannot be used (Address already in use)" in found.text
    assert only(doctor.check_port(), "ok").text == f"port {port} is free"
    monkeypatch.setenv("MASTER_PORT", "eighty")
    assert only(doctor.check_port(), "problem").text == "MASTER_PORT is 'eighty'"


def test_shared_memory_without_room_and_with_leftovers(tmp_path: Path) -> None:
    assert only(doctor.check_shm(tmp_path), "ok")
    assert only(doctor.check_shm(tmp_path / "none"), "warning")
    assert "dies of SIGBUS" in only(doctor.check_shm(tmp_path, needed=2**60), "problem").text
    for rank in (0, 1):
        (tmp_path / f"deepspeed_allreduce_buffer_0_127.0.0.1_29500_{rank}").write_bytes(bytes(10**6))
    found = only(doctor.check_shm(tmp_path), "warning")
    assert found.text.startswith("2 files of ended runs occupy 2 MB")
    with (tmp_path / "deepspeed_allreduce_buffer_0_127.0.0.1_29500_0").open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert doctor.check_shm(tmp_path)[0].text.startswith("1 files"), "one is in use"
    subprocess.run(found.answer.split(": ", 1)[1], shell=True, check=True)
    assert doctor.check_shm(tmp_path)[0].level == "ok"


def test_few_open_files() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        found = only(doctor.check_limits(), "warning")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert "may open 512 files" in found.text and found.answer.startswith("ulimit -n")


# ---- the settings


def test_a_good_config_has_nothing_to_say(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(GOOD))
    found, settings = check_config(file)
    assert only(found, "ok").text == f"{file}: policy 'attention'" and settings is not None


def test_a_wrong_setting_and_a_missing_file(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(GOOD | {"smartfrz": {"window": 1, "polcy": "linear"}}))
    found, settings = check_config(file)
    assert [f.level for f in found] == ["problem"] * 2 and settings is None
    assert found[0].text == "smartfrz.window: got 1; allowed: an integer >= 2" and "did you mean 'policy'" in found[1].text
    assert "no such file" in only(check_config(tmp_path / "none.json")[0], "problem").text
    file.write_text(json.dumps(GOOD | {"smartfrz": {"enabled": False}}))
    assert "nothing will freeze" in only(check_config(file)[0], "warning").text


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device: nvme"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device: nvme"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio: 0.5"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "hpZ"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}}, "SuperOffload"),
        ({"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 10}}, "stage3_module_granularity_threshold: 10"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow"),
        ({"tensor_parallel": {"autotp_size": 2}}, "autotp_size"),
        ({"sequence_parallel_size": 2}, "Ulysses"),
        ({"compile": {"deepcompile": True}}, "deepcompile"),
        ({"hybrid_engine": {"enabled": True}}, "hybrid_engine"),
        ({"checkpoint": {"writer": {"type": "fast", "decoupled": True}}}, "checkpoint.writer"),
        ({"datastates_ckpt": {"host_cache_size": 1}}, "datastates"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16_master_weights_and_grads"),
        ({"optimizer": {"type": "OneBitAdam"}}, "OneBitAdam"),
        ({"optimizer": {"type": "Lamb"}}, "Lamb"),
        ({"pipeline": {"activation_checkpoint_interval": 1}}, "reentrant"),
    ],
)
def test_what_freezing_refuses(part: dict[str, Any], words: str) -> None:
    assert refused_by(GOOD) == []
    ((text, answer),) = refused_by(GOOD | part)
    assert words in text and answer


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"zero_optimization": {"stage": 9}}, "zero_optimization.stage: got 9; allowed: 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": "three"}}, "zero_optimization.stage: got 'three'; allowed: 0, 1, 2, 3"),
        ({"zero_optimization": {"stag": 2}}, "zero_optimization.stag: got 2; extra inputs are not permitted"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "zero_optimization.reduce_bucket_size: got 'big'"),
        ({"zero_optimization": {"offload_optimizer": {"device": "gpu"}}}, "zero_optimization.offload_optimizer.device: got 'gpu'"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"ratio": 0.5}}}, "partial offloading only supported for ZeRO Stage 3"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 4}}, "MiCS ZeRO-3 sharding has been removed"),
        ({"amp": {"enabled": True}}, "Apex AMP integration has been removed"),
        ({"fp16": {"enabled": "perhaps"}}, "fp16.enabled: got 'perhaps'"),
        ({"bf16": {"enabld": True}}, "bf16.enabld: got True; extra inputs"),
        ({"zero_optimization": 3}, "zero_optimization: "),
    ],
)
def test_values_that_deepspeed_itself_refuses(part: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert wrong_values(GOOD) == []
    ((text, answer),) = wrong_values(GOOD | part)
    assert words in text and answer
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(GOOD | part))
    assert words in "\n".join(f.text for f in check_config(file)[0] if f.level == "problem")


def test_a_deepspeed_without_the_check_of_removed_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed before 0.19.7: a correct config was reported as one that cannot be checked."""
    monkeypatch.delattr(deepspeed.runtime.config, "_reject_removed_config_keys")
    assert wrong_values(GOOD) == [] and wrong_values(GOOD | {"zero_optimization": {"stage": 9}})


def test_values_that_a_trainer_fills_in_are_none_of_them() -> None:
    auto = {"stage": "auto", "reduce_bucket_size": "auto", "offload_optimizer": {"device": "auto"}}
    assert wrong_values(GOOD | {"zero_optimization": auto, "fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}) == []


def test_leaf_modules_are_no_finding(tmp_path: Path) -> None:
    """DeepSpeed makes them of some models by itself, and freezing supports them: see test_moe.py."""
    (tmp_path / "somebodys_moe.py").write_text(
        "from transformers import MixtralConfig, MixtralForCausalLM as M\n"
        "def build():\n"
        "    return M(MixtralConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,\n"
        "        num_key_value_heads=2, vocab_size=16, num_local_experts=2))\n"
    )
    file = tmp_path / "ds.json"

    def problems(**zero: Any) -> list[str]:
        file.write_text(json.dumps(GOOD | {"zero_optimization": zero}))
        sys.path.insert(0, str(tmp_path))
        try:
            return [f.text for f in examine(file, "somebodys_moe:build").findings if f.check == "model" and f.level == "problem"]
        finally:
            sys.path.remove(str(tmp_path))

    pytest.importorskip("transformers")
    assert problems(stage=2) == problems(stage=3) == problems(stage=3, leaf_module={"classes": ["MixtralSparseMoeBlock"]}) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gradient_clipping": None}, "clips at 1.0"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, "torch_adam is not true"),
        ({"zero_optimization": {"stage": 1}}, "reduce_bucket_size is 5e+08"),
        ({"scheduler": None}, "constant learning rate"),
        ({"scheduler": None, "smartfrz": {"log_path": "x", "policy": "linear"}}, "does not set the length of the run"),
        ({"smartfrz": {}}, "log_path is null"),
        (
            {"smartfrz": {"log_path": "x", "total_steps": 40, "warmup_steps": 100}},
            "first freezing stage is step 100, and the run ends at 40",
        ),
        ({"smartfrz": {"log_path": "x", "total_steps": 400, "snapshot_interval": 10}}, "window of snapshots spans 290 steps"),
        ({"smartfrz": {"log_path": "x", "total_steps": 10}}, "'attention' can freeze at step 11 at the earliest"),
        (
            {"scheduler": {"type": "WarmupLR"}, "smartfrz": {"log_path": "x", "warmup_steps": "20%"}},
            "got '20%', and the length of the run is unknown",
        ),
    ],
)
def test_traps(change: dict[str, Any], words: str) -> None:
    assert traps(GOOD, FreezeConfig.load(GOOD), gpus=0) == []
    raw = {key: value for key, value in (GOOD | change).items() if value is not None}
    ((text, answer),) = traps(raw, FreezeConfig.load(raw), gpus=0)
    assert words in text and answer


def test_traps_of_the_cpu_are_none_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    raw = GOOD | {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}
    assert len(traps(raw, FreezeConfig.load(raw), gpus=0)) == 2
    assert traps(raw, FreezeConfig.load(raw), gpus=8) == []
    assert len(traps({k: v for k, v in raw.items() if k != "smartfrz"}, FreezeConfig(), gpus=8)) == 2  # no section, no log


# ---- the model


def gpt2(**config: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=4, n_embd=32, n_head=2, vocab_size=96, n_positions=64, **config))


def test_the_table_says_what_can_freeze_and_why_not() -> None:
    model = gpt2()
    model.get_submodule("transformer.h.1").requires_grad_(False)
    settings = FreezeConfig.load({"keep_active": ["transformer.h.2"], "max_frozen_fraction": 0.75})
    found, facts = check_model(model, {"input_ids": torch.zeros(1, 16, dtype=torch.long)}, settings)
    assert [(x.name.removeprefix("transformer."), x.kind, x.freezable, x.reason) for x in facts] == [
        ("embeddings", "embedding", True, "its shared weight continues to train in the later layer"),
        ("h.0", "block", True, ""),
        ("h.1", "block", False, "nothing to freeze: its weights were frozen by the user"),
        ("h.2", "block", False, "smartfrz.keep_active"),
        ("h.3", "block", False, "the earlier layer transformer.h.2 stays active"),
        ("head", "head", False, "the head always trains"),
    ]
    assert facts[1].weights == sum(p.numel() for p in model.get_submodule("transformer.h.0").parameters())
    assert sum(x.forward for x in facts) == pytest.approx(1) and facts[0].forward == 0 < facts[1].forward
    assert [x.saved for x in facts] == sorted(x.saved for x in facts) and 0 < facts[1].saved < 0.5
    assert only(found, "ok").text.startswith("6 layers, 2 can freeze") and "counted in a forward" in found[0].text


def test_a_fraction_too_small_for_all_layers() -> None:
    found, facts = check_model(gpt2(), None, FreezeConfig.load({"max_frozen_fraction": 0.34, "tied": "freeze"}))
    assert [x.reason for x in facts] == ["", "", *["max_frozen_fraction 0.34"] * 3, "the head always trains"]
    assert "estimated" in only(found, "ok").text


def test_a_hole_in_front_is_a_warning() -> None:
    settings = FreezeConfig.load({"keep_active": ["embeddings"]})
    found, _ = check_model(gpt2(), None, settings)
    assert "none of the 6 layers can freeze" in only(found, "problem").text
    found, facts = check_model(gpt2(), None, settings.model_copy(update={"order": "any"}))
    assert [x.freezable for x in facts] == [False, True, True, True, True, False] and only(found, "ok")


def test_models_that_freezing_can_do_nothing_with() -> None:
    found, facts = check_model(nn.Linear(3, 3))
    assert "the layers cannot be ordered" in only(found, "problem").text and facts == []
    found, _ = check_model(gpt2(), None, FreezeConfig.load({"keep_active": ["*.nonsense"]}))
    assert "matches no layer" in only(found, "problem").text and "transformer.h.3" in found[0].answer

    class Shared(nn.Module):
        """A weight that is shared outside of an embedding."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.c.weight = self.a.weight

    found, _ = check_model(Shared())
    assert "smartfrz.tied: got 'train'" in only(found, "problem").text


def test_models_are_found_by_callable_and_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "my_nets_for_doctor.py").write_text(
        "import torch\ndef small():\n    return torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))), torch.zeros(1, 4)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    found, facts = check_model(*load_model("my_nets_for_doctor:small"))
    assert [x.forward for x in facts] == pytest.approx([1 / 3] * 3) and "counted" in found[0].text
    transformers.BertConfig(num_hidden_layers=2, architectures=["BertForSequenceClassification"]).save_pretrained(tmp_path / "bert")
    model, batch = load_model(str(tmp_path / "bert"))
    assert type(model).__name__ == "BertForSequenceClassification" and next(model.parameters()).is_meta
    _, facts = check_model(model, batch)
    assert [x.name for x in facts] == ["embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "head"]
    assert sum(x.weights for x in facts) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "words", "remedy"),
    [
        ("odd_nets_for_doctor:number", "it returned int", "return the model"),
        ("odd_nets_for_doctor:broken", "RuntimeError: no such weights (odd_nets_for_doctor.py, line 5)", "needs no data"),
        ("odd_nets_for_doctor:sized", "it raised TypeError: sized() missing 1 required", "takes no arguments"),
        ("odd_nets_for_doctor:nothing", "has no attribute 'nothing'", "number, broken, sized"),
        ("odd_nets_for_doctor:net", "net is a model", "def build(): return net"),
        ("odd_nets_for_doctor:WIDTH", "WIDTH is a int", "MODULE:CALLABLE"),
        ("my_nats:small", "there is no module 'my_nats'", "folder of the script"),
        ("imports_for_doctor:small", "imports_for_doctor imports 'not_on_any_index'", "pip install not_on_any_index"),
        ("./nowhere", "there is no such folder", "save_pretrained"),
        (".", "there is no config.json in it", "save_pretrained"),
    ],
)
def test_a_model_that_can_not_be_built_has_the_remedy_of_its_cause(
    name: str, words: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "odd_nets_for_doctor.py").write_text(
        "import torch\nWIDTH = 3\ndef number(): return WIDTH\ndef broken():\n    raise RuntimeError('no such weights')\n"
        "def sized(width): return torch.nn.Linear(width, width)\nnet = torch.nn.Linear(2, 2)\n"
    )
    (tmp_path / "imports_for_doctor.py").write_text("import not_on_any_index\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for module in ("odd_nets_for_doctor", "imports_for_doctor"):
        sys.modules.pop(module, None)
    with pytest.raises(NotBuilt) as caught:
        load_model(name)
    assert words in str(caught.value) and remedy in caught.value.remedy


def test_a_script_module_is_refused_by_name() -> None:
    whole = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    parts = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    for model, words in ((whole, "the model is a ScriptModule"), (parts, "the module '1' is a ScriptModule")):
        assert words in only(check_model(model)[0], "problem").text


# ---- all of it


def test_problems_come_first_and_long_lists_are_folded(tmp_path: Path) -> None:
    for job in range(9):
        for rank in range(2):
            (tmp_path / f"deepspeed_allreduce_buffer_0_127.0.0.1_{job}_{rank}").touch()
    (found,) = (one for one in doctor.check_shm(tmp_path, 0) if one.level == "warning")
    assert found.text.startswith("18 files") and found.answer == f"remove them: rm {tmp_path}/deepspeed_*"
    text = render(doctor.Examined((Finding("a", "ok", "fine"), Finding("b", "warning", "odd"), Finding("c", "problem", "bad"), found)))
    assert [line.split()[0] for line in text.splitlines() if line[:1] not in (" ", "")][:4] == ["PROBLEM", "WARNING", "WARNING", "ok"]


def test_examine_and_render(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(GOOD))
    fine = examine(file)
    assert [f for f in fine.findings if f.check == "config"] == [Finding("config", "ok", f"{file}: policy 'attention'")]
    if shutil.which("c++"):
        assert fine.exit_code == 0, render(fine)
    (tmp_path / "lock").touch()
    os.utime(tmp_path / "lock", (1, 1))
    bad = examine(file, "no_such_module:model")
    text = render(bad)
    assert bad.exit_code == 1 and "2 problems" in text.splitlines()[-1]
    assert "PROBLEM build locks: " in text and f"-> remove it: rm '{tmp_path / 'lock'}'" in text
    assert "there is no module 'no_such_module'" in " ".join(text.split()) and max(map(len, text.splitlines())) <= 140
