"""FreezeCallback in a real Trainer and prepare with a real Accelerator, against one process with plain torch that freezes the same at the
same steps (worker_hf.py); and scripts that nobody touches."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import ROOT, TESTS, RanksFailed, environment, free_port, launch, run_worker
from reference.bounds import Noisy, distance, no_noise, noisy, spread
from safetensors.torch import load_file
from torch import nn
from workers import worker_hf

import smartfrz_ds
from smartfrz_ds.config.settings import FreezeConfig, with_settings
from smartfrz_ds.integrations.initialize_hook import install_hook
from smartfrz_ds.telemetry.events import FreezeEvent, Status, read_events, read_log
from smartfrz_ds.telemetry.recorded_run import load_run

Saw = Callable[..., dict[str, Any]]
REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
NOT_REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
ANEW = {"restore_callback_states_from_checkpoint": True}
# `epoch` is among what the Trainer logs, and rises: every freeze is a mistake then.
RISING = {"guard": {"metric": "epoch", "tolerance": 1e-3, "window": "17%", "smoothing": 0.0}}
# What the worker's settings are, written as shares of its 12 steps: known only when the Trainer has said how long it trains.
SHARES: dict[str, Any] = {"snapshot_interval": "16%", "freeze_interval": "17%", "linear": {"start_step": "17%", "end_step": "50%"}}


def zero(model: str, stage: int, **more: Any) -> dict[str, Any]:
    return {"model": model, "how": "deepspeed", "stage": stage, "resumes": [4], **more}


CASES: dict[str, dict[str, Any]] = {
    "bert-z1": zero("bert", 1, accumulation=2, json_optimizer=True, smartfrz=SHARES),
    "gpt2-z2": zero("gpt2", 2, arguments=True, save_model=True),
    "llama-z3": zero("llama", 3, trainer=REENTRANT),
    "llama-fsdp2": {"model": "llama", "how": "fsdp2", "format": "SHARDED_STATE_DICT", "resumes": [4]},
}
OTHERS: dict[str, dict[str, Any]] = {
    "guard-ddp": {"model": "llama", "how": "ddp", "smartfrz": {"guard": {"window": 2}}},
    "guard-z2": zero("llama", 2, smartfrz=RISING, resumes=[]),
    "best-z2": zero("llama", 2, run="best"),
}
SLOW: dict[str, dict[str, Any]] = {
    **{f"{m}-z{z}": zero(m, z, resumes=[4, 8]) for m in ("gpt2", "llama", "bert", "t5", "lora") for z in (1, 2, 3)},
    **{f"{m}-ddp": {"model": m, "how": "ddp", "resumes": [4, 8]} for m in ("gpt2", "llama", "t5", "lora")},
    "bert-ddp": {"model": "bert", "how": "ddp", "accumulation": 2, "resumes": [4], "smartfrz": SHARES},
    "gpt2-fsdp2": {"model": "gpt2", "how": "fsdp2", "format": "FULL_STATE_DICT", "resumes": [4, 8]},
    "gpt2-reentrant-z3": zero("gpt2", 3, trainer=REENTRANT),
    "gpt2-recompute-z3": zero("gpt2", 3, trainer=NOT_REENTRANT),
    "llama-reentrant-z2": zero("llama", 2, trainer=REENTRANT),
    "lora-reentrant-z2": zero("lora", 2, trainer=REENTRANT),
    "llama-accumulation-z2": zero("llama", 2, accumulation=2, arguments=True),
    "own-ddp": {"model": "llama", "how": "ddp", "run": "accelerate", "resumes": [4]},
    "clip-ddp": {"model": "llama", "how": "ddp", "clip": 0.1, "resumes": [4]},
    "clip-z2": zero("llama", 2, clip=0.1),
    "bf16-ddp": {"model": "llama", "how": "ddp", "bf16": True, "resumes": [4]},
    "bf16-z2": zero("llama", 2, bf16=True),
    "anew-z2": zero("llama", 2, trainer=ANEW),
    "anew-ddp": {"model": "llama", "how": "ddp", "trainer": ANEW, "resumes": [4]},
    "lora-fsdp2": {"model": "lora", "how": "fsdp2", "format": "SHARDED_STATE_DICT", "resumes": [4]},
    # Of itself Accelerate would shard BertEmbeddings and the embedding in it, and fail.
    "bert-fsdp2": {"model": "bert", "how": "fsdp2", "format": "SHARDED_STATE_DICT", "units": ["BertLayer"], "resumes": [4]},
    **{f"own-z{z}": zero("llama", z, run="accelerate") for z in (1, 2)},
    "own-z3": zero("llama", 3, run="accelerate", resumes=[4, 8]),
    "own-fsdp2": {"model": "llama", "how": "fsdp2", "format": "FULL_STATE_DICT", "run": "accelerate", "resumes": [8]},
    "own-fsdp2-shards": {"model": "llama", "how": "fsdp2", "format": "SHARDED_STATE_DICT", "run": "accelerate", "resumes": [4]},
}
SLOW_OTHERS: dict[str, dict[str, Any]] = {
    "bf16-unfrozen-z2": zero("llama", 2, bf16=True, smartfrz={"policy": "manual"}, resumes=[]),
    "best-ddp": {"model": "llama", "how": "ddp", "run": "best"},
    "again-ddp": {"model": "llama", "how": "ddp", "run": "again"},
    **{f"again-z{z}": zero("llama", z, run="again") for z in (2, 3)},
}
# DeepSpeed's ZeRO-3 sums in another order than one process in some of these, with nothing frozen too; so does the norm for clipping. Of
# each the roundings that the sums are kept in.
ROUNDED = dict.fromkeys(("lora-z3", "own-z3", "bert-z3", "llama-z3", "t5-z3", "clip-z2"), torch.float32)
# DeepSpeed's bf16 keeps the weights themselves in bf16, the oracle's autocast does not: here the engine with nothing frozen is the measure.
UNFROZEN, NEAR = {"bf16-z2": "bf16-unfrozen-z2"}, 1.25
# T5 hands its position bias from block to block. In the first forward after a resume it is asked to require grad (nobody knows yet whether
# layers are checkpointed), and torch takes another attention kernel; with the plain one (SDPBackend.MATH) the difference is 0.
RESUMED = {f"t5-{how}" for how in ("z1", "z2", "z3", "ddp")}


def all_of(folder: Path, cases: dict[str, dict[str, Any]], timeout: float) -> Path:
    return run_worker("hf", [{"name": name, **case} for name, case in cases.items()], folder, timeout=timeout)


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return all_of(tmp_path_factory.mktemp("hf"), CASES | OTHERS, 300)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return all_of(tmp_path_factory.mktemp("hf_slow"), SLOW | SLOW_OTHERS, 900)


def saw(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{name}.{rank}.json").read_text())


def check(folder: Path, name: str, case: dict[str, Any]) -> None:
    """Weights as of plain torch with the same freezes, resumed too; the freezes where the settings put them; and a run without is far."""
    events = saw(folder, name)["events"]

    def oracle(noise: Noisy = no_noise) -> dict[str, torch.Tensor]:
        return worker_hf.reference(case, events, noise=noise)

    expected, plain = oracle(), worker_hf.reference(case, [])
    for rank in range(2):
        facts = saw(folder, name, rank)
        front = [layer for layer in facts["layers"] if layer != "head" and not (case["model"] == "lora" and layer == "embeddings")][:3]
        assert facts["events"] == [["freeze", 2, front[:1]], ["freeze", 4, front[1:2]], ["freeze", 6, front[2:]]]
        assert facts["frozen"] == front and facts["step"] == facts["total_steps"] == worker_hf.STEPS
        assert facts["saved_flops"] > 0.05 and not facts["hooked"]
        for step, resumed in facts["resumed"].items():
            allowed = spread(noisy(oracle, since=int(step)), expected) if name in RESUMED else 0.0
            assert resumed["worst"] <= allowed, resumed["worst"]
            assert resumed["events"] == facts["events"] and not resumed["hooked"]
        assert sorted(facts["resumed"]) == sorted(map(str, case["resumes"]))
    got = load_file(folder / f"{name}.safetensors")
    bound = spread(noisy(oracle, dtype=ROUNDED[name]), expected, ROUNDED[name]) if name in ROUNDED else 0.0
    if name in UNFROZEN:
        bound = NEAR * distance(plain, load_file(folder / f"{UNFROZEN[name]}.safetensors"))
    assert distance(expected, got) <= bound
    assert distance(plain, got) > max(3 * bound, 1e-3), "a step of AdamW is up to 1e-2 here"


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_plain_torch_with_the_same_freezes(default: Path, name: str) -> None:
    check(default, name, CASES[name])


@pytest.mark.slow
@pytest.mark.distributed(2)
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name", SLOW)
def test_the_whole_matrix(slow: Path, name: str) -> None:
    check(slow, name, SLOW[name])


def test_frozen_layers_show_in_the_logs(default: Path) -> None:
    """In what the Trainer keeps, and in what a callback is shown that came before (as TensorBoard's does)."""
    facts = saw(default, "gpt2-z2")
    for logs in (facts["log_history"], facts["seen_logs"]):
        steps = [entry for entry in logs if "loss" in entry]
        assert [entry["smartfrz/frozen_layers"] for entry in steps] == [0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3]
        saved = [entry["smartfrz/saved_flops"] for entry in steps]
        assert saved[0] == 0.0 and saved == sorted(saved) and saved[-1] == facts["saved_flops"]
        assert steps[-1]["smartfrz/optimizer_bytes"] < steps[1]["smartfrz/optimizer_bytes"]


def test_save_model_after_training(default: Path) -> None:
    assert saw(default, "gpt2-z2")["saved_apart"] == 0.0


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_peft_checkpoint_holds_the_frozen_adapters_and_not_the_base_model(slow: Path) -> None:
    """The Trainer saves PEFT models with exclude_frozen_parameters: what is frozen by us must be in the file all the same."""
    names = saw(slow, "lora-z2")["saved_names"]
    assert all("lora_" in name for name in names) and any(".layers.0." in name for name in names)


def test_the_guard_sees_the_loss_and_what_is_logged(default: Path) -> None:
    """A guard that sees nothing warns at the first freeze."""
    assert [event[0] for event in saw(default, "guard-ddp")["events"]] == ["freeze"] * 3
    assert [event[:2] for event in saw(default, "guard-z2")["events"][:2]] == [["freeze", 2], ["thaw", 3]]


@pytest.mark.parametrize("name", ["best-z2", pytest.param("best-ddp", marks=[pytest.mark.slow, pytest.mark.timeout(1000)])])
def test_the_best_model_is_loaded_at_the_end(name: str, request: pytest.FixtureRequest) -> None:
    facts = saw(request.getfixturevalue("default" if name in OTHERS else "slow"), name)
    assert facts["best"] == 4 and facts["worst"] == 0.0 and facts["trainable"]
    front = ["embeddings", "model.layers.0", "model.layers.1"]
    freezes = [["freeze", 2 * i + 2, [layer]] for i, layer in enumerate(front)]
    records = read_log(Path(facts["log_path"]))
    assert [r.step for r in records if isinstance(r, Status)] == list(range(2, 13, 2))
    assert [[e.kind, e.step, list(e.layers)] for e in records if isinstance(e, FreezeEvent)] == facts["events"]
    run = load_run(Path(facts["log_path"]))
    assert run.last_step == 12 and run.last_load is not None and list(run.frozen) == front
    if name == "best-z2":  # DeepSpeed's load brings the layout of then
        assert facts["frozen"] == front[:2] == list(run.last_load.frozen)
        assert facts["events"] == [*freezes, ["load", 4, front[2:]]]
    else:
        assert facts["events"] == [*freezes, ["load", 12, []]] and run.last_load.message.endswith("weights only")


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name", ["again-ddp", "again-z2", "again-z3"])
def test_a_model_is_trained_several_times(slow: Path, name: str) -> None:
    """Once more, after a training that broke off too; between trainings everything trains."""
    facts = saw(slow, name)
    assert facts["second"]["worst"] == facts["third"]["worst"] == 0.0
    assert facts["second"]["events"] == facts["third"]["events"] == facts["first"]["events"]
    assert facts["broken"]["events"] == facts["first"]["events"] and facts["broken"]["step"] == 7
    assert facts["first"]["before"] == facts["second"]["before"] == facts["broken"]["before"] == [] and facts["trainable"]
    if name != "again-ddp":
        assert facts["after"] == {"worst": 0.0, "frozen": facts["first"]["frozen"]}


def test_one_process_goes_on_from_a_checkpoint_that_was_just_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, no process group; and a run that ends in the moment when the Trainer has written its files."""
    case: dict[str, Any] = {"name": "one", "model": "llama", "how": "alone"}
    try:
        trainer = worker_hf.trainer_for(case, tmp_path)
        trainer.train()
        facts, weights = worker_hf.facts_of(trainer), worker_hf.full(trainer.model)
        assert list(facts["frozen"]) == ["embeddings", "model.layers.0", "model.layers.1"]
        assert worker_hf.apart(worker_hf.reference(case, facts["events"], world=1), weights) == 0.0

        def killed(*args: Any, **kwargs: Any) -> None:
            if trainer.state.global_step == 8:
                raise InterruptedError

        # what the Trainer calls after it has saved: a method in transformers 4
        place, name = (
            (transformers.Trainer, "_rotate_checkpoints")
            if hasattr(transformers.Trainer, "_rotate_checkpoints")
            else (transformers.trainer, "rotate_checkpoints")
        )
        monkeypatch.setattr(place, name, killed)
        trainer = worker_hf.trainer_for({**case, "name": "killed"}, tmp_path)
        with pytest.raises(InterruptedError):
            trainer.train()
        trainer = worker_hf.trainer_for({**case, "name": "killed"}, tmp_path, save_strategy="no")
        trainer.train(resume_from_checkpoint=True)
        assert worker_hf.apart(worker_hf.full(trainer.model), weights) == 0.0
        assert worker_hf.facts_of(trainer)["events"] == facts["events"]
    finally:
        worker_hf.reset()


def test_a_callback_goes_from_one_trainer_to_the_next(tmp_path: Path) -> None:
    """A save asks the callback for its state on rank 0 alone. The first Trainer, which still has the callback, must not make that look like
    the start of a training: the controller was detached, and with more ranks the next step hung."""
    case: dict[str, Any] = {"name": "one", "model": "llama", "how": "alone"}
    try:
        first = worker_hf.trainer_for(case, tmp_path)
        first.train()
        first.accelerator.free_memory()
        second = worker_hf.trainer_for({**case, "name": "two"}, tmp_path, callback=first.freezer)
        second.train()
        facts, before = worker_hf.facts_of(second), worker_hf.facts_of(first)
        assert list(facts["frozen"]) == ["embeddings", "model.layers.0", "model.layers.1"]
        assert facts["events"] == before["events"] and facts["step"] == worker_hf.STEPS
    finally:
        worker_hf.reset()


def script_arguments(folder: Path, *more: str) -> list[str]:
    given = {"output_dir": folder / "out", "max_steps": 7, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 6}
    flat = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    return [*flat, "--report_to", "none", "--use_cpu", "--per_device_eval_batch_size", "64", *more]


def check_script(folder: Path) -> None:
    frozen = [(e.step, e.layers) for e in read_events(folder / "events.jsonl") if e.kind == "freeze"]
    assert frozen == [(2, ("embeddings",)), (4, ("transformer.h.0",)), (6, ("transformer.h.1",))]
    assert (folder / "out" / "model.safetensors").is_file() and (folder / "out" / "checkpoint-6").is_dir()


def script_config(folder: Path, stage: int) -> Path:
    path = folder / "ds.json"
    config = worker_hf.ds_config({"how": "deepspeed", "stage": stage, "smartfrz": {"log_path": str(folder / "events.jsonl")}})
    path.write_text(json.dumps(config | {"gradient_clipping": "auto"}))
    return path


@pytest.mark.distributed(2)
def test_somebodys_trainer_freezes_unchanged(tmp_path: Path) -> None:
    config = script_config(tmp_path, 2)
    script = str(TESTS / "workers" / "somebodys_trainer.py")
    launch("smartfrz_ds", script, *script_arguments(tmp_path, "--deepspeed", str(config)), module=True)
    check_script(tmp_path)


def accelerate_launch(file: str, *arguments: str) -> None:
    """`accelerate launch` with one of the files in configs/, two ranks."""
    accelerate = Path(sys.executable).with_name("accelerate")
    command = [str(accelerate), "launch", "--config_file", f"configs/{file}", "--main_process_port", str(free_port()), *arguments]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RanksFailed(f"{command}: exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")


@pytest.mark.slow
@pytest.mark.distributed(2)
@pytest.mark.parametrize("file", ["zero1", "zero3", "fsdp2"])
def test_accelerates_files_work_as_they_are(tmp_path: Path, file: str) -> None:
    """configs/accelerate_….yaml with a script that prepares through us; the settings are the script's."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    accelerate_launch(f"accelerate_{file}.yaml", str(script), str(tmp_path / "events.jsonl"), file)
    events = read_events(tmp_path / "events.jsonl")
    assert [e.layers for e in events if e.kind == "freeze"] == [("embeddings",), ("model.layers.0",), ("model.layers.1",)]


SCRIPT = """
import sys
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import PartialState
from accelerate.utils import DistributedType
import smartfrz_ds

if sys.argv[2] == "fsdp2":  # Accelerate shards on accelerators only: it is told that this CPU is one
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
torch.manual_seed(0)
size = dict(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, max_position_embeddings=16))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = torch.utils.data.DataLoader(torch.randint(0, 40, (80, 8)), batch_size=4)
# On CPUs Accelerate takes DeepSpeed's processes for one where it isn't told the backend.
accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
settings = dict(policy="linear", linear={"start_step": 2, "end_step": 6}, max_frozen_fraction=0.5, warmup_steps=0, cooldown=0)
model, optimizer, loader = smartfrz_ds.prepare(
    accelerator, model, optimizer, loader, **settings, snapshot_interval=2, freeze_interval=2, log_path=sys.argv[1]
)
for batch in loader:
    accelerator.backward(model(input_ids=batch, labels=batch).loss)
    optimizer.step()
    optimizer.zero_grad()
assert len(accelerator.smartfrz.frozen) == 3, accelerator.smartfrz.frozen
backend = {"zero1": "ZeRO-1", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}[sys.argv[2]]
assert accelerator.smartfrz.backend.name == backend, accelerator.smartfrz.backend.name
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("name", ["_load_optimizer_and_scheduler", "_save_optimizer_and_scheduler"])
def test_a_trainer_without_the_methods_that_are_wrapped_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transformers.Trainer, name)
    with pytest.raises(RuntimeError, match=f"transformers {transformers.__version__} has no Trainer.{name}"):
        smartfrz_ds.FreezeCallback()


def test_settings_by_name_stand_over_those_of_the_config() -> None:
    base = {"smartfrz": {"policy": "linear", "seed": 3}, "train_batch_size": 8}
    assert with_settings(base, {"seed": 4}) == FreezeConfig.load({"policy": "linear", "seed": 4})
    assert with_settings(FreezeConfig.load(base), {"seed": 4}) == FreezeConfig.load({"policy": "linear", "seed": 4})
    assert with_settings(None, {}) == FreezeConfig()
    with pytest.raises(ValueError, match=r"smartfrz\.sed: unknown key"):
        with_settings(base, {"sed": 4})
    with pytest.raises(ValueError, match=r"smartfrz\.polcy: unknown key"):
        smartfrz_ds.FreezeCallback(polcy="linear")
    with pytest.raises(ValueError, match=r"smartfrz\.policy: got \"nope\""):
        smartfrz_ds.FreezeCallback({"policy": "nope"})


def test_the_trainer_can_keep_the_callback_in_its_state(tmp_path: Path) -> None:
    """trainer_state.json: a callback made anew from it has the same settings, and nothing is hooked meanwhile."""
    kept = json.loads(json.dumps(smartfrz_ds.FreezeCallback({"policy": "linear"}, seed=4)._given()))
    assert smartfrz_ds.FreezeCallback(**kept)._settings_over(None) == FreezeConfig.load({"policy": "linear", "seed": 4})


def test_a_hook_that_waited_for_an_engine_is_gone_when_that_fails() -> None:
    """The Trainer that asked for it may never come back; another one must get a plain engine."""
    plain = deepspeed.initialize

    def wrong(source: Any) -> FreezeConfig:
        raise ValueError("wrong settings")

    install_hook(wrong, defer_policy=True)
    assert deepspeed.initialize is not plain
    with pytest.raises(ValueError, match="wrong settings"):
        deepspeed.initialize(config={})
    assert deepspeed.initialize is plain


def test_importing_the_package_imports_no_transformers() -> None:
    code = "import sys, smartfrz_ds; sys.exit(any(name in sys.modules for name in ('transformers', 'accelerate')))"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=120).returncode == 0


def test_prepare_wants_a_model_and_its_optimizer() -> None:
    with pytest.raises(ValueError, match="prepare: got nothing; allowed: exactly one model"):
        smartfrz_ds.prepare(object())


def test_accelerates_state_of_before_is_loaded(tmp_path: Path) -> None:
    """Without a freeze state in it: nothing is frozen then, and the steps are the optimizer's. What isn't there changes nothing."""

    def train(accelerator: Any, model: Any, optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            accelerator.backward(model(torch.ones(2, 4)).square().mean())
            optimizer.step()
            optimizer.zero_grad()

    def made() -> tuple[Any, Any, Any]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        return Accelerator(cpu=True), model, torch.optim.AdamW(model.parameters())

    try:
        accelerator, *parts = made()
        train(accelerator, *accelerator.prepare(*parts), 3)
        accelerator.save_state(str(tmp_path))
        accelerator, *parts = made()
        model, optimizer = smartfrz_ds.prepare(accelerator, *parts, policy="manual", layers=["0", "1", "2"])
        train(accelerator, model, optimizer, 1)
        accelerator.smartfrz.freeze(["0"])
        with pytest.raises(ValueError, match="does not exist"):
            accelerator.load_state(str(tmp_path / "no"))
        assert accelerator.smartfrz.frozen == ("0",)
        accelerator.load_state(str(tmp_path))
        assert accelerator.smartfrz.frozen == () and accelerator.smartfrz.step == 3
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
