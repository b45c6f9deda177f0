"""The tasks of `smartfrz bench policies`: their data, their networks, and which runs they allow."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from smartfrz_ds.bench.policies.command import bench_policies
from smartfrz_ds.bench.policies.files import POLICIES_FILE, TaskFile, find_tasks, read_policies
from smartfrz_ds.bench.policies.runs import Job, plan_runs
from smartfrz_ds.bench.policies.setups import data
from smartfrz_ds.bench.policies.setups.prepare import CrossEntropy, check_packages, prepare
from smartfrz_ds.bench.policies.worker import alone, run

# peft reads it (transformers 5)
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")

DESIGN = {"cnn-half", "gpt-pydoc", "minilm-bbc", "rescnn-mnist", "vit-mnist"}


def test_tasks_are_split_into_design_and_looked_at_once() -> None:
    tasks = find_tasks()
    assert {name for name, task in tasks.items() if task.use == "design"} == DESIGN
    once = {name: task for name, task in tasks.items() if task.use == "once"}
    assert len(once) >= 6 and all(task.pretrained for task in once.values())
    assert max(task.steps for task in once.values()) >= 2000


def test_a_task_may_ask_for_few_runs() -> None:
    planned = plan_runs(find_tasks(["gpt-large"]), read_policies(POLICIES_FILE))
    assert [(p.entry, p.label, p.job.seed) for p in planned] == [(entry, "one", seed) for seed in (0, 1) for entry in ("full", "attention")]


def test_curves_are_for_the_design_tasks() -> None:
    """Five hours of two cores are not enough for all settings on all tasks."""
    policies, tasks = read_policies(POLICIES_FILE), find_tasks()
    curves = {f"{name} {label}" for name, entry in policies.policies.items() for label in entry.curve}
    for name in ("minilm-epochs", "minilm-lora", "minilm-mlm", "gpt-further", "rescnn-half"):
        planned = {f"{p.entry} {p.label}" for p in plan_runs({name: tasks[name]}, policies)}
        assert {"linear one", "late one", "band one"} <= planned
        assert set(tasks[name].leave_out) <= curves and curves & planned == {f"attention-budget {share}" for share in ("20%", "30%", "40%")}


def test_what_a_result_does_not_depend_on_is_not_in_its_name() -> None:
    settings = {"net": "minilm", "data": "bbc", "batch": 8, "steps": 20, "lr": 0.01, "schedule": "linear", "held_out": 100}
    plain = TaskFile.model_validate(settings).training_settings()
    other = settings | {"use": "once", "entries": ["linear"], "leave_out": ["late one"], "seeds": 1, "seconds_per_step": 0.5}
    assert TaskFile.model_validate(other).training_settings() == plain
    assert TaskFile.model_validate(settings | {"train_rows": 16}).training_settings() == plain | {"train_rows": 16}
    assert TaskFile.model_validate(settings | {"lora_rank": 4}).training_settings() == plain | {"lora_rank": 4}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_rank": 4, "data": "bbc-masked"}, "lora_rank: got 4; allowed with net 'minilm' and data 'bbc-masked': 0"),
        ({"train_rows": 4, "net": "gpt", "data": "pydoc"}, "train_rows: got 4; allowed with net 'gpt' and data 'pydoc': 0"),
        ({"net": "gpt2", "data": "bbc-preferences", "pretrain_steps": 1}, "lora_rank: got 0; allowed with net 'gpt2': an integer >= 1"),
        ({"train_rows": 4}, "train_rows: got 4; allowed: an integer >= batch (8), or 0"),
        ({"net": "gpt", "data": "bbc-chars"}, "pretrain_steps: got 0; allowed with data 'bbc-chars': an integer >= 1"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes: dict[str, object], words: str) -> None:
    settings = {"net": "minilm", "data": "bbc", "batch": 8, "steps": 20, "lr": 0.01, "schedule": "linear", "held_out": 100}
    with pytest.raises(ValueError, match=r".") as error:
        TaskFile.model_validate(settings | changes)
    assert words in str(error.value)


@pytest.mark.skipif(find_spec("trl") is not None, reason="TRL is installed")
def test_the_preference_task_needs_trl_and_is_no_default() -> None:
    assert "gpt2-dpo" not in find_tasks() and find_tasks(["gpt2-dpo"])["gpt2-dpo"].lora_rank > 0
    with pytest.raises(ValueError, match=r"needs the package 'trl': pip install 'smartfrz_ds\[preferences\]'"):
        check_packages(find_tasks(["gpt2-dpo"]).values())


# --- data ------------------------------------------------------------------------------------------------------------------------


def test_a_seventh_of_the_tokens_is_masked_and_no_special_one() -> None:
    (inputs, _), held_out, _ = data.bbc(32, 100)
    tokenizer = data.minilm_tokenizer()
    changed, answers = data.masked(inputs, torch.Generator().manual_seed(0), tokenizer.mask_token_id)
    hidden = answers != -100
    special = torch.tensor(tokenizer.all_special_ids)
    inner = ~torch.isin(inputs["input_ids"], special)
    assert not (hidden & ~inner).any()
    assert hidden.sum() / inner.sum() == pytest.approx(0.15, abs=0.005)  # of 57,000 tokens: 3 standard errors
    assert (changed["input_ids"][hidden] == tokenizer.mask_token_id).all()
    assert torch.equal(torch.where(hidden, answers, changed["input_ids"]), inputs["input_ids"])
    assert torch.equal(changed["attention_mask"], inputs["attention_mask"])
    once, again = (data.masked_once(held_out, tokenizer.mask_token_id)[1] for _ in range(2))
    assert torch.equal(once, again), "the held-out task is the same for every run"


def test_left_out_answers_do_not_count() -> None:
    logits = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]]])
    answers = torch.tensor([[0, -100, 1]])
    right, loss, count = CrossEntropy().score(lambda **_: logits, ({}, answers))
    assert (right, count) == (1, 2)
    assert loss == pytest.approx(float(torch.log1p(torch.exp(torch.tensor([-2.0, 1.0]))).sum()))


def test_a_small_set_comes_again_in_every_epoch(tmp_path: Path) -> None:
    task = find_tasks(["minilm-epochs"])["minilm-epochs"].model_copy(update={"train_rows": 16})
    with torch.random.fork_rng():
        batches = prepare(task, 0, tmp_path).batches
    seen = [tuple(row) for _ in range(6) for row in next(batches)[0]["input_ids"].tolist()]
    assert set(Counter(seen).values()) == {3}, "three epochs of two batches"


def test_with_lora_only_adapters_and_the_head_train(tmp_path: Path) -> None:
    task = find_tasks(["minilm-lora"])["minilm-lora"]
    with torch.random.fork_rng():
        model = prepare(task, 0, tmp_path).model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len([n for n in trained if "lora_" in n]) == 6 * 3 * 2
    assert {n for n in trained if "lora_" not in n} and all("classifier" in n for n in trained if "lora_" not in n)


def test_the_gpt_is_pretrained_on_one_text_and_trained_on_another(tmp_path: Path) -> None:
    task = find_tasks(["gpt-further"])["gpt-further"].model_copy(update={"pretrain_steps": 30, "width": 16, "depth": 1})
    with torch.random.fork_rng():
        training = prepare(task, 1, tmp_path)
        held_out = torch.cat([answers for _, answers in training.held_out])
        rows = {bytes(row) for row in held_out[:, :16].to(torch.uint8).numpy()}
        text = bytes(data.bbc_codes().to(torch.uint8).numpy())
        assert all(row in text for row in rows) and text.rindex(min(rows, key=text.index)) > 0.9 * len(text), "from the end of the articles"
        assert len(list(tmp_path.iterdir())) == 1
        inputs, answers = next(data.text_batches(data.pydoc(), task.length, 64, 5))
        fresh = prepare(task.model_copy(update={"pretrain_steps": 0}), 1, tmp_path).model
        with torch.no_grad():
            before, after = (float(CrossEntropy().loss(m, (inputs, answers))) for m in (fresh, training.model))
    assert after < before - 0.5, "the weights have seen the first text"


@pytest.mark.slow
@pytest.mark.distributed(1)
@pytest.mark.filterwarnings("ignore")  # TRL's and datasets' own, where they are installed
def test_every_task_runs_and_freezes_on_a_real_engine(tmp_path: Path) -> None:
    names = sorted(set(find_tasks()) - DESIGN) + (["gpt2-dpo"] if find_spec("trl") else [])
    with torch.random.fork_rng(), alone():  # DeepSpeed keeps its first process group
        for name in names:
            task = find_tasks([name])[name]
            task = task.model_copy(
                update={"steps": 12, "pretrain_steps": min(task.pretrain_steps, 2), "held_out": 32, "entries": None, "leave_out": []}
            )
            planned = plan_runs({name: task}, read_policies(POLICIES_FILE), only=["late"], seeds=1)
            (late,) = (p.job for p in planned if p.label == "55%")
            result = run(replace(late, section=late.section | {"freeze_interval": 1}), tmp_path)
            assert result["frozen"][0][0] == 7 and 0 < result["saved"] < 0.5, name
            assert 0 <= result["metric"] <= 1 and result["loss"] > 0, name


def test_the_results_in_the_repository_are_what_their_names_say() -> None:
    """Damaged or renamed files would be missing in the table without a word."""
    files = sorted((Path(__file__).parents[2] / "docs" / "policy-bench" / "runs").rglob("*.json"))
    assert files
    for file in files:
        content = json.loads(file.read_text())
        job = Job.from_json(content["job"])
        assert job.name == f"{file.parent.name}/{file.stem}" and job.to_json() == content["job"]
        assert {"metric", "loss", "saved", "flops", "full_flops"} <= set(content["result"]) and content["versions"]["deepspeed"]


def test_the_numbers_of_the_docs_are_those_of_the_results(tmp_path: Path) -> None:
    """The table of `auto` by task, on the page of the benchmark and where the docs say when freezing is worth it."""
    docs = Path(__file__).parents[2] / "docs"
    shutil.copytree(docs / "policy-bench" / "runs", tmp_path / "runs")
    tables = bench_policies(tmp_path, run=False).replace("-", "−")
    names, cells = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in tables[tables.index("| metric better |") - len("| setting ") :].splitlines()
        if line.startswith(("| setting", "| `attention` one"))
    )
    page, worth = (docs / "policy-bench.md").read_text(), (docs / "when-is-it-worth-it.md").read_text()
    for name, cell in list(zip(names, cells, strict=True))[5:]:
        metric, loss = cell.partition(" (")[0].split(" / ")
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name.replace('−', '-')}` |") and line.endswith(f"| {loss} |"))
        assert f"| {metric} |" in row, (row, metric)
        told = [line for line in worth.splitlines() if f"`{name.replace('−', '-')}`" in line and line.startswith("| ") and "%" in line]
        assert not told or metric.lstrip("+−").partition(" ")[0] in told[0], (told, metric)
