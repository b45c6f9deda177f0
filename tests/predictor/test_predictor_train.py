"""Judging the judge, the whole way from nothing to a file with a card, the commands, and the predictor that is shipped."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.bounds import rounding
from test_predictor import NETWORK, NORMS
from torch import Tensor
from typer.testing import CliRunner

from smartfrz_ds.cli.main import app
from smartfrz_ds.predictor import DEFAULT_PREDICTOR, load_predictor
from smartfrz_ds.predictor.model import PredictorConfig, parameter_count, predictor_notes
from smartfrz_ds.predictor.recording.collect import collect, one_thread, read_dataset
from smartfrz_ds.predictor.recording.runs import TaskRun, planned_runs
from smartfrz_ds.predictor.training.ablate import replay
from smartfrz_ds.predictor.training.calibrate import calibrate, evaluate_predictor
from smartfrz_ds.predictor.training.dataset import Examples, make_examples
from smartfrz_ds.predictor.training.evaluate import (
    PRECISION_TARGET,
    auc,
    auc_in_time,
    balancing_threshold,
    calibration_error,
    choose_threshold,
    platt,
    reliability,
)
from smartfrz_ds.predictor.training.fit import calibrated_apart, fit, held_out_scores, judge_logits, score
from smartfrz_ds.predictor.training.logistic_baseline import fit_regression
from smartfrz_ds.predictor.training.published_form import PublishedPredictor, fit_reference, raw_windows
from smartfrz_ds.predictor.training.train import train_predictor

SMALL_RUN = TaskRun(net="mlp", data="digits", optimizer="adamw-cosine", regime="scratch", seed=7, steps=80)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """The data set of the quick scale, a predictor trained on it, and its figures."""
    folder = tmp_path_factory.mktemp("quick")
    figures = train_predictor(out=folder / "mine.safetensors", quick=True, cache=folder / "data")
    return folder / "data", folder / "mine.safetensors", figures


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


# --- judging the judge --------------------------------------------------------------------------------------------------------


def test_auc_equals_scikit_learn_and_counts_only_within_the_same_time() -> None:
    from sklearn.metrics import roc_auc_score

    label = random(300) > 0.3
    score_ = ((random(300, seed=1) + label) * 4).round() / 4  # with ties
    assert auc(score_, label) == pytest.approx(roc_auc_score(label.numpy(), score_.numpy()))
    assert auc(score_, torch.ones(300, dtype=torch.bool)) is None
    time_ = torch.arange(300) / 300
    assert auc(time_, time_ > 0.5) == 1.0
    assert auc_in_time((time_ * 20).floor(), random(300, seed=2) > 0, time_) == 0.5


def test_the_threshold_is_the_lowest_that_is_precise_enough() -> None:
    label = uniform(2000) < torch.linspace(0, 1, 2000)
    scores, weight = torch.linspace(0.3, 0.999, 2000), uniform(2000, 1) + 0.5
    threshold, precision = choose_threshold(scores, label, weight)

    def precise(t: float) -> float:
        called = scores.double() >= t
        return float((weight * label)[called].double().sum() / weight[called].double().sum())

    assert precision == pytest.approx(precise(threshold), abs=rounding(2000, 1.0, torch.float64))
    assert precise(threshold) >= PRECISION_TARGET
    assert all(precise(float(s)) < PRECISION_TARGET for s in scores if 0.5 <= s < threshold)
    assert choose_threshold(scores, torch.zeros(2000, dtype=torch.bool), weight) == (0.99, None)
    assert choose_threshold(torch.full((5,), math.nan), label[:5], weight[:5]) == (0.99, None)


def test_the_balancing_threshold_is_the_best_of_all() -> None:
    scores, weight = uniform(400), uniform(400, 1) + 0.5
    label = uniform(400, 2) < scores

    def balanced(t: float) -> float:
        called = scores >= t
        recall = float(weight[called & label].sum() / weight[label].sum())
        return (recall + float(weight[~called & ~label].sum() / weight[~label].sum())) / 2

    assert balanced(balancing_threshold(scores, label, weight)) == pytest.approx(
        max(balanced(float(s)) for s in scores), abs=rounding(400, 1.0)
    )


def test_platt_and_the_reliability_table_on_known_probabilities() -> None:
    logits, weight = 2 * random(20_000), torch.ones(20_000)
    label = uniform(20_000, 3) < (0.5 * logits - 1).sigmoid()  # what they should have been
    scale, offset = platt(logits, label, weight)
    assert (scale, offset) == (pytest.approx(0.5, abs=0.03), pytest.approx(-1.0, abs=0.05))  # statistical: 20,000 draws
    right = reliability((scale * logits + offset).sigmoid(), label, weight)
    wrong = reliability(logits.sigmoid(), label, weight)
    assert calibration_error(right) < 0.02 < 0.1 < calibration_error(wrong)
    assert sum(row["windows"] for row in right) == pytest.approx(1.0, abs=rounding(20_000, 1.0))
    assert platt(logits[:3], torch.ones(3, dtype=torch.bool), weight[:3]) == (1.0, 0.0)


# --- fitting ------------------------------------------------------------------------------------------------------------------


def examples_of(folder: Path) -> tuple[Any, Examples]:
    data = read_dataset(folder)
    return data, make_examples(data.recordings, 30)


def test_what_is_held_out_was_not_seen(quick: tuple[Path, Path, dict[str, Any]]) -> None:
    _, examples = examples_of(quick[0])
    seen: list[set[str]] = []

    def fitted(train: Examples) -> list[Any]:
        kinds = {str(run["net"]) for i, run in enumerate(train.runs) if bool((train.run == i).any())}
        seen.append(kinds)
        return [lambda test: torch.full((len(test),), float(len(seen)))]

    found = held_out_scores(examples, fitted, ["it"], ["network kind"])["it"]["network kind"]
    assert seen == [{"mlp"}, {"cnn"}]  # without cnn, then without mlp
    assert bool((found[examples.having("net", "cnn")] == 1.0).all())
    assert bool((found[examples.having("net", "mlp")] == 2.0).all())
    calibrated = calibrated_apart(found, examples, "net")
    assert bool(calibrated.isfinite().all())


def test_scores_are_those_of_the_predictor_in_a_run(quick: tuple[Path, Path, dict[str, Any]]) -> None:
    """The evaluation's batched scores, and FreezePredictor.probabilities stage by stage, with the probe and without."""
    data, examples = examples_of(quick[0])
    model = load_predictor(quick[1])
    from smartfrz_ds.predictor.features import FeatureExtractor
    from smartfrz_ds.predictor.training.dataset import stage_views

    together = score(model, examples)
    recording, extractor = data.recordings[0], FeatureExtractor()
    for view, changes in stage_views(recording, 4, 30):
        batch = extractor.extract(view, changes=changes)
        here = (examples.run == 0) & (examples.spacing == 8) & (examples.step == view.step)
        if batch.names:
            torch.testing.assert_close(together[here], model.probabilities(batch), atol=NETWORK, rtol=0)
    weights_only = judge_logits(model.weights, examples, with_probe=False)
    expected = model.weights.calibrated(weights_only).sigmoid()
    torch.testing.assert_close(score(model, examples.without_probe()), expected, atol=NETWORK, rtol=0)


def test_the_published_form_and_regression_learn_what_they_see(quick: tuple[Path, Path, dict[str, Any]]) -> None:
    data, examples = examples_of(quick[0])
    few = examples.where(examples.spacing == 4)
    raw = raw_windows(data.recordings, few, torch.tensor([0, len(few) - 1]))
    for row, i in ((0, 0), (1, len(few) - 1)):
        recording, n = data.recordings[int(few.run[i])], int(few.mask[i].sum())
        at = [int((recording.steps == int(few.step[i]) - 4 * back).nonzero()[0, 0]) for back in reversed(range(n))]
        assert torch.equal(raw[row, 30 - n :], recording.weights[int(few.layer[i]), at])
        assert not bool(raw[row, : 30 - n].any())
    published = auc(fit_reference(data.recordings, few, windows=len(few), epochs=10, seed=0)(few), few.label)
    regression = auc(fit_regression(few, with_probe=False)(few), few.label)
    assert published is not None
    assert regression is not None
    assert published > 0.7  # on its own training windows: it can learn
    assert regression > 0.8
    model = PublishedPredictor(16)
    weights, mask = random(2, 5, 16), torch.tensor([[False, True, True, True, True]] * 2)
    other = weights.clone()
    other[:, 0] += 100.0  # hidden
    torch.testing.assert_close(model(weights, mask), model(other, mask), atol=NETWORK, rtol=0)


# --- the whole way ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_makes_the_same_file_twice(quick: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    torch.manual_seed(99)
    train_predictor(out=tmp_path / "again.safetensors", quick=True, cache=quick[0])
    assert quick[1].read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_training_makes_a_card(quick: tuple[Path, Path, dict[str, Any]]) -> None:
    data, out, figures = quick
    assert len(list((data / "runs").iterdir())) == figures["runs"] == 5
    assert (data / "dataset.json").is_file() and (data / "labels.json").is_file()
    json.dumps(figures)
    model = load_predictor(out)
    assert model.threshold == figures["threshold"]
    shipped = figures["held_out"]["shipped, weights alone"]["network kind"]
    assert shipped.keys() == {"mlp", "cnn"}
    assert figures["branches"]["count"] == 9
    card = out.with_suffix(".md").read_text()
    assert "smartfrz train-predictor --out mine.safetensors --seed 0 --quick" in card
    assert f"{shipped['cnn']['auc']:.3f} (" in card
    assert hashlib.sha256(out.read_bytes()).hexdigest() in card
    assert "is not usable" in card


@pytest.mark.parametrize(
    ("arguments", "words"), [({"out": Path("p.pt")}, "out: got 'p.pt'"), ({"out": Path("p.safetensors"), "seed": -1}, "seed: got -1")]
)
def test_training_refuses_arguments_before_it_starts(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train_predictor(**arguments)


def test_calibration_on_somebodys_recordings(quick: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    data, predictor, _ = quick
    figures = calibrate(data, out=tmp_path / "p.safetensors", predictor=predictor, precision=0.9, plot=tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    model = load_predictor(tmp_path / "p.safetensors")
    assert model.threshold == figures["threshold"]
    assert predictor_notes(tmp_path / "p.safetensors")["calibrated"]["precision_target"] == 0.9
    after = evaluate_predictor(data, tmp_path / "p.safetensors")["judges"]
    for name, reached in figures["reached"].items():
        assert after[name]["precision"] == pytest.approx(reached, abs=1e-3)  # not rounding: three digits are what is shown
        assert reached >= 0.9
    for bad, words in (({"precision": 0.4}, "precision: got 0.4"), ({"plot": Path("r.svg")}, "plot: got"), ({"out": Path("p.pt")}, "out:")):
        with pytest.raises(ValueError, match=words):
            calibrate(data, predictor=predictor, **bad)  # type: ignore[arg-type]


def test_a_replay_obeys_patience_cooldown_and_order(quick: tuple[Path, Path, dict[str, Any]]) -> None:
    rows = {(r["patience"], r["cooldown"], r["order"]): r for r in replay(read_dataset(quick[0]), (0.5,)) if r["threshold"] == 0.5}
    assert len(rows) == 12
    assert rows[1, 0, "any"]["of"] == 4  # the run with freezes is left out
    for order in ("any", "front_to_back"):
        saved = [rows[patience, 0, order]["saved"] for patience in (1, 2, 3)]
        assert saved == sorted(saved, reverse=True)
        assert rows[1, 6, order]["saved"] <= rows[1, 0, order]["saved"]
    assert rows[1, 0, "front_to_back"]["saved"] <= rows[1, 0, "any"]["saved"]


def test_the_commands(quick: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    data, predictor, _ = quick

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, list(arguments))
        return result.exit_code, result.output

    code, text = run("collect", "--out", str(data), "--quick")  # all is there already
    assert (code, "5 runs, 9 branches" in text) == (0, True), text
    code, text = run("label", "--data", str(data), "--similarity", "0.97")
    assert (code, "| prefix-settled | 0.97 | yes |" in text) == (0, True), text
    code, text = run("label", "--data", str(data))
    assert code == 0
    code, text = run("eval-predictor", "--data", str(data), "--predictor", str(predictor), "--out", str(tmp_path / "figures.json"))
    assert code == 0, text
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["truth"]["weights alone"]["branches"] == 9
    code, text = run("calibrate", "--data", str(data), "--predictor", str(predictor), "--precision", "0.9")
    assert (code, "threshold: " in text) == (0, True), text
    for arguments, words in (
        (("label", "--data", str(tmp_path)), "no recording in"),
        (("label", "--data", str(data), "--rule", "best"), "rule: got 'best'"),
        (("collect", "--out", str(tmp_path), "--script", str(tmp_path / "none.py")), "script: got"),
        (("eval-predictor", "--data", str(data), "--predictor", str(tmp_path / "none.safetensors")), "no such file"),
    ):
        code, text = run(*arguments)
        assert (code, words in text) == (2, True), text


# --- what is shipped ----------------------------------------------------------------------------------------------------------


def test_the_shipped_predictor_and_its_card_belong_together() -> None:
    assert DEFAULT_PREDICTOR.stat().st_size < 5_000_000
    notes, model = predictor_notes(DEFAULT_PREDICTOR), load_predictor()
    assert not notes["quick"]
    assert (notes["threshold"], notes["parameters"]) == (model.threshold, parameter_count(model))
    card = DEFAULT_PREDICTOR.with_suffix(".md").read_text()
    assert hashlib.sha256(DEFAULT_PREDICTOR.read_bytes()).hexdigest() in card
    assert f"**Threshold**: {model.threshold:.4f}" in card
    for rows in notes["held_out"].values():
        for table in rows.values():
            for row in table.values():
                assert row["auc"] is None or f"{row['auc']:.3f} ({row['auc_in_time']:.3f}" in card
    mine = [row["auc"] for row in notes["held_out"]["shipped, weights alone"]["network kind"].values()]
    assert len(mine) == 6
    for other in ("published form",):
        theirs = [row["auc"] for row in notes["held_out"][other]["network kind"].values()]
        assert sum(mine) / 6 > sum(theirs) / 6 + 0.03
    for rule in ("time alone", "own drift"):
        theirs = [row["auc"] for row in notes["rules"][rule]["network kind"].values()]
        assert sum(mine) / 6 > sum(theirs) / 6 + 0.03, rule


def test_the_shipped_predictor_says_what_it_said_when_it_was_made() -> None:
    """On made-up movements, a fixed small set: the same probabilities to four digits on any machine."""
    from smartfrz_ds.predictor.training.card import fixed_set_probabilities

    notes = predictor_notes(DEFAULT_PREDICTOR)
    found = fixed_set_probabilities(load_predictor())
    assert found.keys() == notes["fixed_set"].keys()
    for name, values in found.items():
        assert values == pytest.approx(notes["fixed_set"][name], abs=NORMS + NETWORK)  # features, then the network
        assert max(values) - min(values) > 0.3  # it tells them apart


def test_the_shipped_predictor_on_a_run_it_never_saw() -> None:
    """Another seed, width and learning rate than all of its training runs: it ranks the windows, and what it calls converged is so."""
    run = replace(SMALL_RUN, seed=1234, steps=1440)
    assert run not in planned_runs()
    examples, model = make_examples([collect(run)], 30), load_predictor()
    for scores, probed in ((score(model, examples.without_probe()), False), (score(model, examples), True)):
        there = examples.probed if probed else torch.ones(len(examples), dtype=torch.bool)
        called = there & (scores >= model.threshold)
        ranked = auc(scores[there], examples.label[there])
        assert ranked is not None
        assert ranked > 0.85
        assert int(called.sum()) > 0
        assert float(examples.label[called].float().mean()) > 0.8


def test_the_predictor_runs_without_deepspeed() -> None:
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"  # any import of it now fails
        "import smartfrz_ds.predictor, smartfrz_ds.predictor.training.train, smartfrz_ds.predictor.training.ablate, smartfrz_ds.policies\n"
        "smartfrz_ds.predictor.load_predictor()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_fitting_repeats() -> None:
    examples = make_examples([collect(replace(SMALL_RUN, steps=200)), collect(replace(SMALL_RUN, steps=200, seed=9))], 30)
    one, two = (fit(examples, PredictorConfig(), 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    other = fit(examples, PredictorConfig(), 4)
    assert not torch.equal(one.weights.query.weight, other.weights.query.weight)
