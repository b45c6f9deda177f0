"""What the predictor learns from: recordings, branches, labels, examples, and the data set on disk."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.bounds import rounding
from torch import Tensor, nn

from smartfrz_ds.predictor import Recorder, linear_cka
from smartfrz_ds.predictor.constants import CONVERGED
from smartfrz_ds.predictor.recorder import NEVER, read_recording
from smartfrz_ds.predictor.recording.branches import branch, branched_runs, collect_branches
from smartfrz_ds.predictor.recording.collect import collect, collect_dataset, collect_script, one_thread, read_dataset, record
from smartfrz_ds.predictor.recording.labels import LabelSettings, converged_at, prefix_settled, settled, similarity_of
from smartfrz_ds.predictor.recording.runs import SETTINGS, TaskRun, Training, freezing_schedule, planned_runs
from smartfrz_ds.predictor.training.counterfactual_eval import branch_examples
from smartfrz_ds.predictor.training.dataset import make_examples
from smartfrz_ds.predictor.training.labelling import label_dataset, labels_of

SMALL_RUN = TaskRun(net="mlp", data="digits", optimizer="adamw-cosine", regime="scratch", seed=7, steps=80)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    with one_thread():
        yield


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("steps", "weights", "lr_spent", "cka_pairs", "cka_steps", "frozen_at"))


# --- labels -------------------------------------------------------------------------------------------------------------------


def test_labels_equal_the_slow_reference() -> None:
    cka = torch.rand(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kinds = ("embedding", "block", "block", "embedding", "block")
    judge = [1, 1, 2, 4, 4]
    result = prefix_settled(cka, kinds)
    for t in range(9):
        for layer in range(5):
            slow = min(float(cka[later, judge[j]]) for later in range(t, 9) for j in range(layer + 1))
            assert float(result[t, layer]) == slow
    assert settled(torch.tensor([[0.9], [0.5], [1.0]])).flatten().tolist() == [0.5, 0.5, 1.0]
    with pytest.raises(ValueError, match="embedding"):
        prefix_settled(cka[:, :1], ("embedding",))


def test_other_label_rules_and_what_is_refused() -> None:
    cka = torch.tensor([[0.5, 0.99], [0.99, 0.6], [1.0, 1.0]], dtype=torch.float64)
    kinds = ("embedding", "block")

    def by(**settings: Any) -> list[list[float]]:
        return similarity_of(cka, kinds, LabelSettings(**settings)).tolist()

    assert by() == [[0.6, 0.6], [0.6, 0.6], [1.0, 1.0]]
    assert by(tie_embeddings=False) == [[0.5, 0.5], [0.99, 0.6], [1.0, 1.0]]
    assert by(rule="now") == [[0.99, 0.99], [0.6, 0.6], [1.0, 1.0]]
    assert by(rule="settled", tie_embeddings=False) == [[0.5, 0.6], [0.99, 0.6], [1.0, 1.0]]
    still = torch.tensor([[0.9]] * 25 + [[0.2]], dtype=torch.float64)
    published = similarity_of(still, ("block",), LabelSettings(rule="published"))[:, 0].tolist()
    assert published == [0.0] + [1.0] * 24 + [0.0]  # one value has no variance; the last is too low and jumps
    for settings, words in (({"rule": "best"}, "rule: got 'best'"), ({"similarity": 1.0}, "similarity: got 1.0")):
        with pytest.raises(ValueError, match=words):
            LabelSettings(**settings)  # type: ignore[arg-type]


def test_a_label_holds_from_an_evaluation_to_the_next() -> None:
    cka = torch.tensor([[0.5], [CONVERGED], [0.99]], dtype=torch.float64)
    steps = torch.tensor([0, 19, 20, 39, 40])
    assert converged_at(cka, torch.tensor([0, 20, 40]), ("block",), steps).flatten().tolist() == [False, False, True, True, True]


# --- recording ----------------------------------------------------------------------------------------------------------------


def test_a_recording_is_what_it_says_repeats_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = record(SMALL_RUN)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert same(one, record(SMALL_RUN))
    assert not torch.equal(one.weights, record(replace(SMALL_RUN, seed=8)).weights)
    assert one.steps.tolist() == list(range(0, 81, 2))
    assert one.weights.shape == (6, 41, 256)
    assert one.cka_pairs.shape == (5, 5, 6)
    assert one.cka[-1].tolist() == pytest.approx([1.0] * 6, abs=rounding(2, 1.0))
    assert float(one.cka[0].max()) < 0.99  # it did learn something
    assert float(one.lr_spent[-1]) == pytest.approx(one.lr_total, rel=rounding(80, 1.0, torch.float64))
    assert one.frozen_at.tolist() == [NEVER] * 6


@pytest.mark.parametrize(
    ("net", "data"), [("cnn", "digits"), ("resnet", "mnist"), ("vit", "digits"), ("bert", "news"), ("bert", "python"), ("gpt", "news")]
)
def test_every_network_trains(net: Any, data: Any) -> None:
    short = record(replace(SMALL_RUN, net=net, data=data, optimizer="adamw-linear", steps=20))
    assert len(short.kinds) == (8 if net == "cnn" else 7)
    assert (short.kinds[0] == "embedding") == (net != "cnn")
    assert bool(((short.weights[:, -1] - short.weights[:, 0]).norm(dim=1) > 0).all())
    assert bool((short.cka_pairs[0, 1] < 1).any())


def test_frozen_layers_stand_still_and_are_marked() -> None:
    run = replace(SMALL_RUN, net="cnn", steps=80, freezes=True)
    stages = freezing_schedule(run, 8)
    assert stages and stages == freezing_schedule(run, 8)
    one = record(run)
    for i, at in enumerate(one.frozen_at.tolist()):
        if at == NEVER:
            assert i >= max(stages.values())
            continue
        assert stages[at] > i and all(count <= i for step, count in stages.items() if step < at)
        row = int((one.steps == at).nonzero()[0, 0])
        assert bool((one.weights[i, row:] == one.weights[i, row]).all())
        assert not torch.equal(one.weights[i, row], one.weights[i, row - 1])
        if i == 0:  # nothing in front of it: its output stands still too, batch norm's statistics with it
            later = [e for e, step in enumerate(one.cka_steps.tolist()) if step >= at]
            assert one.cka_pairs[later[0], later[-1], 0] == pytest.approx(1.0, abs=rounding(2, 1.0))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(self.drop(block(x)))
        return self.head(x)


def test_a_recorder_beside_somebodys_own_loop_changes_nothing_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))

    def train(recorded: bool) -> tuple[list[Tensor], Recorder | None, list[Tensor]]:
        torch.manual_seed(1)
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        recorder = Recorder(model, x[:16], snapshot_interval=2, evaluate_interval=4, sample_size=8) if recorded else None
        states = []
        for step in range(10):
            if step % 4 == 0:
                model.eval()
                states.append(model.blocks[0](x[:16]).detach())
                model.train()
            if step == 6:
                model.blocks[0].requires_grad_(False)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if recorder is not None:
                recorder.step(lr=0.5)
        assert model.training
        return [p.detach() for p in model.parameters()], recorder, states

    plain, _, _ = train(recorded=False)
    weights, recorder, states = train(recorded=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, weights, strict=True))
    assert recorder is not None
    monkeypatch.setenv("SMARTFRZ_RECORDINGS", str(tmp_path))
    made = recorder.save(name="mine", tags={"net": "own"}, metric=0.5)
    found = read_recording(tmp_path / "mine.safetensors")
    assert same(made, found)
    assert (found.layers, found.metric, found.tags) == (("blocks.0", "blocks.1", "blocks.2"), 0.5, {"net": "own"})
    assert (found.lr_total, found.total_steps) == (5.0, 10)
    assert found.cka_steps.tolist() == [0, 4, 8, 10]  # the end too
    assert found.frozen_at.tolist() == [6, NEVER, NEVER]
    assert float(found.cka_pairs[0, 1, 0]) == pytest.approx(linear_cka(states[0], states[1]), abs=rounding(2, 1.0))
    assert bool((found.weights[0, 3:] == found.weights[0, 3]).all())


def test_a_recorder_refuses_what_it_cannot_record(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    for settings, words in (
        ({"snapshot_interval": 0}, "snapshot_interval: got 0"),
        ({"sample_size": 0}, "sample_size: got 0"),
        ({"snapshot_interval": 4, "evaluate_interval": 6}, "evaluate_interval: got 6"),
    ):
        with pytest.raises(ValueError, match=words):
            Recorder(Model(), x, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one step"):
        Recorder(Model(), x).finish(name="nothing")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"bad\.safetensors: not a complete recording"):
        read_recording(tmp_path / "bad.safetensors")


# --- the data set -------------------------------------------------------------------------------------------------------------


def test_recordings_are_taken_from_the_folder_and_damaged_ones_made_anew(tmp_path: Path) -> None:
    one = collect(SMALL_RUN, tmp_path)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    assert same(one, collect(SMALL_RUN, tmp_path))
    assert file.stat().st_mtime_ns == written
    file.write_bytes(file.read_bytes()[:1000])
    assert same(one, collect(SMALL_RUN, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_the_plan_has_what_it_should() -> None:
    runs = planned_runs()
    assert len(runs) == len({run.name for run in runs}) == 144
    assert {(run.net, run.data) for run in runs} == set(SETTINGS)
    for field, values in (("optimizer", 4), ("regime", 2), ("seed", 3), ("freezes", 2)):
        assert len({getattr(run, field) for run in runs}) == values
    branched = branched_runs()
    assert {run.net for run in branched} == {run.net for run in runs}
    assert len({run.optimizer for run in branched}) == 4
    assert 9 * len(branched) >= 150
    assert {run.name for run in branched} <= {run.name for run in runs if not run.freezes}


def test_a_branch_costs_what_it_says_and_is_found_in_the_examples(tmp_path: Path) -> None:
    run = replace(SMALL_RUN, steps=320)
    branches, _ = collect_branches(run, tmp_path)
    assert [(b.step, b.frozen) for b in branches] == [(s, n) for s in (80, 160, 240) for n in (1, 3, 6)]
    assert collect_branches(run, tmp_path)[0] == branches == branch(run)
    # The last one once more by hand: the same run, its whole body frozen at step 240.
    recording = record(run)
    with torch.random.fork_rng(devices=[]):
        training = Training(run)
        values = []
        for step in range(1, 321):
            training.step()
            if step == 240:
                training.freeze(6)
            if step in (280, 300, 320):
                values.append(training.figures())
    accuracy = sum(a for a, _ in values) / 3
    # Two controls: the recorded run itself, and one that saw other batches.
    other = 2 * (branches[-1].cost + accuracy) - recording.metric
    assert abs(other - recording.metric) / 2**0.5 == pytest.approx(branches[-1].noise, abs=rounding(16, 1.0, torch.float64))
    examples = make_examples([recording], 30)
    index = branch_examples(examples, branches)
    assert examples.step[index].tolist() == [b.step for b in branches]
    assert examples.layer[index].tolist() == [b.frozen - 1 for b in branches]


def test_examples_are_what_a_real_run_would_see() -> None:
    recording = record(SMALL_RUN)
    examples = make_examples([recording], 30)
    # 40 snapshots at spacing 2 behind the first, 20 at 4, 10 and 5 at the others: judged from 10 on, every 5, not at the last step.
    assert len(examples) == 6 * (6 + 2)
    assert examples.mask.sum(1).unique().tolist() == [10, 15, 20, 25, 30]
    last = examples.time.argmax()
    assert float(examples.time[last]) == 70 / 80
    expected = prefix_settled(recording.cka, recording.kinds)[3] >= CONVERGED  # evaluated at step 60, before 70
    assert examples.label[(examples.time == examples.time[last])].tolist() == expected.tolist()
    # At spacing 4 a stage is every 20 steps, as the evaluations: the similarity between two of them is known.
    row = torch.nonzero((examples.spacing == 4) & (examples.step == 60) & (examples.layer == 2))[0, 0]
    apart = 1 - float(recording.cka_pairs[3, 2, 2])  # of a similarity near one in fp32
    assert float(examples.probe[row, 0]) == pytest.approx(math.log(apart), abs=rounding(2, 1 / apart) + rounding(2, math.log(apart)))
    assert not bool(examples.probed[examples.spacing == 2].any())


def test_a_data_set_is_made_labelled_and_read(tmp_path: Path) -> None:
    runs = planned_runs(quick=True)[:1]
    for run in runs:
        collect(run, tmp_path / "runs")
    with pytest.raises(ValueError, match=r"no recording in"):
        read_dataset(tmp_path / "empty")
    figures = label_dataset(tmp_path, LabelSettings(similarity=0.9))
    assert labels_of(tmp_path) == LabelSettings(similarity=0.9)
    assert json.loads((tmp_path / "labels.json").read_text())["positive_share"] == figures["positive_share"]
    shares = {r["similarity"]: r["positive_share"] for r in figures["sensitivity"] if r["rule"] == "prefix-settled" and r["tie_embeddings"]}
    assert shares[0.9] == figures["positive_share"]
    assert shares[0.9] >= shares[0.98] >= shares[0.995]
    (tmp_path / "labels.json").write_text("{}")
    with pytest.raises(ValueError, match=r"labels\.json"):
        labels_of(tmp_path)


def test_two_workers_make_the_same_files_and_another_seed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smartfrz_ds.predictor.recording import collect as module

    runs = [SMALL_RUN, replace(SMALL_RUN, seed=8)]
    monkeypatch.setattr(module, "planned_runs", lambda seed, quick: runs)  # two short runs instead of the five of the quick scale
    one = collect_dataset(tmp_path / "one", quick=True, branches=False)
    two = collect_dataset(tmp_path / "two", quick=True, branches=False, workers=2)
    assert all(same(a, b) for a, b in zip(one.recordings, two.recordings, strict=True))
    assert [r.name for r in one.recordings] == [run.name for run in runs]
    assert f"| {runs[0].name} | 80 |" in (tmp_path / "one" / "README.md").read_text()
    with pytest.raises(ValueError, match="got a data set with"):
        collect_dataset(tmp_path / "one", seed=1, quick=True)
    with pytest.raises(ValueError, match="workers: got 0"):
        collect_dataset(tmp_path / "three", workers=0)


def test_somebodys_script_records_into_the_data_set(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(
        "import torch\n"
        "from smartfrz_ds.predictor import Recorder\n"
        "model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)), torch.nn.Flatten(), torch.nn.Linear(4, 1))\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "recorder = Recorder(model, torch.randn(8, 4), snapshot_interval=1, evaluate_interval=2)\n"
        "for _ in range(4):\n"
        "    optimizer.zero_grad(); model(torch.randn(8, 4)).square().mean().backward(); optimizer.step(); recorder.step(lr=0.1)\n"
        "recorder.save(name='mine')\n"
    )
    assert collect_script(script, tmp_path / "data") == ["mine"]
    assert read_dataset(tmp_path / "data").recordings[0].total_steps == 4
    for text, words in (("", "recorded nothing"), ("raise SystemExit(3)", "exit code 3")):
        script.write_text(text)
        with pytest.raises(ValueError, match=words):
            collect_script(script, tmp_path / "data")
