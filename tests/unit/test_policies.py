"""The policies `attention`, `linear` and `manual`: what each freezes, when, and that a decision repeats. The others: test_rivals.py."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smartfrz_ds.policies import AttentionPolicy, Decision, LayerInfo, LinearPolicy, ManualPolicy, Policy, View, Window, make_policy
from smartfrz_ds.predictor import MIN_SNAPSHOTS
from smartfrz_ds.predictor.constants import CONVERGED
from smartfrz_ds.predictor.recording.collect import SNAPSHOT_EVERY, Recording, TaskRun, record
from smartfrz_ds.predictor.recording.labels import prefix_settled

INTERVAL, STAGE, WINDOW = 10, 50, 30  # the defaults of a run


def still(n: int, seed: int) -> Tensor:
    """A layer that moved in its first fifty snapshots and has come to rest."""
    generator = torch.Generator().manual_seed(seed)
    speed = torch.exp(-torch.arange(n) / 8.0)[:, None]
    return torch.randn(64, generator=generator) + 0.3 * (speed * torch.randn(n, 64, generator=generator)).cumsum(0)


def moving(n: int, seed: int) -> Tensor:
    """A layer that keeps moving, about its own size in a window."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, generator=generator) + 0.3 * torch.randn(n, 64, generator=generator).cumsum(0)


def view(
    step: int, weights: dict[str, Tensor], *, frozen: tuple[str, ...] = (), total: int | None = 1500, kinds: dict[str, Any] | None = None
) -> View:
    """A run of `total` steps at `step`, constant learning rate, a snapshot every INTERVAL steps. weights: (all snapshots, 64)."""
    end, begin = step // INTERVAL, max(0, step // INTERVAL - WINDOW)
    steps = INTERVAL * torch.arange(begin + 1, end + 1)
    spent = 1e-3 * steps.double()
    return View(
        step=step,
        total_steps=total,
        lr_spent=1e-3 * step,
        lr_remaining=None if total is None else 1e-3 * (total - step),
        layers=(
            *(LayerInfo(name=n, kind=(kinds or {}).get(n, "block"), numel=64) for n in weights),
            LayerInfo(name="head", kind="head", numel=64),
        ),
        frozen=frozen,
        candidates=tuple(n for n in weights if n not in frozen),
        windows={n: Window(steps=steps, weights=w[begin:end], lr_spent=spent) for n, w in weights.items()} if end else {},
        window_size=WINDOW,
    )


def weights(*names: str) -> dict[str, Tensor]:
    """Names with an s come to rest, others don't."""
    return {n: (still if n.startswith("s") else moving)(150, seed) for seed, n in enumerate(names)}


def decisions(policy: Policy, steps: range, layers: dict[str, Tensor], **kwargs: Any) -> dict[int, Decision]:
    return {step: policy.decide(view(step, layers, **kwargs)) for step in steps}


# --- the registry -------------------------------------------------------------------------------------------------------------


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"smartfrz\.policy: got 'atention'; allowed: attention, linear, late, band, random, freezeout, "):
        make_policy("atention", {})


# --- attention ----------------------------------------------------------------------------------------------------------------


def test_attention_names_what_came_to_rest_and_nothing_else() -> None:
    made = decisions(AttentionPolicy(), range(STAGE, 1500, STAGE), weights("s0", "s1", "m2"))
    assert made[50].freeze == ()
    assert made[1450].freeze == ("s0", "s1")
    assert all("m2" not in decision.freeze for decision in made.values())
    last = made[900]
    assert last.freeze == ("s0", "s1")
    assert last.probabilities.keys() == last.reasons.keys() == {"s0", "s1", "m2"}
    assert last.probabilities["m2"] < 0.5 < last.probabilities["s0"] <= 1.0
    assert last.reasons["s0"].startswith("converged: ")
    assert last.reasons["m2"].startswith("still moving: ")


def test_attention_judges_from_the_minimum_of_snapshots_on() -> None:
    policy = AttentionPolicy()
    assert policy.decide(view(0, weights("s0"))) == Decision(reasons={"s0": f"not judged yet: fewer than {MIN_SNAPSHOTS} snapshots"})
    assert policy.decide(view(INTERVAL * (MIN_SNAPSHOTS - 1), weights("s0"))).probabilities == {}
    assert policy.decide(view(INTERVAL * MIN_SNAPSHOTS, weights("s0"))).probabilities.keys() == {"s0"}


def test_attention_waits_for_stages_in_a_row() -> None:
    """Threshold so low or so high that every stage agrees or none does; then a stage that doesn't breaks the row."""
    layers = weights("s0")
    for patience in (1, 2, 4):
        made = decisions(AttentionPolicy(threshold=1e-9, patience=patience), range(100, 500, STAGE), layers)
        assert [bool(decision.freeze) for decision in made.values()] == [i + 1 >= patience for i in range(8)]
    assert not any(d.freeze for d in decisions(AttentionPolicy(threshold=1 - 1e-9), range(100, 1500, STAGE), weights("m0")).values())
    policy = AttentionPolicy(threshold=0.5, patience=2)
    rest, run = weights("s0"), {"s0": moving(150, 0)}
    assert policy.decide(view(900, rest)).freeze == ()
    assert policy.decide(view(900, run)).freeze == ()
    assert policy.decide(view(950, rest)).freeze == ()
    assert policy.decide(view(950, rest)).freeze == ("s0",)


def test_attention_judges_an_embedding_by_the_block_behind_it() -> None:
    """The embedding itself is still in one case and moves in the other: it isn't asked."""
    kinds = {"s emb": "embedding", "m emb": "embedding"}
    still_in_front = decisions(AttentionPolicy(), range(100, 1500, STAGE), weights("s emb", "m0"), kinds=kinds)
    assert not any(decision.freeze for decision in still_in_front.values())
    last = still_in_front[1450]
    assert last.probabilities["s emb"] == last.probabilities["m0"]
    assert "judged by m0" in last.reasons["s emb"]
    layers = weights("s emb", "s0")
    both = decisions(AttentionPolicy(), range(100, 1500, STAGE), layers, kinds=kinds)[1450]
    assert both.freeze == ("s emb", "s0")


def test_attention_takes_an_embedding_whose_block_is_frozen_at_its_word() -> None:
    """With order "any" the block can be frozen first; by hand it can be so before anything was judged."""
    kinds, layers = {"s emb": "embedding"}, weights("s emb", "s0", "s1")
    policy = AttentionPolicy()
    decisions(policy, range(100, 1450, STAGE), layers, kinds=kinds)
    assert policy.decide(view(1450, layers, kinds=kinds, frozen=("s0",))).freeze == ("s emb", "s1")
    unasked = AttentionPolicy().decide(view(1450, layers, kinds=kinds, frozen=("s0",)))
    assert "s emb" not in unasked.probabilities
    assert unasked.reasons["s emb"].startswith("not judged yet")


def test_attention_judges_behind_a_frozen_layer_by_what_still_moves() -> None:
    """A frozen layer moves no more; how much calm its freeze brought is shown to the predictor, which learned from runs with freezes."""
    layers = weights("m0", "m1", "s2")
    policy, without = AttentionPolicy(), AttentionPolicy()
    decisions(policy, range(100, 1400, STAGE), layers)
    decisions(without, range(100, 1400, STAGE), layers)
    before = without.decide(view(1400, layers)).probabilities
    behind = policy.decide(view(1400, layers, frozen=("m0",))).probabilities
    assert before["s2"] < 0.1  # a still layer behind moving ones is not converged
    assert before["m1"] < behind["m1"] < policy.threshold  # less moves in front of m1 now, but it does itself
    assert behind["s2"] <= behind["m1"]


def test_attention_repeats_and_goes_on_from_its_state() -> None:
    layers = weights("s0", "m1", "s2")
    one, two = AttentionPolicy(), AttentionPolicy()
    assert decisions(one, range(100, 1000, STAGE), layers) == decisions(two, range(100, 1000, STAGE), layers)
    resumed = AttentionPolicy()
    resumed.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert decisions(resumed, range(1000, 1500, STAGE), layers) == decisions(one, range(1000, 1500, STAGE), layers)
    assert json.dumps(resumed.state_dict()) == json.dumps(one.state_dict())


def test_attention_raises_on_nan_names_the_layer_and_keeps_its_state() -> None:
    layers = weights("s0", "s1")
    policy = AttentionPolicy()
    decisions(policy, range(100, 500, STAGE), layers)
    before = json.dumps(policy.state_dict())
    broken = {**layers, "s1": layers["s1"].clone()}
    broken["s1"][45, 7] = math.nan
    with pytest.raises(ValueError, match=r"layer s1: .*NaN"):
        policy.decide(view(500, broken))
    assert json.dumps(policy.state_dict()) == before
    # A frozen layer that broke afterwards is nobody's business any more.
    assert policy.decide(view(500, broken, frozen=("s1",))).probabilities.keys() == {"s0"}


def test_attention_runs_without_knowing_the_length_of_the_run() -> None:
    made = decisions(AttentionPolicy(), range(100, 1500, STAGE), weights("s0", "m1"), total=None)
    assert made[1450].probabilities["s0"] > made[1450].probabilities["m1"] + 0.3
    assert all("m1" not in decision.freeze for decision in made.values())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threshold": 0.0}, "smartfrz.attention.threshold: got 0.0; allowed: "),
        ({"threshold": math.nan}, "smartfrz.attention.threshold: got nan; allowed: "),
        ({"patience": 0}, "smartfrz.attention.patience: got 0; allowed: "),
        ({"predictor": "nowhere.safetensors"}, "smartfrz.attention.predictor: nowhere.safetensors: no such file; allowed: "),
    ],
)
def test_attention_refuses_wrong_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        AttentionPolicy(**settings)
    assert words in str(error.value)


def test_attention_takes_the_threshold_of_its_file_unless_told(tmp_path: Path) -> None:
    from smartfrz_ds.predictor import load_predictor, save_predictor

    model = load_predictor()
    model.threshold = 0.625
    save_predictor(model, tmp_path / "mine.safetensors")
    assert AttentionPolicy(str(tmp_path / "mine.safetensors")).threshold == 0.625
    assert AttentionPolicy(tmp_path / "mine.safetensors", threshold=0.75).threshold == 0.75


def replay(recording: Recording, policy: Policy) -> dict[str, int]:
    """The step at which the policy would have frozen each layer of a recorded run, front to back, as the controller obeys it."""
    stride = 4
    steps, lr = recording.steps[::stride], recording.lr_spent[::stride]
    names = [str(i) for i in range(len(recording.kinds))]
    windows: dict[str, Window] = {}
    frozen: dict[str, int] = {}
    for end in range(5, len(steps), 5):
        begin = max(0, end - WINDOW)
        for i, name in enumerate(names):
            if name not in frozen:
                windows[name] = Window(steps=steps[begin:end], weights=recording.weights[i, ::stride][begin:end], lr_spent=lr[begin:end])
        decision = policy.decide(
            View(
                step=int(steps[end - 1]),
                total_steps=recording.total_steps,
                lr_spent=float(lr[end - 1]),
                lr_remaining=recording.lr_total - float(lr[end - 1]),
                layers=tuple(LayerInfo(name=n, kind=k, numel=1) for n, k in zip(names, recording.kinds, strict=True)),
                frozen=tuple(frozen),
                candidates=tuple(n for n in names if n not in frozen),
                windows=windows,
                window_size=WINDOW,
            )
        )
        for name in names:
            if name not in frozen:
                if name not in decision.freeze:
                    break
                frozen[name] = int(steps[end - 1])
    return frozen


def test_attention_on_a_real_run_that_it_never_saw() -> None:
    """Fine-tuning with a decaying learning rate: it freezes, not at the start, and what it froze stays what it was."""
    recording = record(TaskRun(net="mlp", data="digits", optimizer="adamw-cosine", regime="finetune", seed=4321, steps=400))
    frozen = replay(recording, AttentionPolicy())
    assert len(frozen) >= 2
    truth = prefix_settled(recording.cka, recording.kinds)
    similarity = [float(truth[int((recording.cka_steps <= step).sum()) - 1, int(name)]) for name, step in frozen.items()]
    assert min(similarity) > 0.9
    assert sum(s >= CONVERGED for s in similarity) >= 0.7 * len(similarity)
    assert min(frozen.values()) >= 4 * SNAPSHOT_EVERY * MIN_SNAPSHOTS


# --- linear -------------------------------------------------------------------------------------------------------------------


def linear_run(policy: LinearPolicy, layers: dict[str, Tensor], steps: range, **kwargs: Any) -> dict[str, int]:
    """The step at which each layer was frozen, every step a freezing stage."""
    frozen: dict[str, int] = {}
    for step in steps:
        for name in policy.decide(view(step, layers, frozen=tuple(frozen), **kwargs)).freeze:
            assert name not in frozen
            frozen[name] = step
    return frozen


def test_linear_freezes_one_after_the_other_evenly() -> None:
    layers = weights(*"abcdefg")  # 8 with the head
    frozen = linear_run(LinearPolicy(100, 200, 0.75), layers, range(50, 300))
    assert frozen == {"a": 100, "b": 120, "c": 140, "d": 160, "e": 180, "f": 200}
    assert linear_run(LinearPolicy(100, 200, 1.0), layers, range(50, 300)).keys() == set("abcdefg")  # never the head
    assert linear_run(LinearPolicy(100, 200, 0.13), layers, range(50, 300)) == {"a": 100}
    assert linear_run(LinearPolicy(100, 200, 0.12), layers, range(50, 300)) == {}


def test_linear_catches_up_at_a_late_stage() -> None:
    layers = weights(*"abcdefg")
    decision = LinearPolicy(100, 200, 0.75).decide(view(170, layers, frozen=("a",)))
    assert decision.freeze == ("b", "c", "d")
    assert decision.reasons["b"] == "layer 2 of 4 due at step 170"
    assert decision.probabilities == {}


def test_linear_takes_its_steps_from_the_length_of_the_run() -> None:
    frozen = linear_run(LinearPolicy(max_frozen_fraction=0.5), weights(*"abcde"), range(1, 1000, 1), total=1000)
    assert frozen == {"a": 200, "b": 500, "c": 800}


def test_linear_skips_what_it_may_not_freeze_and_what_the_user_froze() -> None:
    seen = view(1000, weights(*"abcdefg"))
    kept = replace(seen, candidates=tuple(n for n in seen.candidates if n != "b"))
    assert LinearPolicy(100, 200, 0.5).decide(kept).freeze == ("a", "c", "d")
    users = replace(seen, layers=(replace(seen.layers[0], numel=0), *seen.layers[1:]), candidates=seen.candidates[1:])
    assert LinearPolicy(100, 200, 0.5).decide(users).freeze == ("b", "c", "d", "e")


@pytest.mark.parametrize(
    ("settings", "total", "words"),
    [
        ({}, None, "smartfrz.linear.start_step: got null, and the length of the run is unknown"),
        ({"start_step": 5}, None, "smartfrz.linear.end_step: got null, and the length of the run is unknown"),
        ({"start_step": 900}, 1000, "smartfrz.linear.start_step: got 900; allowed: an integer < end_step (800)"),
        ({"end_step": 100}, 1000, "smartfrz.linear.end_step: got 100; allowed: an integer > start_step (200)"),
        ({"start_step": 9, "end_step": 9}, None, "smartfrz.linear.end_step: got 9; allowed: an integer > start_step (9)"),
        ({"start_step": -1}, 1000, "smartfrz.linear.start_step: got -1"),
        ({"max_frozen_fraction": 0.0}, 1000, "smartfrz.max_frozen_fraction: got 0.0"),
    ],
)
def test_linear_refuses_steps_that_cannot_be_before_training(settings: dict[str, Any], total: int | None, words: str) -> None:
    with pytest.raises(ValueError) as error:
        LinearPolicy(**settings).check_start(total, view(10, weights("a")).layers)
    assert words in str(error.value)


def test_linear_needs_no_length_when_both_steps_are_given() -> None:
    policy = LinearPolicy(10, 20)
    policy.check_start(None, view(10, weights("a")).layers)
    assert linear_run(policy, weights("a", "b"), range(1, 30), total=None) == {"a": 10, "b": 20}


# --- manual -------------------------------------------------------------------------------------------------------------------


def test_manual_never_freezes() -> None:
    assert all(d == Decision() for d in decisions(ManualPolicy(), range(50, 1500, STAGE), weights("s0", "s1")).values())
