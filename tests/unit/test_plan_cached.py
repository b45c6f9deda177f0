"""The planner's prediction of the prefix cache, and its part of `smartfrz plan`."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from test_planner import layer
from typer.testing import CliRunner

from smartfrz_ds.cli.main import app
from smartfrz_ds.planner import CacheUse, Cluster, Link, Phase, cached_phase, freeze_plan

COSTS = [layer(0.1, 0.1, 0.1, weights=10**8, output_bytes=4000)] * 6  # 1,000 bytes a sample
USE = CacheUse(epochs=4, rows=100, batch=4, space=1e6, read=1e6, write=4e5, keys=0.001)


def test_first_epoch_stores_and_later_ones_skip() -> None:
    """Four of six layers frozen: 0.6 s of forward and 0.3 s of backward; 0.4 s of the forward are skipped."""
    made = cached_phase(COSTS, 4, 1.0, USE)
    assert made.reason == "" and made.row_bytes == 1000 and made.need == 100_000 and made.hit_rate == 1
    assert made.first == pytest.approx(0.9 + 0.001 + 0.01)
    assert made.hit == pytest.approx(0.5 + 0.001 + 0.004)
    assert made.seconds == pytest.approx((made.first + 3 * made.hit) / 4)
    assert cached_phase(COSTS, 4, 1.0, USE, micro_batches=3).hit == pytest.approx(3 * made.hit)
    # half of the run: two epochs, one of them fills
    assert cached_phase(COSTS, 4, 0.5, USE).seconds == pytest.approx((made.first + made.hit) / 2)


def test_why_it_stays_off() -> None:
    plain = 0.9
    for use, frozen, share, words in (
        (USE, 4, 0.25, "no sample comes a second time"),
        (replace(USE, space=5e4), 4, 1.0, "only 50% of the rows have room"),
        (replace(USE, read=1e4), 4, 1.0, "a step would be faster by a factor of 1.00 only"),
    ):
        made = cached_phase(COSTS, frozen, share, use)
        assert words in made.reason and made.seconds == pytest.approx(plain), made
    assert cached_phase(COSTS, 0, 1.0, USE).reason == "nothing is frozen"
    assert "output_bytes of layer 3" in cached_phase([replace(c, output_bytes=0) for c in COSTS], 4, 1.0, USE).reason
    assert cached_phase(COSTS, 4, 1.0, replace(USE, space=9.9e4)).hit_rate == pytest.approx(0.99**4)


def test_several_hosts_share_the_samples() -> None:
    assert cached_phase(COSTS, 4, 1.0, replace(USE, hosts=3)).need == 34_000


def test_zero_3_gathers_nothing_of_skipped_layers() -> None:
    net = Link(bandwidth=1e9)
    times = {}
    for zero in (2, 3):
        cluster = Cluster(replicas=2, zero=zero, between_replicas=net)
        made = cached_phase(COSTS, 4, 1.0, USE, cluster=cluster)
        plain = cached_phase(COSTS, 4, 0.1, USE, cluster=cluster).seconds
        times[zero] = plain - made.hit
    assert times[2] == pytest.approx(0.4 - 0.005)
    assert times[3] == pytest.approx(0.4 - 0.005 + 4e8 * 2 / 2 / 1e9)  # half of the frozen weights, of 2 bytes


def test_plan_has_hours_with_the_cache() -> None:
    phases = [Phase(share=0.5, frozen=0), Phase(share=0.5, frozen=4)]
    plan = freeze_plan(COSTS, phases, steps=3600, cache=USE)
    first, second = plan.phases
    assert first.cached is not None and second.cached is not None and first.cached.seconds == plan.unfrozen.seconds
    assert plan.hours["cached"] == pytest.approx(0.5 * (plan.unfrozen.seconds + second.cached.seconds))
    assert "cached" not in freeze_plan(COSTS, phases, steps=3600).hours
    with pytest.raises(ValueError, match="cache: got one with 2 stages; allowed in a pipeline: None"):
        freeze_plan(COSTS, phases, stages=2, cache=USE)
    with pytest.raises(ValueError, match="rows: got 0; allowed: a finite number > 0"):
        replace(USE, rows=0)


def run(*arguments: str) -> str:
    shape = ["--layers", "24", "--hidden", "2048", "--sequence", "1024", "--micro-batch", "4", "--dp", "8"]
    done = CliRunner().invoke(app, ["plan", *shape, *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_command() -> None:
    out = run("--frozen", "0.25,0.75", "--rows", "100000", "--steps", "10000", "--cache-space", "2000")
    assert "Cached, 6 frozen: off, a step would be faster by a factor of 1.01 only; all samples would take 419.43 GB a host" in out
    assert "where all samples are stored; samples take 419.43 GB a host (4.19 MB a sample)." in out
    assert "cached: " in run("--schedule", "0.5:0,0.5:0.5", "--rows", "1000", "--steps", "1000") and "cached" not in run("--frozen", "0.5")
    phase = json.loads(run("--frozen", "0.75", "--rows", "100000", "--steps", "10000", "--cache-space", "100", "--json"))["phases"][0]
    assert phase["cached"]["reason"] == "only 24% of the rows have room"
    done = CliRunner().invoke(app, ["plan", "--layers", "8", "--pp", "2", "--rows", "10"])
    assert done.exit_code == 2 and "--rows: got 10 with --pp 2; allowed without a pipeline" in done.output
