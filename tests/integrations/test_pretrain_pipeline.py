"""launch/examples/pretrain_pipeline.py: its text, its model, its options, and the whole of it on real stages."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, launch
from reference.bounds import rounding

sys.path.insert(0, str(ROOT / "launch" / "examples"))  # the scripts there import each other in this way too

from data import as_tokens, load_bpe, read_texts, train_bpe, windows
from model import Gpt, Shape, loss_of, pipeline_layers
from pretrain_pipeline import arguments, settings

SCRIPT = ROOT / "launch" / "examples" / "pretrain_pipeline.py"
TINY = ["--blocks", "6", "--width", "16", "--length", "8", "--micro-batches", "4"]


# --- text ------------------------------------------------------------------------------------------------------------------------


def folder_of_texts(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("the cat sat on the mat, and the dog lay on the log. " * 40)
    (folder / "sub" / "a.md").write_text("what the owl saw, the mole did not. äöü " * 40, encoding="utf-8")
    (folder / "c.bin").write_bytes(b"\xff\xfe\x00")
    (folder / ".hidden").write_text("not this")
    return folder


def test_a_folder_is_read_in_order_and_the_end_of_each_text_held_out(tmp_path: Path) -> None:
    texts = read_texts(folder_of_texts(tmp_path / "texts"))
    assert [t[:7] for t in texts.train] == ["the cat", "what th"] and texts.skipped == 1
    assert [len(h) / (len(t) + len(h)) for t, h in zip(texts.train, texts.held_out, strict=True)] == [pytest.approx(0.1, abs=0.01)] * 2
    again = read_texts(tmp_path / "texts").digest
    (tmp_path / "texts" / "b.txt").write_text("another text")
    assert again == texts.digest != read_texts(tmp_path / "texts").digest


def test_a_folder_without_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data .*nowhere: no such folder"):
        read_texts(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"--data .*: no text file in it"):
        read_texts(tmp_path)


def test_bytes_and_bpe_give_the_text_back(tmp_path: Path) -> None:
    texts = read_texts(folder_of_texts(tmp_path / "texts")).train
    assert bytes(as_tokens(texts[1:]).tolist()).decode() == texts[1] + "\n\n"
    train_bpe(texts, 300, tmp_path / "tokenizer.json")
    encode, vocabulary = load_bpe(tmp_path / "tokenizer.json")
    assert 256 < vocabulary <= 300 and len(encode(texts[0])) < len(texts[0]) / 2
    from tokenizers import Tokenizer

    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).decode(encode(texts[1])) == texts[1]


def test_windows_are_drawn_alike_for_the_same_step_and_show_the_next_token() -> None:
    tokens = as_tokens(read_texts(None).held_out)
    x, y = windows(tokens, rows=5, length=12, draw=(0, 1, 7))
    assert x.shape == y.shape == (5, 12) and x.dtype == torch.int64 and torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x, windows(tokens, rows=5, length=12, draw=(0, 1, 7))[0])
    assert not torch.equal(x, windows(tokens, rows=5, length=12, draw=(0, 1, 8))[0])
    windows(tokens[:13], rows=50, length=12, draw=(0,))  # the shortest text that will do


# --- model, options, table -------------------------------------------------------------------------------------------------------


def test_the_list_of_layers_is_a_causal_language_model() -> None:
    shape = Shape(vocabulary=50, length=12, blocks=3, width=16)
    specs = pipeline_layers(shape)
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(spec.build() for spec in specs))
    x = torch.randint(50, (2, 12))
    before = net(x).detach()
    assert before.shape == (2, 12, 50) and abs(loss_of(before, x).item() - torch.log(torch.tensor(50.0)).item()) < 0.1
    x[:, 8:] = 0  # what comes later changes nothing before it
    moved = (net(x).detach() - before).abs().amax((0, 2))  # of each position
    off = rounding(3 * (4 * 16 + 12), float(before.abs().max()))  # three blocks, each a hidden layer of 4 x 16 and 12 positions
    assert moved[:8].max() <= off and moved[8:].min() > 3 * off
    assert len(specs) == 7
    whole = Gpt(shape)  # the same network as one module
    whole.load_state_dict(dict(zip(whole.state_dict(), net.state_dict().values(), strict=True)))
    assert torch.equal(whole(x), net(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--width", "10"], "--width: got 10; allowed: a whole number of at least 4, a multiple of 4"),
        (["--steps", "0"], "--steps: got 0; allowed: a whole number of at least 1"),
        (["--micro-batches", "-1"], "--micro-batches: got -1"),
        (["--tokenizer", "bpe", "--vocabulary", "256"], "--vocabulary: got 256; allowed: a whole number of at least 257"),
        (["--lr", "nan"], "--lr: got nan; allowed: a positive number"),
        (["--deepspeed_config", "no/such.json"], "no/such.json"),
        (
            ["--deepspeed_config", str(ROOT / "configs" / "zero2.json")],
            "zero_optimization.stage: got 2; allowed in this script: 0, 1",
        ),
    ],
)
def test_wrong_options_are_named(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        settings(arguments(options))
    except SystemExit as end:  # argparse's
        assert end.code == 2 and words in capsys.readouterr().err
    except ValueError as error:
        assert words in str(error)
    else:
        pytest.fail("accepted")


def test_options_go_over_the_file() -> None:
    config = settings(arguments(["--steps", "50", "--lr", "0.5", "--policy", "linear", "--micro-batches", "2"]))
    assert config["scheduler"]["params"]["total_num_steps"] == 50 and config["scheduler"]["params"]["warmup_num_steps"] == 5
    assert config["optimizer"]["params"]["lr"] == config["scheduler"]["params"]["warmup_max_lr"] == 0.5
    assert config["smartfrz"]["policy"] == "linear" and config["gradient_accumulation_steps"] == 2
    assert "smartfrz" not in settings(arguments(["--policy", "none"]))


def test_help_comes_at_once_and_a_start_without_the_launcher_says_how() -> None:
    shown = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True, timeout=5)
    assert "--resume" in shown.stdout and "deepspeed --num_accelerators 4" in shown.stdout
    alone = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, timeout=5)
    assert (
        alone.returncode == 2
        and "is started by a launcher: deepspeed --num_accelerators 4" in alone.stderr
        and "Traceback" not in alone.stderr
    )


# --- on real stages --------------------------------------------------------------------------------------------------------------


def config_file(folder: Path, *, recompute: int = 0) -> Path:
    """configs/pipeline.json with a linear policy that freezes from step 4 to step 10."""
    config = json.loads((ROOT / "configs" / "pipeline.json").read_text())
    config["smartfrz"] |= {"policy": "linear", "warmup_steps": 2, "snapshot_interval": 1, "freeze_interval": 2, "cooldown": 0}
    config["pipeline"]["activation_checkpoint_interval"] = recompute
    config["smartfrz"] |= {"linear": {"start_step": 4, "end_step": 10}, "max_frozen_fraction": 0.75}
    file = folder / "ds.json"
    file.write_text(json.dumps(config))
    return file


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def bounds(got: dict[str, Any], when: str) -> list[int]:
    ends = {rank["stage"]: rank[when][1] for rank in got["stages"]}
    return [0, *(ends[stage] for stage in sorted(ends))]


@pytest.mark.distributed(2)
def test_two_stages_train_freeze_and_tell(tmp_path: Path) -> None:
    """A folder of texts, BPE, recomputation; 16 steps of two stages."""
    texts, out = folder_of_texts(tmp_path / "texts"), tmp_path / "out"
    options = [*TINY, "--data", str(texts), "--tokenizer", "bpe", "--vocabulary", "300", "--steps", "16"]
    options += ["--validate-every", "8", "--save-every", "16"]
    run = launch(SCRIPT, *options, "--deepspeed_config", str(config_file(tmp_path, recompute=1)), "--out", str(out), timeout=120)
    got = read(out)
    assert [name for name, _ in got["frozen"]] == ["embeddings", *(f"layers.{i}" for i in range(2, 7))] and got["layers"] == 8
    assert bounds(got, "start") == [0, 5, 10] and bounds(got, "end") == (got["moves"][-1][1] if got["moves"] else [0, 5, 10])
    held = [sum(stage["bytes"][when] for stage in got["stages"]) for when in (0, 1)]
    assert held[1] < 0.6 * held[0]
    assert 0.2 < got["saved_flops_fraction"] < 0.6
    losses = got["series"]["validation"]
    assert got["series"]["validation_steps"] == [8, 16] and losses[1] < losses[0]
    for words in ("1 files are no UTF-8 text", "6 of 8 layers", "tokens per second", "step 16: checkpoint saved", "frozen 6/8"):
        assert words in run.stdout, run.stdout[-4000:]
    assert (out / "checkpoints" / "latest").is_file() and (out / "tokenizer.json").is_file()
    assert len((out / "events.jsonl").read_text().splitlines()) >= 3


@pytest.mark.distributed(2)
@pytest.mark.slow
def test_mistakes_end_all_ranks_with_one_line(tmp_path: Path) -> None:
    for options, words in (
        (["--stages", "3"], "--stages 3 with 2 ranks: allowed are 1, 2"),
        (["--length", "100000"], "--length 100000 needs more of each"),
        ([*TINY, "--resume"], "--resume: no complete checkpoint in"),
    ):
        run = launch(SCRIPT, *options, "--out", str(tmp_path / "out"), timeout=120, check=False)
        assert run.returncode and words in run.stdout and "Traceback" not in run.stdout, run.stdout[-3000:]


@pytest.mark.distributed(4)
@pytest.mark.slow
@pytest.mark.parametrize("stages", [4, 2])
def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path: Path, stages: int) -> None:
    """Four stages, and two replicas of two; stopped between two freezes. Where layers move depends on the machine, and with the cut the
    order in which the squares of the norm are added; so the losses agree to rounding."""
    common = [*TINY, "--stages", str(stages), "--steps", "20", "--deepspeed_config", str(config_file(tmp_path))]
    launch(SCRIPT, *common, "--out", str(tmp_path / "whole"), ranks=4, timeout=250)
    launch(SCRIPT, *common, "--stop-after", "7", "--out", str(tmp_path / "parts"), ranks=4, timeout=250)
    stopped = read(tmp_path / "parts")
    again = launch(SCRIPT, *common, "--resume", "--out", str(tmp_path / "parts"), ranks=4, timeout=250)
    whole, resumed = read(tmp_path / "whole"), read(tmp_path / "parts")
    assert 0 < len(stopped["frozen"]) < len(resumed["frozen"]) and resumed["frozen"] == whole["frozen"]
    assert resumed["first_step"] == 8 and "steps 8 to 20" in again.stdout
    assert bounds(resumed, "start") == bounds(stopped, "end")
    steps, losses = whole["series"]["validation_steps"], whole["series"]["validation"]
    late = dict(zip(steps, losses, strict=True))
    assert len(resumed["series"]["validation"]) > 3
    changes = [abs(b - a) / (after - before) for (before, after), (a, b) in zip(pairwise(steps), pairwise(losses), strict=True)]
    for step, loss in zip(resumed["series"]["validation_steps"], resumed["series"]["validation"], strict=True):
        # not rounding alone, which AdamW enlarges: a twentieth of what one step changes, so that no step was lost or done twice
        assert loss == pytest.approx(late[step], abs=min(changes) / 20)
    assert resumed["saved_flops_fraction"] == pytest.approx(whole["saved_flops_fraction"], abs=1e-6)
    other = launch(SCRIPT, *common, "--seed", "5", "--resume", "--out", str(tmp_path / "parts"), ranks=4, timeout=250, check=False)
    assert other.returncode and "is of a run with another seed" in other.stdout
