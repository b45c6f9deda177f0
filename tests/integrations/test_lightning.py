"""LightningFreezeCallback in a real Lightning Trainer, against one process with plain torch that freezes the same at the same steps
(worker_lightning.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from docs_blocks import blocks
from helpers import ROOT, environment, free_port, run_worker

pytest.importorskip("lightning.pytorch", reason="PyTorch Lightning is not installed (pip install 'smartfrz_ds[lightning]')")

from lightning.pytorch.callbacks import BackboneFinetuning, Callback, EarlyStopping, EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import SingleDeviceXLAStrategy
from reference import oracle
from reference.bounds import noisy, spread
from reference.own_policies import EveryThird
from workers import worker_lightning as worker
from workers.worker_lightning import Module, checkpoint, facts_of, fit, loader, module_of, trainer_for, whole

import smartfrz_ds
from smartfrz_ds.integrations.lightning_trainer import MovesLess, kind_of
from smartfrz_ds.signals.lr_forecast import forecast

pytestmark = [pytest.mark.filterwarnings(f"ignore:::{name}") for name in ("lightning", "pytorch_lightning", "torch", "torchmetrics")]

FREEZES = [["freeze", 2, ["embeddings"]], ["freeze", 4, ["net.blocks.0"]], ["freeze", 6, ["net.blocks.1", "net.blocks.2"]]]
PLANNED = [["freeze", 2, ["embeddings", "net.blocks.0"]], ["thaw", 5, ["net.blocks.0"]], ["freeze", 8, ["net.blocks.0", "net.blocks.1"]]]


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"how": "deepspeed", "stage": stage, **more}


CASES: dict[str, dict[str, Any]] = {
    "ddp": {"how": "ddp", "plan": worker.PLAN, "keep_state": 5, "accumulation": 2, "resumes": [3, 8], "ends": 1},
    "z2": zero(2, resumes=[3], again=4),
    "z3": zero(3, accumulation=2, resumes=[8]),
    "fsdp2": {"how": "fsdp2", "resumes": [3], "ends": 1},
}
SLOW: dict[str, dict[str, Any]] = {}
"""The table of docs/lightning.md: each strategy, with each column."""
for how, given in {
    "ddp": {"how": "ddp"},
    "fsdp1": {"how": "fsdp1", "format": "sharded"},
    "fsdp2": {"how": "fsdp2"},
    "fsdp2-full": {"how": "fsdp2", "format": "full"},
    **{f"z{stage}": zero(stage) for stage in range(4)},
}.items():
    SLOW[f"{how}-straight"] = {**given, "resumes": [3, 6, 8], "again": 4, "tests": True}
    if "fsdp" in how:  # a second fit() of one sharded module is not exact in Lightning 2.6, or fails, with nothing frozen too
        SLOW[f"{how}-straight"].pop("again")
    if how == "z3":  # DeepSpeed 0.19 can't load a checkpoint into the engine that Lightning 2.6 makes for it, with nothing frozen too
        SLOW[f"{how}-straight"].pop("tests")
    SLOW[f"{how}-thaw"] = {**given, "plan": worker.PLAN, "keep_state": 5, "resumes": [3, 5], "by_forward": True}
    SLOW[f"{how}-accumulation"] = {**given, "accumulation": 2, "resumes": [8]}
    SLOW[f"{how}-ended"] = {**given, "ends": 1}
    if given["how"] == "deepspeed":
        SLOW[f"{how}-bf16"] = {**given, "precision": "bf16-mixed", "resumes": [3]}
    if how != "fsdp1":  # whose norm Lightning does not clip
        SLOW[f"{how}-clip"] = {**given, "clip": 0.1, "resumes": [8]}


def all_of(folder: Path, cases: dict[str, dict[str, Any]], timeout: float) -> Path:
    return run_worker("lightning", [{"name": name, **case} for name, case in cases.items()], folder, timeout=timeout)


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return all_of(tmp_path_factory.mktemp("lightning"), CASES, 240)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return all_of(tmp_path_factory.mktemp("lightning_slow"), SLOW, 900)


def check(facts: dict[str, Any], case: dict[str, Any]) -> None:
    """Weights as of plain torch with the same freezes, and those of each resumed run as of the run that was not interrupted."""
    events = PLANNED if case.get("plan") else FREEZES
    assert plain(facts["events"]) == events and facts["step"] == worker.STEPS == facts["total_steps"]
    bound = 0.0
    # The norm of a clipped step is summed in another order, and so are an FSDP2 unit's gradients, which are reduced in each micro-batch
    # before they are added up.
    if case.get("clip") or (case["how"] == "fsdp2" and case.get("accumulation")):
        cell, world = worker.cell_of(case, worker.plan_of(plain(facts["events"]))), 1 if case["how"] == "alone" else 2
        bound = spread(
            noisy(lambda noise: oracle.reference(cell, world=world, noise=noise).weights[-1]),
            oracle.reference(cell, world=world).weights[-1],
        )
    assert facts["rms"] <= bound and (bound or facts["worst"] == 0.0)
    assert facts["unfrozen"] > 1e-2, "a step of AdamW is up to 1e-2 here"
    assert facts["saved_flops"] > 0.05 and facts["trainable"]
    assert sorted(facts["resumed"], key=int) == [str(step) for step in case.get("resumes", ())]
    for resumed in [
        *facts["resumed"].values(),
        *(facts[key] for key in ("again", "ended") if key in case or (key == "ended" and "ends" in case)),
    ]:
        assert resumed["worst"] == 0.0
        assert plain(resumed["events"]) == events and resumed["frozen"] == facts["frozen"] and resumed["step"] == worker.STEPS
    if "tested" in facts:
        before, after = facts["tested"]
        assert before != after


def plain(events: Any) -> list[list[Any]]:
    return [[kind, step, list(layers)] for kind, step, layers in events]


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_plain_torch_with_the_same_freezes(default: Path, name: str) -> None:
    for rank in range(2):
        check(json.loads((default / f"{name}.{rank}.json").read_text()), {"name": name, **CASES[name]})


@pytest.mark.slow
@pytest.mark.distributed(2)
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name", SLOW)
def test_the_whole_table(slow: Path, name: str) -> None:
    for rank in range(2):
        check(json.loads((slow / f"{name}.{rank}.json").read_text()), {"name": name, **SLOW[name]})


SCRIPT = """
import sys
from pathlib import Path
from workers import worker_lightning as worker

case = {"name": "launched", "how": "ddp", "devices": 2}
trainer, weights = worker.fit(case, Path(sys.argv[1]))
total = sum(float(w.double().sum()) for w in weights.values())
print("RANK", trainer.global_rank, trainer.freezer.controller.frozen, total, flush=True)
"""


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_ranks_that_lightning_starts_itself(tmp_path: Path) -> None:
    """Its launcher runs the script once more for each further rank, and its strategy creates the process group."""
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {**environment(), "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-W", "ignore", str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = sorted(line.split(maxsplit=2) for line in done.stdout.splitlines() if line.startswith("RANK"))
    assert [line[1] for line in lines] == ["0", "1"] and lines[0][2] == lines[1][2] and "net.blocks.2" in lines[0][2]


# --- one process ------------------------------------------------------------------------------------------------------------------

ALONE: dict[str, Any] = {"name": "alone", "how": "alone"}


def through_json(facts: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(facts))


@pytest.mark.parametrize(
    "more",
    [
        {"resumes": [3, 8], "again": 4, "ends": 1, "tests": True},
        {"plan": worker.PLAN, "keep_state": 5, "accumulation": 2, "clip": 0.1, "by_forward": True, "resumes": [5], "ends": 1},
        {"manual": True, "resumes": [7]},
    ],
    ids=["straight", "thaw-accumulation-clip", "manual"],
)
def test_one_device(tmp_path: Path, more: dict[str, Any]) -> None:
    case = {**ALONE, **more}
    check(through_json(worker.run(case, tmp_path)), case)


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([w.reshape(-1) for w in weights.values()])


def apart_from_oracle(trainer: Any, weights: dict[str, torch.Tensor]) -> float:
    cell = worker.cell_of(ALONE, worker.plan_of(plain(facts_of(trainer)["events"])))
    return float((oracle.reference(cell, world=1).weights[-1] - flat(weights)).abs().max())


def test_a_trainer_of_the_other_package(tmp_path: Path) -> None:
    """`lightning.pytorch` and `pytorch_lightning` are the same code with classes of their own."""
    other = pytest.importorskip("pytorch_lightning", reason="only one of the two packages is installed")
    own = {name: value for name, value in vars(Module).items() if name in ("forward", "loss_at", "training_step", "configure_optimizers")}

    def build(self: Any) -> None:
        other.LightningModule.__init__(self)
        self.net, self.accumulation, self.by_forward = oracle.Net(), 1, False

    module = type("Other", (other.LightningModule,), {**own, "__init__": build})()
    trainer = trainer_for(ALONE, tmp_path, package="pytorch_lightning")
    trainer.fit(module, loader(ALONE))
    assert plain(facts_of(trainer)["events"]) == FREEZES and apart_from_oracle(trainer, whole(module)) == 0.0


@pytest.mark.parametrize("how", [pytest.param("module", marks=pytest.mark.slow), "net", "call"])
def test_a_compiled_module(tmp_path: Path, how: str) -> None:
    class Quiet(Module):  # dynamo of torch 2.13 can't trace self.log of Lightning 2.6, with this package or without it
        def log(self, *_: Any, **__: Any) -> None: ...

    module = Quiet() if how == "module" else Module()
    if how == "module":
        module = torch.compile(module, backend="aot_eager")
    else:
        (module if how == "call" else module.net).compile(backend="aot_eager")
    trainer, weights = fit(ALONE, tmp_path, module=module)
    assert plain(facts_of(trainer)["events"]) == FREEZES and apart_from_oracle(trainer, weights) == 0.0
    torch._dynamo.reset()


def test_a_policy_of_ones_own_is_passed_as_an_object(tmp_path: Path) -> None:
    quick = {"warmup_steps": 0, "freeze_interval": 1, "snapshot_interval": 1, "cooldown": 0, "max_frozen_fraction": 0.3}
    trainer, _ = fit(ALONE, tmp_path, freezer=smartfrz_ds.LightningFreezeCallback(policy=EveryThird(every=4), **quick))
    assert [[kind, step, list(layers)] for kind, step, layers in facts_of(trainer)["events"]] == [
        ["freeze", 4, ["embeddings"]],
        ["freeze", 8, ["net.blocks.0"]],
    ]


def test_frozen_layers_show_in_the_metrics_and_the_controller_sees_theirs(tmp_path: Path) -> None:
    """Also beside early stopping, a validation in the middle, and averaged weights that are swapped in for it."""
    sees, more = worker.Sees(), [EarlyStopping("val_loss", patience=99), EMAWeightAveraging(decay=0.5)]
    trainer, weights = fit(ALONE, tmp_path, callbacks=[sees, *more], validation=[loader(ALONE, 1)], val_check_interval=3)
    assert sees.logged == [0, 1, 1, 2, 2, 4, 4, 4, 4, 4, 4, 4]
    assert {"smartfrz/saved_flops", "smartfrz/optimizer_bytes"} <= set(trainer.callback_metrics)
    assert {"train_loss", "val_loss"} <= set(trainer.freezer.controller.metrics)
    assert plain(facts_of(trainer)["events"]) == FREEZES and apart_from_oracle(trainer, weights) == 0.0


@pytest.mark.parametrize(("metric", "rises"), [("loss", False), ("val_rises", True)])
def test_the_guard_sees_the_loss_and_what_is_logged(tmp_path: Path, metric: str, rises: bool) -> None:
    class Rises(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_rises", float(self.trainer.global_step + 1))

    guard = {"metric": metric, "tolerance": 1e-3, "window": 2, "smoothing": 0.0} if rises else {"window": 2, "tolerance": 1.0}
    case = {**ALONE, "smartfrz": {"guard": guard}}
    trainer, _ = fit(case, tmp_path, module=Rises(), validation=[loader(ALONE, 1)], val_check_interval=1)
    kinds = [event[0] for event in facts_of(trainer)["events"]]
    assert ("thaw" in kinds) == rises  # a guard that sees nothing warns at the first freeze


def test_a_training_step_that_returns_none_is_not_a_step(tmp_path: Path) -> None:
    class Skips(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 3 else loss

    trainer, _ = fit(ALONE, tmp_path, module=Skips())
    assert (facts_of(trainer)["step"], trainer.global_step) == (10, 12)


def test_several_optimizers_are_one_step(tmp_path: Path) -> None:
    class Two(Module):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.loss_at(self.trainer.fit_loop.total_batch_idx, 0)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            params = list(self.parameters())
            return [torch.optim.AdamW(half, lr=oracle.LR, weight_decay=oracle.DECAY) for half in (params[:8], params[8:])]

    trainer, _ = fit(ALONE, tmp_path, module=Two(manual=True))
    facts = facts_of(trainer)
    assert facts["step"] == worker.STEPS and plain(facts["events"]) == FREEZES and facts["trainable"]


def test_a_scheduler_that_moves_once_per_epoch_is_forecast_in_steps() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step, actual, forecasts = 0, [], []
    slow = MovesLess(scheduler, 3, lambda: step)
    for step in range(13):
        if step and step % 3 == 0:
            forecasts.append((step, forecast(slow, 4)[1:]))  # between a step and the move after it
            scheduler.step()
        forecasts.append((step, forecast(slow, 4)))
        optimizer.step()
        actual.append(optimizer.param_groups[0]["lr"])
    for begin, ahead in forecasts:
        found = actual[begin : begin + len(ahead)]
        assert found == ahead[: len(found)], begin


# --- checkpoints of other runs ----------------------------------------------------------------------------------------------------


def test_checkpoints_with_and_without_a_freeze_state(tmp_path: Path) -> None:
    frozen, straight = fit(ALONE, tmp_path, saves=True)
    path = checkpoint(ALONE, tmp_path, 4)

    # the settings turned off: what is frozen stays so, nothing more freezes
    off, _ = fit({**ALONE, "smartfrz": {"enabled": False}}, tmp_path, path)
    assert off.freezer.controller.frozen == ("embeddings", "net.blocks.0") and off.freezer.controller.step == worker.STEPS
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):  # torch's own words, without the callback
        fit(ALONE, tmp_path, path, freezer=Callback())

    loaded = Module.load_from_checkpoint(path, weights_only=True)
    assert all(p.requires_grad for p in loaded.parameters()) and worker.apart(straight, whole(loaded)) > 0

    # a run without the callback, resumed with it: the steps are counted on
    fit({**ALONE, "name": "without"}, tmp_path, saves=True, freezer=Callback())
    trainer, _ = fit(ALONE, tmp_path, checkpoint({"name": "without"}, tmp_path, 4))
    assert facts_of(trainer)["step"] == worker.STEPS and trainer.freezer.controller.frozen == frozen.freezer.controller.frozen

    damaged = torch.load(path, weights_only=True)
    damaged["smartfrz"]["state"] = damaged["smartfrz"]["state"][:-9]
    torch.save(damaged, tmp_path / "damaged.ckpt")
    with pytest.raises(ValueError, match=r"the freeze state in .*damaged\.ckpt can't be read"):
        fit(ALONE, tmp_path, tmp_path / "damaged.ckpt")


def test_a_fit_that_was_interrupted_leaves_nothing_in_the_next(tmp_path: Path) -> None:
    class Breaks(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                raise InterruptedError

    module = module_of(ALONE)
    with pytest.raises(InterruptedError):
        fit(ALONE, tmp_path, module=module, callbacks=[Breaks()])
    assert not all(p.requires_grad for p in module.parameters())
    before = [p.detach().clone() for p in module.parameters()]
    trainer, _ = fit(ALONE, tmp_path, module=module)  # another Trainer, with a callback of its own
    facts = facts_of(trainer)
    assert plain(facts["events"]) == FREEZES and facts["trainable"]
    assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    hooks = [h for m in module.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert hooks == [] and "training_step" not in vars(trainer.strategy) and "teardown" not in vars(trainer.strategy)


def test_python_block_of_the_docs(tmp_path: Path) -> None:
    (block,) = [b for b in blocks("python", "docs/lightning.md") if not b.not_run]

    def short(**settings: Any) -> Any:
        """The page's Trainer, but on one CPU and without files."""
        return trainer_for(ALONE, tmp_path, freezer=settings.pop("callbacks")[0], **settings | {"strategy": "auto"})

    names: dict[str, Any] = {"Trainer": short, "smartfrz_ds": smartfrz_ds, "model": Module(), "loader": loader(ALONE)}
    block.run(names)
    assert names["trainer"].freezer.controller.total_steps == worker.STEPS


# --- wrong use --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (lambda: BackboneFinetuning(), "BackboneFinetuning cannot be used with LightningFreezeCallback, it freezes and unfreezes"),
        (lambda: StochasticWeightAveraging(1e-2), "StochasticWeightAveraging cannot be used"),
        (lambda: smartfrz_ds.LightningFreezeCallback(policy="manual"), "several LightningFreezeCallbacks; allowed: one"),
    ],
)
def test_callbacks_that_are_refused(tmp_path: Path, callback: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit(ALONE, tmp_path, callbacks=[callback()])


def test_strategies_that_are_refused() -> None:
    strategy = SingleDeviceXLAStrategy.__new__(SingleDeviceXLAStrategy)  # it can't be made without a TPU
    with pytest.raises(ValueError, match="got SingleDeviceXLAStrategy; LightningFreezeCallback supports SingleDeviceStrategy, DDPStrategy"):
        kind_of(strategy)


def test_wrong_settings_and_a_callback_that_comes_late(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="freeze_intervall"):
        smartfrz_ds.LightningFreezeCallback(freeze_intervall=3)
    with pytest.raises(ValueError, match="freeze_interval"):
        fit({**ALONE, "smartfrz": {"freeze_interval": -3}}, tmp_path)

    class Late(Callback):
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            trainer.callbacks.append(smartfrz_ds.LightningFreezeCallback(policy="manual"))

    with pytest.raises(RuntimeError, match=r"fit\(\) began without it"):
        fit(ALONE, tmp_path, freezer=Late())

    class Bare(Module):
        def configure_optimizers(self) -> None: ...

    with pytest.raises(ValueError, match="configure_optimizers: got no optimizer"):
        fit(ALONE, tmp_path, module=Bare())
