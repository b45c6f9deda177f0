"""The predictor itself: similarity, features, the second opinion, the networks and their file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.bounds import rounding
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smartfrz_ds.model.view import LayerInfo, View, Window
from smartfrz_ds.predictor import MIN_SNAPSHOTS, FeatureExtractor, FreezePredictor, linear_cka, load_predictor, save_predictor
from smartfrz_ds.predictor.features import SCALAR_FEATURES, TOKEN_FEATURES, FeatureBatch
from smartfrz_ds.predictor.model import parameter_count, predictor_notes
from smartfrz_ds.predictor.probe_features import PROBE_FEATURES
from smartfrz_ds.predictor.similarity import centered_gram, gram_vector, probe_rows

SIZE, SPEED = 64, 1e-2  # of `walk`
# A feature is made of up to four norms over SIZE weights in fp32, mostly of their logarithms: off by the roundings of these sums.
NORMS = rounding(4 * SIZE, 1.0)
# Some numbers of size ten and less, in fp32, and their sum.
FEW = rounding(4, 10.0)
# The network: chains of at most 200 additions (a window of 30 snapshots, 24 hidden and 16 more) of numbers about one.
NETWORK = rounding(200, 1.0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def walk(n: int, size: int = SIZE, *, speed: float = SPEED, seed: int = 0) -> Tensor:
    """(n, size): a random walk from weights of size one."""
    return random(size, seed=seed) + speed * random(n, size, seed=seed + 1).cumsum(0)


def window(weights: Tensor, *, interval: int = 10, lr: float = 1e-3, first: int = 10) -> Window:
    steps = first + interval * torch.arange(len(weights))
    return Window(steps=steps, weights=weights, lr_spent=lr * steps.double())


def view(
    windows: dict[str, Window], *, frozen: tuple[str, ...] = (), step: int = 300, total: int | None = 1000, remaining: float | None = 0.7
) -> View:
    names = tuple(windows)
    return View(
        step=step,
        total_steps=total,
        lr_spent=1e-3 * step,
        lr_remaining=remaining,
        layers=(*(LayerInfo(name=n, kind="block", numel=64) for n in names), LayerInfo(name="head", kind="head", numel=64)),
        frozen=frozen,
        candidates=tuple(n for n in names if n not in frozen),
        windows=windows,
        window_size=30,
    )


def scalars(batch: FeatureBatch, name: str) -> dict[str, float]:
    row = batch.scalars[batch.names.index(name)]
    return dict(zip(SCALAR_FEATURES, row.tolist(), strict=True))


# --- similarity ---------------------------------------------------------------------------------------------------------------


def slow_cka(x: Tensor, y: Tensor) -> float:
    """Kornblith et al. 2019, equation 3, with explicit centering matrices and loops."""
    n = len(x)
    k = torch.tensor([[float(a @ b) for b in x.double()] for a in x.double()], dtype=torch.float64)
    m = torch.tensor([[float(a @ b) for b in y.double()] for a in y.double()], dtype=torch.float64)
    h = torch.eye(n, dtype=torch.float64) - torch.full((n, n), 1.0 / n, dtype=torch.float64)

    def hsic(p: Tensor, q: Tensor) -> float:
        return float(torch.trace(p @ h @ q @ h)) / (n - 1) ** 2

    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


@pytest.mark.parametrize(("p", "q"), [(3, 5), (40, 7), (200, 300)])
def test_cka_equals_the_slow_reference(p: int, q: int) -> None:
    x = random(24, p) + 3.0  # off center: a version that doesn't center would differ
    y = x @ random(p, q, seed=1) + 0.5 * random(24, q, seed=2)
    assert linear_cka(x, y) == pytest.approx(slow_cka(x, y), abs=rounding(24 * 24 * max(p, q), 1.0, torch.float64))
    assert linear_cka(x, y) < 0.999


def test_cka_ignores_rotation_scale_and_offset_and_keeps_its_digits_near_one() -> None:
    x = random(50, 8)
    rotation, _ = torch.linalg.qr(random(8, 8, seed=1))
    assert linear_cka(x, 7.0 * x @ rotation - 2.0) == pytest.approx(1.0, abs=rounding(8, 1.0))
    assert linear_cka(x, random(50, 8, seed=3)) < 0.5
    near = [linear_cka(x.double(), x.double() + e * random(50, 8, seed=4).double()) for e in (1e-3, 2e-3)]
    assert 1 - near[1] == pytest.approx(4 * (1 - near[0]), rel=0.05)  # quadratic: at 1e-6 from one, fp32 would be noise


def test_cka_of_constant_representations_and_bad_shapes() -> None:
    x, dead = random(10, 4), torch.ones(10, 4)
    assert (linear_cka(dead, dead), linear_cka(x, dead), linear_cka(dead, x)) == (1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"inputs >= 2"):
        linear_cka(x[:1], x[:1])
    with pytest.raises(ValueError, match="same inputs"):
        linear_cka(x, x[:5])


# --- features -----------------------------------------------------------------------------------------------------------------


def test_scalars_equal_the_slow_reference() -> None:
    """Everything once more from the definitions, on plain lists; the learning rate changes inside of the window."""
    first, second = walk(12, seed=1), walk(12, speed=5e-2, seed=5)
    lr_spent = torch.linspace(0, 1, 12, dtype=torch.float64).sqrt() + 0.1
    windows = {n: Window(steps=10 * torch.arange(1, 13), weights=w, lr_spent=lr_spent) for n, w in (("a", first), ("b", second))}
    batch = FeatureExtractor().extract(view(windows, step=120, remaining=0.25))

    def norm(v: Tensor) -> float:
        return math.sqrt(sum(x * x for x in v.double().tolist()))

    remaining = math.log(0.25 / float(lr_spent[11] - lr_spent[0]))
    half = next(i for i in range(12) if lr_spent[i] >= (lr_spent[0] + lr_spent[11]) / 2)

    def expected(w: Tensor) -> tuple[float, float, float, float]:
        drift = norm(w[11] - w[0]) / norm(w[11])
        newest = norm(w[11] - w[6]) / float(lr_spent[11] - lr_spent[6])
        oldest = norm(w[5] - w[0]) / float(lr_spent[5] - lr_spent[0])
        grown = math.log(norm(w[11] - w[0]) / norm(w[11] - w[half]))
        growth = grown / math.log(float(lr_spent[11] - lr_spent[0]) / float(lr_spent[11] - lr_spent[half]))
        future = math.log(drift) + min(1.0, max(0.3, growth)) * remaining
        return math.log(drift), math.log(newest / oldest), future, future - math.log(drift)  # displaced: the window begins at the start

    def both(x: float, y: float) -> float:
        return 0.5 * math.log(math.exp(2 * x) + math.exp(2 * y))

    (drift_a, ratio_a, future_a, share_a), (drift_b, ratio_b, future_b, share_b) = expected(first), expected(second)
    row_a = (drift_a, drift_a, ratio_a, ratio_a, remaining, 1.0, future_a, future_a, share_a, share_a, 0.0, 0.0)
    row_b = (drift_b, both(drift_a, drift_b), ratio_b, max(ratio_a, ratio_b), remaining, 1.0)
    row_b += (future_b, both(future_a, future_b), share_b, max(share_a, share_b), 0.0, 0.0)
    want_a, want_b = (dict(zip(SCALAR_FEATURES, row, strict=True)) for row in (row_a, row_b))
    assert scalars(batch, "a") == pytest.approx(want_a, abs=NORMS)
    assert scalars(batch, "b") == pytest.approx(want_b, abs=NORMS)


def test_tokens_equal_the_slow_reference() -> None:
    w = walk(11, seed=3)
    lr_spent = torch.arange(11, dtype=torch.float64).square() + 1
    steps = torch.tensor([0, 10, 20, 30, 50, 60, 70, 80, 90, 100, 200])
    tokens = FeatureExtractor().extract(view({"a": Window(steps=steps, weights=w, lr_spent=lr_spent)})).tokens[0]
    step = [float((w[i] - w[i - 1]).norm()) for i in range(1, 11)]
    spent = [float(lr_spent[i] - lr_spent[i - 1]) for i in range(1, 11)]
    largest = max(float((x - w[10]).norm()) for x in w)
    for i in range(11):
        s, c = (step[max(i, 1) - 1], spent[max(i, 1) - 1])
        cosine = float(torch.cosine_similarity(w[i] - w[i - 1], w[i + 1] - w[i], dim=0)) if 0 < i < 10 else 0.0
        want = [
            float(200 - steps[i]) / 200,
            float(lr_spent[10] - lr_spent[i]) / float(lr_spent[10] - lr_spent[0]),
            float((w[i] - w[10]).norm()) / largest,
            float((w[i] - w[0]).norm()) / largest,
            math.log(s / (sum(step) / 10)),
            math.log(s / (sum(step) / 10)) - math.log(c / (sum(spent) / 10)),
            cosine,
        ]
        assert tokens[i].tolist() == pytest.approx(want, abs=NORMS), i


def test_features_have_no_scale_and_no_places() -> None:
    def features(change: Callable[[Tensor], Tensor], lr: float = 1e-3, interval: int = 10) -> FeatureBatch:
        windows = {n: window(change(walk(20, seed=s)), lr=lr, interval=interval, first=interval) for n, s in (("a", 1), ("b", 8))}
        return FeatureExtractor().extract(view(windows, remaining=700 * lr * interval / 10))

    plain = features(lambda w: w)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for other in (
        features(lambda w: 1e3 * w),
        features(lambda w: -w),
        features(lambda w: w[:, order]),
        features(lambda w: w.repeat_interleave(2, 1)),  # a larger sample of the same
        features(lambda w: w, lr=0.5),
        features(lambda w: w, interval=50),
    ):
        scaled = NORMS + rounding(1, 3 / SPEED)  # a weight of up to three is rounded after scaling, and differences of SPEED are taken
        torch.testing.assert_close(other.tokens, plain.tokens, atol=scaled, rtol=0)
        torch.testing.assert_close(other.scalars, plain.scalars, atol=scaled, rtol=0)
    faster = features(lambda w: w[:1] + 3 * (w - w[:1]))
    assert scalars(faster, "a")["log_drift"] - scalars(plain, "a")["log_drift"] == pytest.approx(
        math.log(3), abs=0.1
    )  # not rounding: the window's end moved too


def test_ratio_compares_with_the_first_window_and_the_reference_stays() -> None:
    """Speed 1 for 30 snapshots, then a tenth of it: the ratio is near log 1, then near log 0.1, though the windows slide."""
    update = torch.ones(64) * 1e-3
    weights = random(64) + torch.cat([torch.arange(30.0), 29 + 0.1 * torch.arange(1, 31.0)])[:, None] * update
    extractor = FeatureExtractor()
    ratios = {}
    for end in range(10, 61, 5):
        begin = max(0, end - 30)
        w = Window(
            steps=10 * torch.arange(begin, end), weights=weights[begin:end], lr_spent=1e-2 * torch.arange(begin, end, dtype=torch.float64)
        )
        ratios[end] = scalars(extractor.extract(view({"a": w}, step=10 * end)), "a")["log_ratio"]
    assert [ratios[end] for end in (10, 20, 30)] == pytest.approx([0.0, 0.0, 0.0], abs=0.02)  # not rounding: half-windows don't end evenly
    assert ratios[60] == pytest.approx(math.log(0.1), abs=0.02)


def test_frozen_layers_leave_the_prefix_and_are_held() -> None:
    """A layer that is frozen makes those behind it look still: the cascade that froze whole networks. What it takes away is shown."""
    moving = {n: window(walk(20, speed=5e-2, seed=s)) for n, s in (("a", 1), ("b", 9), ("c", 20))}
    extractor = FeatureExtractor()
    before = scalars(extractor.extract(view(moving)), "c")
    after = extractor.extract(view(moving, frozen=("a", "b")))
    assert after.names == ("c",)
    now = scalars(after, "c")
    assert before["log_prefix_drift"] > before["log_drift"] + 0.3  # the two in front do count
    assert now["log_prefix_drift"] == pytest.approx(now["log_drift"], abs=FEW)
    assert before["log_held_drift"] == before["log_held_future"] == 0.0
    for kind in ("drift", "future"):
        assert now[f"log_prefix_{kind}"] + now[f"log_held_{kind}"] == pytest.approx(before[f"log_prefix_{kind}"], abs=FEW)
    # Frozen by hand before anything was judged: the window that it left counts.
    fresh = FeatureExtractor().extract(view(moving, frozen=("a", "b")))
    assert scalars(fresh, "c") == pytest.approx(now, abs=FEW)
    # Thawed: its window starts anew, and until it can be judged its last value counts as that of an active layer.
    thawed = moving | {"a": window(walk(3, seed=1))}
    again = extractor.extract(view(thawed))
    assert again.names == ("b", "c")
    assert scalars(again, "c")["log_prefix_drift"] == pytest.approx(before["log_prefix_drift"], abs=FEW)


def test_the_displacement_is_measured_from_the_first_snapshot_ever() -> None:
    """Two windows far apart: the drift to come is compared with the whole way, not with the window."""
    update = random(64, seed=5)
    weights = random(64) + torch.arange(60.0)[:, None] * 1e-3 * update
    extractor = FeatureExtractor()
    windows = [
        Window(steps=10 * torch.arange(i, i + 30), weights=weights[i : i + 30], lr_spent=torch.arange(i, i + 30.0).double())
        for i in (0, 30)
    ]
    shares = [scalars(extractor.extract(view({"a": w}, remaining=29.0)), "a")["log_future_share"] for w in windows]
    off = NORMS + rounding(1, 4 / 1e-3)  # weights of up to four are rounded, and differences of 1e-3 are taken
    assert shares[0] == pytest.approx(0.0, abs=off)  # a straight line, as much learning rate to come as there was
    assert shares[1] == pytest.approx(math.log(29 / 59), abs=off)


def test_a_layer_of_the_user_without_snapshots_counts_for_nothing() -> None:
    moving = {"a": window(walk(12, seed=1)), "b": window(walk(12, seed=2))}
    seen = view(moving)
    without = replace(seen, layers=(LayerInfo(name="frozen by the user", kind="block", numel=1), *seen.layers))
    assert torch.equal(FeatureExtractor().extract(without).scalars, FeatureExtractor().extract(seen).scalars)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_values_that_are_not_finite_name_the_layer_and_change_nothing(bad: float) -> None:
    good = {"a": window(walk(12, seed=1)), "b": window(walk(12, seed=2))}
    extractor = FeatureExtractor()
    extractor.extract(view(good))
    before = extractor.state_dict()
    weights = walk(13, seed=2)
    weights[5, 3] = bad
    with pytest.raises(ValueError, match="layer b: "):
        extractor.extract(view({"a": window(walk(13, seed=1)), "b": window(weights)}))
    assert extractor.state_dict() == before


def test_what_stands_still_or_has_no_learning_rate_gives_finite_features() -> None:
    still = random(64).expand(15, 64)
    windows = {
        "still": window(still),
        "zero": window(torch.zeros(15, 64)),
        "to zero": window(torch.linspace(1, 0, 15)[:, None] * random(64)),
        "no lr": window(walk(15), lr=0.0),
        "one weight": window(walk(15, 1)),
    }
    batch = FeatureExtractor().extract(view(windows))
    assert batch.names == tuple(windows)
    assert bool(batch.tokens.isfinite().all())
    assert bool(batch.scalars.isfinite().all())
    drift = {name: scalars(batch, name)["log_drift"] for name in windows}
    assert drift["still"] == drift["zero"] == pytest.approx(math.log(1e-8), abs=FEW)
    assert drift["to zero"] == pytest.approx(math.log(100), abs=FEW)
    assert scalars(batch, "no lr")["log_ratio"] == 0.0  # no learning rate was spent: no reference
    stopped = {"a": Window(steps=10 * torch.arange(1, 21), weights=walk(20), lr_spent=torch.arange(20.0).clamp_max(9).double())}
    assert math.isfinite(scalars(FeatureExtractor().extract(view(stopped, remaining=0.0)), "a")["log_ratio"])


def test_remaining_learning_rate_known_guessed_and_unknown() -> None:
    windows = {"a": window(walk(11))}  # 100 steps at 1e-3

    def remaining(**kwargs: Any) -> tuple[float, float]:
        row = scalars(FeatureExtractor().extract(view(windows, step=110, **kwargs)), "a")
        return row["log_lr_remaining"], row["lr_remaining_known"]

    assert remaining(remaining=0.2, total=None) == (pytest.approx(math.log(2), abs=FEW), 1.0)
    assert remaining(remaining=None, total=1110) == (pytest.approx(math.log(10), abs=FEW), 1.0)  # as if the learning rate stayed
    assert remaining(remaining=None, total=None) == (0.0, 0.0)
    assert remaining(remaining=0.0, total=1110) == (-6.0, 1.0)


def test_few_snapshots_are_not_judged_and_windows_of_many_lengths_are() -> None:
    windows = {f"n{n}": window(walk(n, seed=n)) for n in (30, MIN_SNAPSHOTS, MIN_SNAPSHOTS - 1, 1, 17)}
    batch = FeatureExtractor().extract(view(windows))
    assert batch.names == ("n30", f"n{MIN_SNAPSHOTS}", "n17")
    assert batch.tokens.shape == (3, 30, len(TOKEN_FEATURES))
    assert batch.mask.sum(1).tolist() == [30, MIN_SNAPSHOTS, 17]
    assert bool(batch.mask[:, -1].all())
    nothing = FeatureExtractor().extract(view({"a": window(walk(2))}))
    assert nothing.names == ()
    assert FreezePredictor().probabilities(nothing).shape == (0,)


def test_state_goes_through_json() -> None:
    extractor = FeatureExtractor()
    extractor.extract(view({"a": window(walk(12, seed=1)), "b": window(walk(12, seed=2))}))
    other = FeatureExtractor()
    other.load_state_dict(json.loads(json.dumps(extractor.state_dict())))
    later = view({"a": window(walk(30, seed=3), first=500), "b": window(walk(30, seed=4), first=500)}, frozen=("a",))
    torch.testing.assert_close(other.extract(later).scalars, extractor.extract(later).scalars, rtol=0, atol=0)
    fresh = FeatureExtractor().extract(later)
    assert not torch.equal(fresh.scalars, other.extract(later).scalars)  # the memory does matter


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_hundred_layers_in_one_batch() -> None:
    """Features with Gram matrices, and both judges: what grows with the layers are some operations on small tensors each."""
    counts: dict[int, int] = {}
    for n in (1, 50, 100):
        windows = {str(i): window(walk(30, 1024, seed=i)) for i in range(n)}
        grams = {str(i): centered_gram(random(32, 8, seed=i)) for i in range(n)}
        extractor, model = FeatureExtractor(), load_predictor()
        for stage in range(2):  # the second one has a stage to compare with
            seen = replace(view(windows, step=300 + stage), grams=grams)
            with Operations() as operations:
                batch = extractor.extract(seen)
                probabilities = model.probabilities(batch)
        counts[n] = operations.count
    assert probabilities.shape == (100,)
    assert batch.probe is not None
    assert bool(batch.probe.isfinite().all())
    a_layer = (counts[100] - counts[50]) / 50
    print(f"{counts} operations: {a_layer:.1f} a layer")
    assert a_layer <= 60, counts  # 50 when this was written; all 1,024 weights of 30 snapshots are worked on for all layers together
    assert counts[100] - 100 * a_layer <= counts[1], counts


# --- the second opinion -------------------------------------------------------------------------------------------------------


def with_grams(outputs: dict[str, Tensor] | None, **kwargs: Any) -> View:
    windows = {n: window(walk(12, seed=s)) for n, s in (("a", 1), ("b", 2))}
    return replace(view(windows, **kwargs), grams={n: centered_gram(x) for n, x in (outputs or {}).items()})


def test_probe_features_equal_their_definition() -> None:
    at = [{n: random(20, 6, seed=s + 10 * stage) + 3 * random(20, 6, seed=s) for n, s in (("a", 1), ("b", 2))} for stage in (1, 2, 3)]
    extractor = FeatureExtractor()
    first = extractor.extract(with_grams(at[0], step=100))
    assert first.probe is not None
    assert bool(first.probe.isnan().all())  # nothing to compare with yet
    extractor.extract(with_grams(at[1], step=200))
    third = extractor.extract(with_grams(at[2], step=300, remaining=0.4)).probe
    assert third is not None
    change = {n: [math.log(1 - linear_cka(at[i][n], at[i + 1][n])) for i in (0, 1)] for n in ("a", "b")}
    lr = math.log(0.4 / 0.1)  # a hundred steps at 1e-3 since the last stage
    for row, name, largest in ((0, "a", change["a"][1]), (1, "b", max(change["a"][1], change["b"][1]))):
        now, before = change[name][1], change[name][0]
        assert third[row].tolist() == pytest.approx([now, largest, now - before, lr], abs=FEW)
    unknown = extractor.extract(with_grams(at[1], step=400, remaining=None, total=None)).probe
    assert unknown is not None
    assert unknown[0, 3] == 0.0


def test_without_a_probe_or_after_a_resume_the_weights_judge() -> None:
    model = tiny_model()
    outputs = {n: random(20, 6, seed=s) for n, s in (("a", 1), ("b", 2))}
    moved = {n: x + 0.1 * random(20, 6, seed=9) for n, x in outputs.items()}
    plain = FeatureExtractor().extract(with_grams(None))
    assert plain.probe is None
    extractor = FeatureExtractor()
    extractor.extract(with_grams(outputs))
    resumed = FeatureExtractor()
    resumed.load_state_dict(json.loads(json.dumps(extractor.state_dict())))
    again, fresh = extractor.extract(with_grams(moved)), resumed.extract(with_grams(moved))
    assert fresh.probe is not None
    assert again.probe is not None
    assert bool(fresh.probe.isnan().all())  # matrices aren't in the state
    assert bool(again.probe.isfinite().all())
    torch.testing.assert_close(model.probabilities(fresh), model.probabilities(plain), atol=NETWORK, rtol=0)
    assert not torch.equal(model.probabilities(again), model.probabilities(plain))
    later = resumed.extract(with_grams(outputs)).probe
    assert later is not None
    assert bool(later.isfinite().all())


def test_an_output_that_is_not_finite_leaves_the_verdict_to_the_weights() -> None:
    outputs = {n: random(20, 6, seed=s) for n, s in (("a", 1), ("b", 2))}
    broken = {**outputs, "b": torch.full((20, 6), math.nan)}
    extractor = FeatureExtractor()
    extractor.extract(with_grams(outputs))
    for now in (broken, outputs):  # and at the stage after it there is nothing to compare with
        probe = extractor.extract(with_grams(now)).probe
        assert probe is not None
        assert probe.isnan().any(1).tolist() == [False, True]


def test_a_gram_vector_is_the_similarity_and_rows_of_sequences_are_tokens() -> None:
    x, y = random(24, 5), random(24, 9, seed=3)
    assert float(gram_vector(x).double() @ gram_vector(y).double()) == pytest.approx(linear_cka(x, y), abs=rounding(2, 1.0))
    assert float(gram_vector(torch.ones(8, 3)).abs().max()) == 0.0
    sequence = random(4, 6, 3)
    assert torch.equal(probe_rows(sequence), torch.stack([sequence[:, 2], sequence[:, 5]], 1).flatten(0, 1))
    assert probe_rows(random(4, 3, 2, 2)).shape == (4, 12)
    with pytest.raises(ValueError, match="floating"):
        probe_rows(torch.ones(4, 3, dtype=torch.int64))


# --- the network and its file -------------------------------------------------------------------------------------------------


def tiny_model(seed: int = 0) -> FreezePredictor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FreezePredictor(threshold=0.75).eval()


def test_the_network_is_small_reads_the_window_and_ignores_padding() -> None:
    model = tiny_model()
    assert parameter_count(model) <= 10_000
    tokens, mask, row = random(2, 12, len(TOKEN_FEATURES)), torch.ones(2, 12, dtype=torch.bool), random(2, len(SCALAR_FEATURES))
    logits = model(tokens, mask, row)
    padded = torch.cat([1e3 * random(2, 5, len(TOKEN_FEATURES), seed=3), tokens], 1)
    hidden = torch.cat([torch.zeros(2, 5, dtype=torch.bool), mask], 1)
    torch.testing.assert_close(model(padded, hidden, row), logits, atol=NETWORK, rtol=0)
    probe = random(2, len(PROBE_FEATURES))
    assert bool(((model(tokens, mask, row, probe) - logits).abs() > 10 * NETWORK).all())
    probe[0, 1] = math.nan  # nothing known of the first layer's output
    torch.testing.assert_close(model(tokens, mask, row, probe)[0], logits[0], atol=NETWORK, rtol=0)
    other = tokens.clone()
    other[:, 0] += 1  # the oldest snapshot: only attention carries it
    assert bool(((model(other, mask, row) - logits).abs() > 10 * NETWORK).all())
    order = torch.tensor([3, 1, 0, 2, *range(4, 12)])
    # a set of snapshots: their time is a feature
    torch.testing.assert_close(model(tokens[:, order], mask, row), logits, atol=NETWORK, rtol=0)


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    model = tiny_model()
    model.weights.scalar_mean.fill_(0.25)
    save_predictor(model, tmp_path / "p.safetensors", notes={"made": "here"})
    loaded = load_predictor(tmp_path / "p.safetensors")
    assert loaded.threshold == 0.75
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert predictor_notes(tmp_path / "p.safetensors") == {"made": "here"}
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def rewrite(path: Path, header: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None) -> None:
    with safe_open(path, framework="pt") as file:
        old = json.loads(file.metadata()["smartfrz"])
    save_file({**load_file(path), **(tensors or {})}, path, metadata={"smartfrz": json.dumps(old | (header or {}))})


BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda p: p.unlink(), "no such file"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "no such file"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "complete safetensors file"),
    "truncated header": (lambda p: p.write_bytes(p.read_bytes()[:20]), "complete safetensors file"),
    "empty": (lambda p: p.write_bytes(b""), "complete safetensors file"),
    "a pickle": (lambda p: torch.save({"w": torch.ones(3)}, p), "complete safetensors file"),
    "another model": (lambda p: save_file({"w": torch.ones(3)}, p), "format is None"),
    "another version": (lambda p: rewrite(p, {"format_version": 1}), "version 1"),
    "other features": (lambda p: rewrite(p, {"scalar_features": ["size"]}), "scalar_features"),
    "another shape": (
        lambda p: rewrite(p, tensors={"weights.query.weight": torch.ones(8, 16)}),
        "weights.query.weight has the shape (8, 16)",
    ),
    "a tensor more": (lambda p: rewrite(p, tensors={"extra": torch.ones(1)}), "extra"),
    "NaN weights": (lambda p: rewrite(p, tensors={"probe.query.weight": torch.full((16, 16), math.nan)}), "finite"),
    "half precision": (lambda p: rewrite(p, tensors={"probe.query.weight": torch.ones(16, 16).half()}), "fp32"),
    "threshold 1": (lambda p: rewrite(p, {"threshold": 1.0}), "threshold"),
    "no threshold": (lambda p: rewrite(p, {"threshold": None}), "threshold"),
    "heads that don't divide": (lambda p: rewrite(p, {"config": {"dim": 16, "heads": 3, "hidden": 24, "window": 30}}), "multiple of heads"),
    "an unknown setting": (lambda p: rewrite(p, {"config": {"depth": 3}}), "depth"),
    "a header that is no object": (lambda p: save_file({"w": torch.ones(1)}, p, metadata={"smartfrz": "[1]"}), "list"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_predictor_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save_predictor(tiny_model(), path)
    spoil, words = BAD_FILES[name]
    spoil(path)
    with pytest.raises(ValueError) as error:
        load_predictor(path)
    for part in ("smartfrz.attention.predictor", str(path), "allowed: a safetensors file", words):
        assert part in str(error.value), str(error.value)


def test_one_threshold_means_the_same_for_both_judges() -> None:
    model = tiny_model()
    logits = model.probe.calibrated(torch.tensor(math.log(0.6 / 0.4)))
    model.set_thresholds(0.9, 0.6)
    assert model.threshold == 0.9
    assert float(logits.sigmoid()) == pytest.approx(0.6, abs=FEW)
    assert float(model.probe.calibrated(torch.tensor(math.log(0.6 / 0.4))).sigmoid()) == pytest.approx(0.9, abs=FEW)
