"""The published rules of the rivals, each on a history made by hand whose outcome can be told with pencil and paper."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.model.tensor_json import decode, encode
from smartfrz_ds.policies import (
    POLICIES,
    SHARED_SETTINGS,
    AutoFreezePolicy,
    EgeriaPolicy,
    FreezeOutPolicy,
    LatePolicy,
    LayerInfo,
    PipeTransformerPolicy,
    Policy,
    RandomPolicy,
    SetsLr,
    View,
    WeightDriftPolicy,
    Window,
    check_needs,
    make_policy,
)
from smartfrz_ds.policies.egeria import moving_average, preserving_loss, similarity_rows, slope_of
from smartfrz_ds.predictor.similarity import centered_gram

SIZE = 64


def view(
    step: int,
    names: Sequence[str],
    *,
    total: int | None = 1000,
    frozen: Sequence[str] = (),
    kept: Sequence[str] = (),
    embedding: str = "",
    gradients: Mapping[str, float] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    grams: Mapping[str, Tensor] | None = None,
) -> View:
    """Blocks by these names, one of them an embedding, and a head behind them. gradients: the norm of each layer's. weights: (n, SIZE)."""
    kinds: dict[str, Any] = {embedding: "embedding"}
    return View(
        step=step,
        total_steps=total,
        lr_spent=1e-3 * step,
        lr_remaining=None if total is None else 1e-3 * (total - step),
        layers=(
            *(LayerInfo(name=n, kind=kinds.get(n, "block"), numel=SIZE) for n in names),
            LayerInfo(name="head", kind="head", numel=SIZE),
        ),
        frozen=tuple(n for n in names if n in frozen),
        candidates=tuple(n for n in names if n not in frozen and n not in kept),
        windows={
            n: Window(steps=10 * torch.arange(1, len(w) + 1), weights=w, lr_spent=torch.zeros(len(w), dtype=torch.float64))
            for n, w in (weights or {}).items()
        },
        window_size=30,
        gradients={n: torch.full((SIZE,), norm / SIZE**0.5) for n, norm in (gradients or {}).items() if n not in frozen},
        grams=dict(grams or {}),
    )


def run(policy: Policy, names: Sequence[str], steps: range, **kwargs: Any) -> dict[str, int]:
    """The step at which each layer froze, with every one of `steps` a freezing stage."""
    frozen: dict[str, int] = {}
    for step in steps:
        for name in policy.decide(view(step, names, frozen=tuple(frozen), **kwargs)).freeze:
            assert name not in frozen
            frozen[name] = step
    return frozen


def revived(policy: Policy, **settings: Any) -> Policy:
    """Another policy of the same kind that goes on from this one's state, through JSON."""
    other = type(policy)(**settings)
    other.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert other.state_dict() == policy.state_dict()
    return other


# --- all of them ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_made_from_the_settings_of_a_run(name: str) -> None:
    config = FreezeConfig.load({"policy": name})
    settings = config.chosen_settings | {key: getattr(config, key) for key in SHARED_SETTINGS.get(name, ())}
    policy = make_policy(name, settings)
    assert isinstance(policy, Policy) and type(policy) is POLICIES[name] and policy.name == name
    assert policy.needs <= {"weights", "gradients", "activations", "total_steps", "lr_scale"}
    assert isinstance(policy, SetsLr) == ("lr_scale" in policy.needs)
    json.dumps(policy.state_dict())


def test_the_sections_defaults_are_the_policies_own() -> None:
    for name, kind in POLICIES.items():
        policy, plain = make_policy(name, FreezeConfig.load({"policy": name}).chosen_settings), kind()
        settings = {key: value for key, value in vars(plain).items() if not key.startswith("_")}
        assert settings == {key: vars(policy)[key] for key in settings}, name


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "manual"])
def test_no_policy_names_what_it_may_not_freeze(name: str) -> None:
    names = ["e", "a", "b", "c"]
    policy = POLICIES[name]()
    for k in range(12):
        noise = torch.Generator().manual_seed(k)
        seen = view(
            80 * (k + 1),
            names,
            embedding="e",
            frozen=("e",),
            kept=("b",),
            gradients=dict.fromkeys(names, 1.0),
            weights={n: torch.ones(12, SIZE) for n in names},
            grams={n: centered_gram(torch.randn(6, 9, generator=noise)) for n in names},
        )
        assert set(policy.decide(seen).freeze) <= {"a", "c"}


def test_what_a_run_cannot_give_is_refused_by_name() -> None:
    everything = {"weights", "gradients", "activations", "total_steps", "lr_scale"}
    for kind in POLICIES.values():
        check_needs(kind(), everything)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"smartfrz\.policy: 'egeria' needs a probe batch; allowed: an integer >= 2 at smartfrz\.probe"):
        check_needs(EgeriaPolicy(), {"weights"})
    with pytest.raises(
        ValueError, match=r"'freezeout' needs the length of the run, which is unknown; allowed: an integer at smartfrz\.tot"
    ):
        check_needs(FreezeOutPolicy(), {"lr_scale"})
    with pytest.raises(ValueError, match=r"'freezeout' needs groups of its own, said differently"):
        check_needs(FreezeOutPolicy(), {"total_steps"}, {"lr_scale": "groups of its own, said differently"})
    with pytest.raises(ValueError, match=r"'autofreeze' needs gradients"):
        check_needs(AutoFreezePolicy(), {"weights"})
    with pytest.raises(ValueError, match=r"'pipetransformer' needs gradients"):
        check_needs(PipeTransformerPolicy(), set())
    check_needs(PipeTransformerPolicy(gradients=False), set())


UNKNOWN = [LatePolicy(), RandomPolicy(), WeightDriftPolicy(), PipeTransformerPolicy()]


@pytest.mark.parametrize("policy", UNKNOWN, ids=[policy.name for policy in UNKNOWN])
def test_a_schedule_needs_the_length_of_the_run_or_its_steps(policy: Any) -> None:
    layers = view(1, "ab").layers
    with pytest.raises(
        ValueError, match=rf"smartfrz\.{policy.name}\.(start_step|interval): got null, and the length of the run is unknown"
    ):
        policy.check_start(None, layers)
    policy.check_start(1000, layers)
    given = {"interval": 5} if policy.name == "pipetransformer" else {"start_step": 5}
    type(policy)(**given, **({"end_step": 9} if policy.name == "random" else {})).check_start(None, layers)


WRONG = [
    (LatePolicy, {"start_step": -1}, "smartfrz.late.start_step: got -1"),
    (LatePolicy, {"share": 1.0}, "smartfrz.late.share: got 1.0; allowed: a number in [0, 1)"),
    (RandomPolicy, {"ratio": 0.0}, "smartfrz.random.ratio: got 0.0"),
    (RandomPolicy, {"start_step": 9, "end_step": 9}, "smartfrz.random.end_step: got 9; allowed: an integer > start_step (9)"),
    (RandomPolicy, {"max_frozen_fraction": 1.5}, "smartfrz.max_frozen_fraction: got 1.5"),
    (FreezeOutPolicy, {"t0": 0.0}, "smartfrz.freezeout.t0: got 0.0"),
    (FreezeOutPolicy, {"growth": "cubed"}, "smartfrz.freezeout.growth: got 'cubed'; allowed: 'linear', 'squared', 'cubic'"),
    (AutoFreezePolicy, {"quantile": 1.01}, "smartfrz.autofreeze.quantile: got 1.01"),
    (EgeriaPolicy, {"window": 1}, "smartfrz.egeria.window: got 1"),
    (EgeriaPolicy, {"tolerance": 1.0}, "smartfrz.egeria.tolerance: got 1.0"),
    (EgeriaPolicy, {"refresh": 0}, "smartfrz.egeria.refresh: got 0"),
    (PipeTransformerPolicy, {"alpha": 1.0}, "smartfrz.pipetransformer.alpha: got 1.0"),
    (PipeTransformerPolicy, {"interval": 0}, "smartfrz.pipetransformer.interval: got 0"),
    (WeightDriftPolicy, {"threshold": 0.0}, "smartfrz.weight_drift.threshold: got 0.0"),
    (WeightDriftPolicy, {"share": -0.1}, "smartfrz.weight_drift.share: got -0.1"),
]


@pytest.mark.parametrize(("kind", "settings", "words"), WRONG, ids=[words.split(":")[0] for _, _, words in WRONG])
def test_wrong_settings_are_refused(kind: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        kind(**settings)
    assert str(error.value).startswith(words) and "allowed: " in str(error.value)


# --- late -----------------------------------------------------------------------------------------------------------------------


def test_late_freezes_the_whole_body_at_one_step() -> None:
    assert run(LatePolicy(start_step=300), "abc", range(1, 1000)) == dict.fromkeys("abc", 300)
    assert run(LatePolicy(share=0.25), "abc", range(1, 1000)) == dict.fromkeys("abc", 250)
    assert run(LatePolicy(), "abc", range(1, 1000), kept=("b",)) == dict.fromkeys("ac", 700)


# --- random ---------------------------------------------------------------------------------------------------------------------


def test_random_keeps_its_ratio_and_order() -> None:
    names = [f"l{i}" for i in range(9)]  # 10 layers with the head
    for seed in range(20):
        front = run(RandomPolicy(0.5, 200, 600, seed), names, range(1, 1000, 1))
        assert list(front) == names[:5], "front to back"
        assert all(200 <= step <= 600 for step in front.values())
        assert list(front.values()) == sorted(front.values())
    anywhere = [run(RandomPolicy(0.5, 200, 600, seed, "any"), names, range(1, 1000)) for seed in range(200)]
    assert all(len(frozen) == 5 for frozen in anywhere)
    counts = {name: sum(name in frozen for frozen in anywhere) for name in names}
    # each of 9 layers is among the 5 with probability 5/9: 111 of 200, standard deviation 7
    assert all(111 - 28 <= count <= 111 + 28 for count in counts.values()), counts
    steps = [step for frozen in anywhere for step in frozen.values()]
    assert abs(sum(steps) / len(steps) - 400) < 4 * 116 / len(steps) ** 0.5


def test_random_draws_once_and_carries_its_draw_on() -> None:
    names = [f"l{i}" for i in range(9)]
    one = RandomPolicy(seed=3)
    first = run(one, names, range(1, 450))
    assert first and first == run(RandomPolicy(seed=3), names, range(1, 450))
    assert run(RandomPolicy(seed=4), names, range(1, 1000)) != run(RandomPolicy(seed=3), names, range(1, 1000))
    # another seed in the settings of the resumed run changes nothing of what was drawn
    assert run(revived(one, seed=4), names, range(1, 1000)) == run(RandomPolicy(seed=3), names, range(1, 1000))


def test_random_obeys_the_largest_fraction() -> None:
    names = [f"l{i}" for i in range(9)]
    assert len(run(RandomPolicy(0.9, 1, 50, max_frozen_fraction=0.3), names, range(1, 99))) == 3
    assert len(run(RandomPolicy(None, 1, 50, max_frozen_fraction=0.3), names, range(1, 99))) == 3
    assert len(run(RandomPolicy(1.0, 1, 50, max_frozen_fraction=1.0), names, range(1, 99))) == 9  # never the head


# --- freezeout ------------------------------------------------------------------------------------------------------------------


def test_freezeout_ends_layers_as_published() -> None:
    """t_i = (t0 + (1 - t0) i/(n - 1))^power over all layers, the head the last one."""
    layers = view(1, "abcd").layers
    assert FreezeOutPolicy(0.5, "linear").ends(layers) == pytest.approx({"a": 0.5, "b": 0.625, "c": 0.75, "d": 0.875, "head": 1.0})
    cubic = FreezeOutPolicy(0.8).ends(layers)
    assert cubic == pytest.approx({"a": 0.8**3, "b": 0.85**3, "c": 0.9**3, "d": 0.95**3, "head": 1.0})
    assert FreezeOutPolicy(0.8, "squared").ends(layers)["b"] == pytest.approx(0.85**2)
    frozen = run(FreezeOutPolicy(0.5, "linear"), "abcd", range(1, 1001))
    assert frozen == {"a": 500, "b": 625, "c": 750, "d": 875}


def test_freezeout_anneals_each_layer_along_its_own_cosine() -> None:
    layers = view(1, "abcd").layers
    scaled, plain = FreezeOutPolicy(0.5, "linear"), FreezeOutPolicy(0.5, "linear", scale_lr=False)
    for name, end in scaled.ends(layers).items():
        for step in range(0, 1001, 50):
            expected = 0.5 * (1 + math.cos(math.pi * step / 1000 / end)) if step < 1000 * end else 0.0
            assert plain.lr_scales(step, 1000, layers, ())[name] == pytest.approx(expected, abs=1e-12)
            assert scaled.lr_scales(step, 1000, layers, ())[name] == pytest.approx(expected / end, abs=1e-12)
        # the published reason for the scaling: all layers travel as far as one that is annealed over the whole run, half of full speed
        travelled = sum(scaled.lr_scales(step, 1000, layers, ())[name] for step in range(1000))
        assert travelled == pytest.approx(500, rel=0.01)


def test_freezeout_trains_what_the_user_keeps_active_to_the_end() -> None:
    layers = view(1, "abcd").layers
    scales = FreezeOutPolicy(0.5, "linear").lr_scales(900, 1000, layers, ("a",))
    assert scales["a"] == scales["head"] > 0 and scales["b"] == 0.0
    assert run(FreezeOutPolicy(0.5, "linear"), "abcd", range(1, 1001), kept=("a",)).keys() == set("bcd")


# --- autofreeze -----------------------------------------------------------------------------------------------------------------


def test_autofreeze_freezes_the_front_up_to_the_first_large_change() -> None:
    """η by hand: a 0.1, b 0.2, c 0.5, d 0.4; the median is 0.3, the first above it is c."""
    policy = AutoFreezePolicy()
    first = policy.decide(view(50, "abcd", gradients={"a": 10, "b": 10, "c": 10, "d": 10}))
    assert first.freeze == () and first.reasons["a"].startswith("not judged yet")
    second = policy.decide(view(100, "abcd", gradients={"a": 11, "b": 8, "c": 15, "d": 6}))
    assert second.freeze == ("a", "b")
    assert second.reasons["c"] == "gradient norm changed by 0.5000, the 0.5 quantile is 0.3000"
    # Next interval, among the active: c 3/15 = 0.2, d 3/6 = 0.5, the median 0.35
    third = policy.decide(view(150, "abcd", frozen=("a", "b"), gradients={"c": 12, "d": 9}))
    assert third.freeze == ("c",)


def test_autofreeze_stops_at_a_front_layer_that_still_changes() -> None:
    policy = AutoFreezePolicy()
    policy.decide(view(50, "abcd", gradients=dict.fromkeys("abcd", 10)))
    assert policy.decide(view(100, "abcd", gradients={"a": 20, "b": 10, "c": 10, "d": 10})).freeze == ()
    policy.decide(view(150, "abcd", gradients=dict.fromkeys("abcd", 10)))
    kept = policy.decide(view(200, "abcd", kept=("b",), gradients={"a": 10, "b": 10, "c": 10, "d": 20}))
    assert kept.freeze == ("a",), "what the user keeps active ends the prefix"


def test_autofreeze_takes_the_quantile_that_is_set() -> None:
    for quantile, expected in ((0.01, ("a",)), (0.34, ("a", "b")), (1.0, ("a", "b", "c", "d"))):
        policy = AutoFreezePolicy(quantile)
        policy.decide(view(50, "abcd", gradients=dict.fromkeys("abcd", 10)))
        assert policy.decide(view(100, "abcd", gradients={"a": 10, "b": 11, "c": 12, "d": 13})).freeze == expected


def test_autofreeze_takes_an_embedding_with_its_block() -> None:
    for change, expected in ((10.0, ("e", "a")), (20.0, ())):
        policy = AutoFreezePolicy()
        policy.decide(view(50, "eabc", embedding="e", gradients=dict.fromkeys("eabc", 10)))
        assert policy.decide(view(100, "eabc", embedding="e", gradients={"e": 90, "a": change, "b": 11, "c": 15})).freeze[:2] == expected


def test_autofreeze_goes_on_from_its_state_and_keeps_it_through_nan() -> None:
    policy = AutoFreezePolicy()
    policy.decide(view(50, "abcd", gradients=dict.fromkeys("abcd", 10)))
    again = revived(policy)
    before = again.state_dict()
    with pytest.raises(ValueError, match="layer c: its gradients contain NaN"):
        again.decide(view(100, "abcd", gradients={"a": 10, "b": 10, "c": math.nan, "d": 10}))
    assert again.state_dict() == before
    seen = view(100, "abcd", gradients={"a": 11, "b": 8, "c": 15, "d": 6})
    assert again.decide(seen) == policy.decide(seen)
    assert again.decide(seen).freeze == ("a", "b", "c", "d")  # now nothing has changed since


def test_a_gradient_of_zero_has_not_changed_or_has_changed_without_measure() -> None:
    policy = AutoFreezePolicy()
    policy.decide(view(50, "abc", gradients={"a": 0, "b": 0, "c": 10}))
    assert policy.decide(view(100, "abc", gradients={"a": 0, "b": 5, "c": 11})).freeze == ("a",)


# --- pipetransformer ------------------------------------------------------------------------------------------------------------


def test_pipetransformer_freezes_a_share_of_what_is_left_each_epoch() -> None:
    """α = 1/3, 12 layers: 4, 6.67, 8.44, 9.63, 10.42, … rounded down, as L (1 - (1 - α)^e) says."""
    names = [f"l{i}" for i in range(12)]
    frozen = run(PipeTransformerPolicy(interval=100, gradients=False), names, range(50, 1000, 50))
    counts = [sum(step <= 100 * epoch for step in frozen.values()) for epoch in range(1, 8)]
    assert counts == [int(12 * (1 - (2 / 3) ** epoch) + 1e-9) for epoch in range(1, 8)] == [4, 6, 8, 9, 10, 10, 11]
    assert all(step % 100 == 0 for step in frozen.values())
    assert run(PipeTransformerPolicy(gradients=False), names, range(50, 1000, 50)) == frozen, "a tenth of the run is the same interval"


def test_pipetransformer_goes_no_further_than_the_flattest_gradient() -> None:
    names = [f"l{i}" for i in range(12)]
    policy = PipeTransformerPolicy(interval=100)
    gradients = dict.fromkeys(names, 5.0) | {"l2": 1.0}
    assert policy.decide(view(50, names, gradients=gradients)).freeze == ()
    assert policy.decide(view(100, names, gradients=gradients)).freeze == ("l0", "l1", "l2")  # the share would be 4
    # 3 + (12 - 3)/3 = 6; the flattest active one is the last
    assert policy.decide(view(200, names, frozen=names[:3], gradients=gradients | {"l11": 1.0})).freeze == ("l3", "l4", "l5")


def test_pipetransformer_counts_epochs_that_no_stage_fell_into() -> None:
    names = [f"l{i}" for i in range(12)]
    assert len(PipeTransformerPolicy(interval=100, gradients=False).decide(view(350, names)).freeze) == int(12 * (1 - (2 / 3) ** 3))


def test_pipetransformer_waits_for_gradients_and_goes_on_from_its_state() -> None:
    names = [f"l{i}" for i in range(12)]
    policy = PipeTransformerPolicy(interval=100)
    assert policy.decide(view(100, names)).reasons["l0"] == "not judged yet: no gradients"
    flat = dict.fromkeys(names, 5.0) | {"l11": 1.0}
    with pytest.raises(ValueError, match="layer l4: its gradients"):
        policy.decide(view(100, names, gradients=flat | {"l4": math.inf}))
    assert len(policy.decide(view(100, names, gradients=flat)).freeze) == 4
    again = revived(policy, interval=100)
    seen = view(200, names, frozen=names[:4], gradients=flat)
    assert again.decide(seen) == policy.decide(seen)
    assert len(policy.decide(seen).freeze) == 2


# --- weight drift ---------------------------------------------------------------------------------------------------------------


def test_weight_drift_freezes_below_its_threshold_and_after_its_start() -> None:
    """By hand: each of 64 weights of 2 moves by 0.01, 0.002 or 0.0002: 5e-3, 1e-3 and 1e-4 of the layer."""

    def moved(by: float) -> Tensor:
        return torch.stack([torch.full((SIZE,), 9.0), torch.full((SIZE,), 2.0), torch.full((SIZE,), 2.0 + by)])

    weights = {"a": moved(0.0002), "b": moved(0.01), "c": moved(-0.0002)}
    policy = WeightDriftPolicy(threshold=2e-4)
    assert policy.decide(view(499, "abc", weights=weights)).freeze == ()
    decision = policy.decide(view(500, "abc", weights=weights))
    assert decision.freeze == ("a", "c")
    assert decision.reasons["b"].startswith("moved by 5.00e-03 of its size since the last snapshot; the threshold is 2.00e-04")
    assert WeightDriftPolicy(threshold=5e-5, start_step=10).decide(view(500, "abc", weights=weights)).freeze == ()
    assert WeightDriftPolicy(threshold=0.1, start_step=501).decide(view(500, "abc", weights=weights)).freeze == ()


def test_weight_drift_judges_an_embedding_by_its_block_and_needs_two_snapshots() -> None:
    still, one = torch.ones(2, SIZE), torch.ones(1, SIZE)
    weights = {"e": torch.stack([torch.ones(SIZE), 2 * torch.ones(SIZE)]), "a": still, "b": one}
    decision = WeightDriftPolicy().decide(view(600, "eab", embedding="e", weights=weights))
    assert decision.freeze == ("e", "a")
    assert decision.reasons["e"].endswith("judged by a") and decision.reasons["b"] == "not judged yet: fewer than 2 snapshots"
    with pytest.raises(ValueError, match="layer a: its sampled weights contain NaN"):
        WeightDriftPolicy().decide(view(600, "a", weights={"a": still * math.nan}))


# --- egeria ---------------------------------------------------------------------------------------------------------------------


def test_the_similarity_preserving_loss_is_the_published_one() -> None:
    """By hand: two inputs. The reference's similarities are (1, -1), the layer's after a turn of its second input differ."""
    rows = similarity_rows(torch.tensor([[2.0, -2.0], [-2.0, 2.0]], dtype=torch.float64), "a")
    assert torch.allclose(rows, torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64) / 2**0.5)
    assert preserving_loss(rows, rows) == 0.0
    turned = similarity_rows(torch.tensor([[3.0, 0.0], [0.0, 3.0]], dtype=torch.float64), "a")
    assert preserving_loss(rows, turned) == pytest.approx((2 * (1 - 0.5**0.5) ** 2 + 2 * 0.5) / 4)
    x = torch.randn(7, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert preserving_loss(similarity_rows(centered_gram(x), "a"), similarity_rows(centered_gram(5 * x), "a")) < 1e-30, "scale is nothing"
    assert slope_of([1.0, 3.0, 5.0]) == pytest.approx(2.0)
    assert slope_of([4.0, 1.0, 1.0, 4.0]) == pytest.approx(0.0)
    assert moving_average([1, 2, 6, 7], 2) == [1.5, 4.0, 6.5]


def outputs(stage: int, rest_from: int, seed: int) -> Tensor:
    """A layer's activations of 6 inputs: they drift ever more slowly until the stage at which they come to rest."""
    generator = torch.Generator().manual_seed(seed)
    start, way = torch.randn(2, 6, 20, generator=generator, dtype=torch.float64)
    moved = sum(0.5**i for i in range(min(stage, rest_from)))
    return start + moved * way


def egeria_run(
    policy: Policy, rests: Mapping[str, int], stages: range, frozen: dict[str, int] | None = None, **kwargs: Any
) -> dict[str, int]:
    """The stage at which each layer froze. rests: when each comes to rest."""
    frozen = {} if frozen is None else frozen
    for stage in stages:
        grams = {name: centered_gram(outputs(stage, rest, seed)) for seed, (name, rest) in enumerate(rests.items())}
        for name in policy.decide(view(50 * stage, list(rests), frozen=tuple(frozen), grams=grams, **kwargs)).freeze:
            frozen[name] = stage
    return frozen


def test_egeria_freezes_the_front_layer_when_its_plasticity_stands_still() -> None:
    """Plasticity by hand, with window 2: of three inputs one turns, fast and then hardly any more."""
    angles = [0.0, 0.6, 1.0, 1.3, 1.31, 1.32, 1.33, 1.34, 1.35, 1.36]

    def gram(angle: float) -> Tensor:
        x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
        return x @ x.T

    def rows(angle: float) -> Tensor:
        return gram(angle) / gram(angle).norm(dim=1, keepdim=True)

    loss = [float((rows(now) - rows(before)).square().mean()) for before, now in pairwise(angles)]  # at stages 2, 3, …
    mean = [(a + b) / 2 for a, b in pairwise(loss)]  # from stage 3 on
    slope = [abs(b - a) for a, b in pairwise(mean)]  # from stage 4 on
    small = [s <= 0.2 * max(slope[: i + 1]) for i, s in enumerate(slope)]
    assert small == [False, False, False, True, True, True, True], slope  # at stages 4 to 10
    policy, frozen = EgeriaPolicy(window=2, tolerance=0.2, refresh=1), {}
    for stage, angle in enumerate(angles, 1):
        for name in policy.decide(view(50 * stage, "ab", frozen=tuple(frozen), grams=dict.fromkeys("ab", gram(angle)))).freeze:
            frozen[name] = stage
    # a at the second small slope in a row; b's count begins when it comes to the front
    assert frozen == {"a": 8, "b": 10}


def test_egeria_waits_for_a_front_layer_that_keeps_changing() -> None:
    """b rests from the start; a's plasticity swings for ever: nothing freezes, since only the front layer is judged."""
    policy = EgeriaPolicy(window=2, refresh=1)
    generator = torch.Generator().manual_seed(0)
    still = centered_gram(torch.randn(6, 20, generator=generator, dtype=torch.float64))
    base, way = torch.randn(2, 6, 20, generator=generator, dtype=torch.float64)
    for stage in range(1, 40):
        swing = centered_gram(base + (stage % 3) * way)
        assert policy.decide(view(50 * stage, "ab", grams={"a": swing, "b": still})).freeze == ()


def test_egeria_takes_an_embedding_with_its_block_and_skips_layers_without_output() -> None:
    frozen = egeria_run(EgeriaPolicy(window=2, refresh=1), {"e": 99, "a": 4, "b": 99}, range(1, 15), embedding="e")
    assert frozen.keys() >= {"e", "a"} and frozen["e"] == frozen["a"]
    policy = EgeriaPolicy(window=2, refresh=1)
    for stage in range(1, 15):
        decision = policy.decide(view(50 * stage, "ab", grams={"b": centered_gram(outputs(stage, 3, 0))}))
        assert decision.freeze == ()
    assert decision.reasons["a"].startswith("not judged yet: no output")


def test_egeria_compares_with_the_last_refresh() -> None:
    """refresh 3: the reference is that of stages 1, 4, 7, …; so at stages 2, 3 and 4 plasticity is the distance to stage 1."""
    policy = EgeriaPolicy(window=5, refresh=3)
    x = [outputs(stage, 99, 0) for stage in range(9)]
    for stage in range(1, 8):
        policy.decide(view(50 * stage, "a", grams={"a": centered_gram(x[stage])}))
    rows = [similarity_rows(centered_gram(item), "a") for item in x]
    pairs = [(2, 1), (3, 1), (4, 1), (5, 4), (6, 4), (7, 4)]
    assert policy.state_dict()["plasticity"]["a"] == pytest.approx(
        [preserving_loss(rows[now], rows[then]) for now, then in pairs], rel=1e-12
    )


def test_egeria_goes_on_from_its_state_and_keeps_it_through_nan() -> None:
    rests = {"a": 4, "b": 6}
    whole = egeria_run(EgeriaPolicy(), rests, range(1, 40))
    assert list(whole) == ["a", "b"]
    for cut in (2, 7, 11):
        policy = EgeriaPolicy()
        frozen = egeria_run(policy, rests, range(1, cut))
        again = revived(policy)
        before = again.state_dict()
        with pytest.raises(ValueError, match="layer a: its output for the probe batch contains NaN"):
            again.decide(view(50 * cut, "ab", grams={"a": torch.full((6, 6), math.nan, dtype=torch.float64)}))
        assert again.state_dict() == before
        assert egeria_run(again, rests, range(cut, 40), frozen) == whole


# --- their state ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_in_json_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)
    tensor[0, 0], tensor[1, 1] = math.inf, -0.0
    back = decode(json.loads(json.dumps(encode(tensor.T))))
    assert back.dtype == dtype and torch.equal(back, tensor.T) and math.copysign(1, float(back[1, 1])) == -1
    assert decode(encode(torch.zeros(0, 4))).shape == (0, 4)
