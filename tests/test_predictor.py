"""The predictor: similarity, features, the network and its file, labels, and the whole way from training runs to a file with a card."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from smartfrz_ds.policies.base import LayerInfo, View, Window
from smartfrz_ds.predictor import (
    DEFAULT_PREDICTOR,
    MIN_SNAPSHOTS,
    FeatureExtractor,
    FreezePredictor,
    linear_cka,
    load_predictor,
    save_predictor,
)
from smartfrz_ds.predictor.collect import Run, collect, record
from smartfrz_ds.predictor.dataset import make_examples
from smartfrz_ds.predictor.evaluate import PRECISION_TARGET, auc, auc_in_time, choose_threshold
from smartfrz_ds.predictor.features import SCALAR_FEATURES, TOKEN_FEATURES, FeatureBatch
from smartfrz_ds.predictor.labels import CONVERGED, converged_at, prefix_settled, settled
from smartfrz_ds.predictor.model import parameter_count, predictor_notes
from smartfrz_ds.predictor.train import score, train_predictor

SMALL_RUN = Run(net="mlp", data="digits", optimizer="adamw-cosine", regime="scratch", seed=7, steps=60)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def walk(n: int, size: int = 64, *, speed: float = 1e-2, seed: int = 0) -> Tensor:
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
    assert linear_cka(x, y) == pytest.approx(slow_cka(x, y), abs=1e-10)
    assert linear_cka(x, y) < 0.999


def test_cka_ignores_rotation_scale_and_offset_and_keeps_its_digits_near_one() -> None:
    x = random(50, 8)
    rotation, _ = torch.linalg.qr(random(8, 8, seed=1))
    assert linear_cka(x, 7.0 * x @ rotation - 2.0) == pytest.approx(1.0, abs=1e-6)
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

    def expected(w: Tensor) -> tuple[float, float]:
        drift = norm(w[11] - w[0]) / norm(w[11])
        newest = norm(w[11] - w[6]) / float(lr_spent[11] - lr_spent[6])
        oldest = norm(w[5] - w[0]) / float(lr_spent[5] - lr_spent[0])
        return math.log(drift), math.log(newest / oldest)

    (drift_a, ratio_a), (drift_b, ratio_b) = expected(first), expected(second)
    remaining = math.log(0.25 / float(lr_spent[11] - lr_spent[0]))
    want_a = dict(zip(SCALAR_FEATURES, (drift_a, drift_a, ratio_a, ratio_a, remaining, 1.0), strict=True))
    prefix = 0.5 * math.log(math.exp(2 * drift_a) + math.exp(2 * drift_b))
    want_b = dict(zip(SCALAR_FEATURES, (drift_b, prefix, ratio_b, max(ratio_a, ratio_b), remaining, 1.0), strict=True))
    assert scalars(batch, "a") == pytest.approx(want_a, abs=1e-5)
    assert scalars(batch, "b") == pytest.approx(want_b, abs=1e-5)


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
        assert tokens[i].tolist() == pytest.approx(want, abs=1e-4), i


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
        features(lambda w: torch.cat([w, w], 1)),  # a larger sample of the same
        features(lambda w: w, lr=0.5),
        features(lambda w: w, interval=50),
    ):
        torch.testing.assert_close(other.tokens, plain.tokens, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(other.scalars, plain.scalars, atol=1e-4, rtol=1e-4)
    faster = features(lambda w: w[:1] + 3 * (w - w[:1]))
    assert scalars(faster, "a")["log_drift"] - scalars(plain, "a")["log_drift"] == pytest.approx(math.log(3), abs=0.1)


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
    assert [ratios[end] for end in (10, 20, 30)] == pytest.approx([0.0, 0.0, 0.0], abs=0.02)
    assert ratios[60] == pytest.approx(math.log(0.1), abs=0.02)


def test_frozen_layers_hold_their_last_drift() -> None:
    """A layer that is frozen must not make those behind it look still: the cascade that froze whole networks."""
    moving = {n: window(walk(20, speed=5e-2, seed=s)) for n, s in (("a", 1), ("b", 9), ("c", 20))}
    extractor = FeatureExtractor()
    before = extractor.extract(view(moving))
    after = extractor.extract(view(moving, frozen=("a", "b")))
    assert after.names == ("c",)
    assert scalars(after, "c") == pytest.approx(scalars(before, "c"), abs=1e-6)
    assert scalars(before, "c")["log_prefix_drift"] > scalars(before, "c")["log_drift"] + 0.3  # the two in front do count
    # Frozen by hand before anything was judged: the window that it left counts.
    fresh = FeatureExtractor().extract(view(moving, frozen=("a", "b")))
    assert scalars(fresh, "c") == pytest.approx(scalars(before, "c"), abs=1e-6)
    # Thawed: its window starts anew, and until it can be judged the held value counts.
    thawed = moving | {"a": window(walk(3, seed=1))}
    again = extractor.extract(view(thawed))
    assert again.names == ("b", "c")
    assert scalars(again, "c")["log_prefix_drift"] == pytest.approx(scalars(before, "c")["log_prefix_drift"], abs=1e-6)


def test_a_layer_of_the_user_without_snapshots_counts_for_nothing() -> None:
    moving = {"a": window(walk(12, seed=1)), "b": window(walk(12, seed=2))}
    seen = view(moving)
    without = replace(seen, layers=(LayerInfo(name="frozen by the user", kind="block", numel=1), *seen.layers))
    torch.testing.assert_close(FeatureExtractor().extract(without).scalars, FeatureExtractor().extract(seen).scalars)


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
    assert drift["still"] == drift["zero"] == pytest.approx(math.log(1e-8))
    assert drift["to zero"] == pytest.approx(math.log(100))
    assert scalars(batch, "no lr")["log_ratio"] == 0.0  # no learning rate was spent: no reference
    stopped = {"a": Window(steps=10 * torch.arange(1, 21), weights=walk(20), lr_spent=torch.arange(20.0).clamp_max(9).double())}
    assert math.isfinite(scalars(FeatureExtractor().extract(view(stopped, remaining=0.0)), "a")["log_ratio"])


def test_remaining_learning_rate_known_guessed_and_unknown() -> None:
    windows = {"a": window(walk(11))}  # 100 steps at 1e-3

    def remaining(**kwargs: Any) -> tuple[float, float]:
        row = scalars(FeatureExtractor().extract(view(windows, step=110, **kwargs)), "a")
        return row["log_lr_remaining"], row["lr_remaining_known"]

    assert remaining(remaining=0.2, total=None) == (pytest.approx(math.log(2)), 1.0)
    assert remaining(remaining=None, total=1110) == (pytest.approx(math.log(10)), 1.0)  # as if the learning rate stayed
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


def test_a_hundred_layers_in_time() -> None:
    windows = {str(i): window(walk(30, 1024, seed=i)) for i in range(100)}
    extractor, threads = FeatureExtractor(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = []
        for _ in range(8):
            began = time.thread_time()  # other processes don't count
            extractor.extract(view(windows))
            seconds.append(time.thread_time() - began)
    finally:
        torch.set_num_threads(threads)
    assert min(seconds) < 0.05, seconds


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
    torch.testing.assert_close(model(padded, hidden, row), logits)
    other = tokens.clone()
    other[:, 0] += 1  # the oldest snapshot: only attention carries it
    assert bool(((model(other, mask, row) - logits).abs() > 1e-5).all())
    order = torch.tensor([3, 1, 0, 2, *range(4, 12)])
    torch.testing.assert_close(model(tokens[:, order], mask, row), logits)  # a set of snapshots: their time is a feature


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    model = tiny_model()
    model.scalar_mean.fill_(0.25)
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
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "whole safetensors file"),
    "truncated header": (lambda p: p.write_bytes(p.read_bytes()[:20]), "whole safetensors file"),
    "empty": (lambda p: p.write_bytes(b""), "whole safetensors file"),
    "a pickle": (lambda p: torch.save({"w": torch.ones(3)}, p), "whole safetensors file"),
    "another model": (lambda p: save_file({"w": torch.ones(3)}, p), "format is None"),
    "a later version": (lambda p: rewrite(p, {"format_version": 2}), "version 2"),
    "other features": (lambda p: rewrite(p, {"scalar_features": ["size"]}), "scalar_features"),
    "another shape": (lambda p: rewrite(p, tensors={"query.weight": torch.ones(8, 16)}), "query.weight has the shape (8, 16)"),
    "a tensor more": (lambda p: rewrite(p, tensors={"extra": torch.ones(1)}), "extra"),
    "NaN weights": (lambda p: rewrite(p, tensors={"query.weight": torch.full((16, 16), math.nan)}), "finite"),
    "half precision": (lambda p: rewrite(p, tensors={"query.weight": torch.ones(16, 16).half()}), "fp32"),
    "threshold 1": (lambda p: rewrite(p, {"threshold": 1.0}), "threshold"),
    "no threshold": (lambda p: rewrite(p, {"threshold": None}), "threshold"),
    "heads that don't divide": (lambda p: rewrite(p, {"config": {"dim": 16, "heads": 3, "hidden": 24, "window": 30}}), "divisible"),
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
    for part in ("smartfrz.attention.predictor", str(path), "allowed is a safetensors file", words):
        assert part in str(error.value), str(error.value)


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


def test_a_label_holds_from_an_evaluation_to_the_next() -> None:
    cka = torch.tensor([[0.5], [CONVERGED], [0.99]], dtype=torch.float64)
    steps = torch.tensor([0, 19, 20, 39, 40])
    assert converged_at(cka, torch.tensor([0, 20, 40]), ("block",), steps).flatten().tolist() == [False, False, True, True, True]


# --- collecting ---------------------------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("steps", "weights", "lr_spent", "cka", "cka_steps"))


def test_a_recording_is_what_it_says_repeats_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = record(SMALL_RUN)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert same(one, record(SMALL_RUN))
    assert not torch.equal(one.weights, record(replace(SMALL_RUN, seed=8)).weights)
    assert one.steps.tolist() == list(range(0, 61, 2))
    assert one.weights.shape == (6, 31, 256)
    assert one.cka.shape == (4, 6)
    assert one.cka[-1].tolist() == pytest.approx([1.0] * 6)
    assert float(one.cka[0].max()) < 0.99  # it did learn something
    assert float(one.lr_spent[-1]) == pytest.approx(one.lr_total)


@pytest.mark.parametrize(("net", "data"), [("cnn", "digits"), ("vit", "digits"), ("gpt", "text")])
def test_every_network_trains(net: Any, data: Any) -> None:
    short = record(replace(SMALL_RUN, net=net, data=data, optimizer="adamw-linear", steps=20))
    assert len(short.kinds) == {"cnn": 8, "vit": 7, "gpt": 7}[net]
    assert (short.kinds[0] == "embedding") == (net != "cnn")
    assert bool(((short.weights[:, -1] - short.weights[:, 0]).norm(dim=1) > 0).all())


def test_recordings_are_taken_from_the_cache_and_damaged_ones_made_anew(tmp_path: Path) -> None:
    one = collect(SMALL_RUN, tmp_path)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    assert same(one, collect(SMALL_RUN, tmp_path))
    assert file.stat().st_mtime_ns == written
    file.write_bytes(file.read_bytes()[:1000])
    assert same(one, collect(SMALL_RUN, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_examples_are_what_a_real_run_would_see() -> None:
    recording = record(SMALL_RUN)
    examples = make_examples([recording], 30)
    # 31 snapshots at spacing 2, 16 at 4, 8 and 4 at the others: judged from 10 on, every 5, not at the last step.
    assert len(examples) == 6 * (5 + 2)
    assert examples.mask.sum(1).unique().tolist() == [10, 15, 20, 25, 30]
    last = examples.time.argmax()
    assert float(examples.time[last]) == pytest.approx(58 / 60)
    expected = prefix_settled(recording.cka, recording.kinds)[2] >= CONVERGED  # evaluated at step 40, before 58
    assert examples.label[(examples.time == examples.time[last])].tolist() == expected.tolist()


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
    label = torch.rand(2000, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1, 2000)
    scores, weight = torch.linspace(0.3, 0.999, 2000), torch.rand(2000, generator=torch.Generator().manual_seed(1)) + 0.5
    threshold, precision = choose_threshold(scores, label, weight)

    def precise(t: float) -> float:
        called = scores.double() >= t
        return float((weight * label)[called].double().sum() / weight[called].double().sum())

    assert precision == pytest.approx(precise(threshold))
    assert precise(threshold) >= PRECISION_TARGET
    assert all(precise(float(s)) < PRECISION_TARGET for s in scores if 0.5 <= s < threshold)
    assert choose_threshold(scores, torch.zeros(2000, dtype=torch.bool), weight) == (0.99, None)
    assert choose_threshold(torch.full((5,), math.nan), label[:5], weight[:5]) == (0.99, None)


# --- the whole way ------------------------------------------------------------------------------------------------------------


def test_training_makes_the_same_file_twice_and_a_card(tmp_path: Path) -> None:
    out, again = tmp_path / "a" / "mine.safetensors", tmp_path / "again.safetensors"
    figures = train_predictor(out=out, quick=True, cache=tmp_path / "cache")
    torch.manual_seed(99)
    train_predictor(out=again, quick=True, cache=tmp_path / "cache")
    assert out.read_bytes() == again.read_bytes()
    assert len(list((tmp_path / "cache").iterdir())) == figures["runs"] == 4
    json.dumps(figures)
    model = load_predictor(out)
    assert model.threshold == figures["threshold"]
    assert figures["held_out"]["network kind"].keys() == {"mlp", "vit"}
    card = out.with_suffix(".md").read_text()
    assert "smartfrz train-predictor --out mine.safetensors --seed 0 --quick" in card
    assert f"{figures['held_out']['network kind']['vit']['auc']:.3f}" in card
    assert "is of no use" in card


@pytest.mark.parametrize(
    ("arguments", "words"), [({"out": Path("p.pt")}, "out: got 'p.pt'"), ({"out": Path("p.safetensors"), "seed": -1}, "seed: got -1")]
)
def test_training_refuses_arguments_before_it_starts(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train_predictor(**arguments)


def test_the_shipped_predictor_and_its_card_belong_together() -> None:
    assert DEFAULT_PREDICTOR.stat().st_size < 100_000
    notes, model = predictor_notes(DEFAULT_PREDICTOR), load_predictor()
    assert not notes["quick"]
    assert (notes["threshold"], notes["parameters"]) == (model.threshold, parameter_count(model))
    card = DEFAULT_PREDICTOR.with_suffix(".md").read_text()
    assert f"**Threshold**: {model.threshold:.4f}" in card
    for axis in ("network kind", "data set", "seed"):
        for value, row in notes["held_out"][axis].items():
            assert f"| {axis} {value} | {row['auc']:.3f} | {row['auc_in_time']:.3f} | " in card
    for smaller in ("time alone", "own drift alone"):
        rows = notes["baselines"]["network kind"][smaller].values()
        ours = [row["auc"] for row in notes["held_out"]["network kind"].values()]
        assert sum(ours) / len(ours) > sum(row["auc"] for row in rows) / len(rows) + 0.03, smaller


def test_the_shipped_predictor_on_a_run_it_never_saw() -> None:
    """Another seed, width and learning rate than all of its training runs: it ranks the windows, and what it calls converged is so."""
    recording = record(replace(SMALL_RUN, seed=1234, steps=400))
    examples, model = make_examples([recording], 30), load_predictor()
    scores = score(model, examples)
    called = scores >= model.threshold
    ranked = auc(scores, examples.label)
    assert ranked is not None
    assert ranked > 0.85
    assert int(called.sum()) > 0
    assert float(examples.label[called].float().mean()) > 0.8


def test_the_predictor_runs_without_deepspeed() -> None:
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"  # any import of it now fails
        "import smartfrz_ds.predictor, smartfrz_ds.predictor.train, smartfrz_ds.policies\n"
        "smartfrz_ds.predictor.load_predictor()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
