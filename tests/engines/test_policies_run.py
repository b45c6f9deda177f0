"""Policies on real 2-rank engines: what they see is what one process computes, and what they freeze is what their rule says.

Bounds. Gradients are recomputed from the engine's own weights, rank by rank: they agree to the rounding of the sums over steps,
micro-batches and ranks, in fp32 and bf16 to that of fp32, in fp16 (under a loss scale) to that of fp16. Matrices of the probe and weights
after steps are compared bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import run_worker
from reference import oracle
from reference.bounds import rounding
from reference.oracle import Cell, Net, layer_of
from safetensors.torch import load_file
from torch import Tensor, nn

from smartfrz_ds.model.layers import find_layers
from smartfrz_ds.policies import FreezeOutPolicy, LayerInfo, RandomPolicy, View
from smartfrz_ds.predictor.similarity import centered_gram

STEPS = 24
BF16_OPTIMIZER = {"data_types": {"grad_accum_dtype": "fp32"}}
OFFLOAD = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
    "zero_force_ds_cpu_optimizer": False,
}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 1000, "hysteresis": 1}}

GRADIENTS: dict[str, dict[str, Any]] = {
    **{f"gradients-z{stage}": {"stage": stage, "accumulation": 2} for stage in (0, 1, 2, 3)},
    "gradients-z0-bf16": {"stage": 0, "dtype": "bf16", "accumulation": 2},
    "gradients-z1-bf16opt": {"stage": 1, "dtype": "bf16", "accumulation": 2, **BF16_OPTIMIZER},
    "gradients-z3-bf16": {"stage": 3, "dtype": "bf16", "gradient_clipping": 0.01},
    **{f"gradients-z{stage}-fp16": {"stage": stage, "dtype": "fp16", **FP16} for stage in (0, 2, 3)},
    "gradients-z2-offload": {"stage": 2, "accumulation": 2, **OFFLOAD},
}
PROBES: dict[str, dict[str, Any]] = {
    **{f"probe-z{stage}": {"stage": stage} for stage in (0, 2, 3)},
    "probe-z0-bf16": {"stage": 0, "dtype": "bf16"},
    "probe-z3-bf16": {"stage": 3, "dtype": "bf16"},
}
FREEZEOUTS: dict[str, dict[str, Any]] = {
    **{f"freezeout-z{stage}": {"stage": stage} for stage in (0, 1, 2, 3)},
    **{f"freezeout-resumed-z{stage}": {"stage": stage, "resume": 7} for stage in (2, 3)},
    **{f"freezeout-z{stage}-bf16": {"stage": stage, "dtype": "bf16"} for stage in (1, 2, 3)},
}
POLICIES: dict[str, dict[str, Any]] = {
    "late": {"policy": "late"},
    "last": {"policy": "late", "late": {"start_step": STEPS}},
    "random": {"policy": "random", "random": {"seed": 5}},
    "random-any": {"policy": "random", "order": "any", "random": {"seed": 5, "ratio": 0.5}},
    "autofreeze": {"policy": "autofreeze", "freeze_interval": 3, "max_frozen_fraction": 1.0},
    "pipetransformer": {"policy": "pipetransformer", "freeze_interval": 2, "pipetransformer": {"interval": 4}, "max_frozen_fraction": 1.0},
    "weight_drift": {"policy": "weight_drift", "weight_drift": {"threshold": 0.05, "share": 0.25}},
    "egeria": {"policy": "egeria", "probe": 6, "egeria": {"window": 2, "tolerance": 0.6, "refresh": 2}},
}
CASES = [
    *({"function": "gradients", "name": name, **case} for name, case in GRADIENTS.items()),
    *({"function": "probe", "name": name, **case} for name, case in PROBES.items()),
    *({"function": "freezeout", "name": name, **case} for name, case in FREEZEOUTS.items()),
    *({"function": "policy", "name": name, "smartfrz": case, "steps": STEPS} for name, case in POLICIES.items()),
    {"function": "resumed", "name": "resumed", "stage": 2},
    {"function": "thawed", "name": "thawed", "stage": 2},
    {"function": "refused", "name": "refused"},
]
pytestmark = pytest.mark.distributed(2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_worker("policies", CASES, tmp_path_factory.mktemp("policies"), timeout=500)


@pytest.fixture(scope="module")
def facts(folder: Path) -> Callable[..., dict[str, Any]]:
    return lambda name, rank=0: json.loads((folder / f"{name}.{rank}.json").read_text())


@pytest.fixture(scope="module")
def tensors(folder: Path) -> Callable[[str], dict[str, Tensor]]:
    return lambda name: load_file(folder / f"{name}.safetensors")


# --- what the policies see ------------------------------------------------------------------------------------------------------


def local_gradients(weights: Tensor, step: int, dtype: str, accumulation: int) -> dict[str, Tensor]:
    """The mean over two ranks of one step's gradients at these weights (numel,), by the parameter's name."""
    model: nn.Module = Net()
    if dtype != "fp32":
        model = model.to({"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
    params = dict(model.named_parameters())
    sizes = [p.numel() for p in params.values()]
    for p, part in zip(params.values(), weights.split(sizes), strict=True):
        p.data.copy_(part.view_as(p))
    total = {name: torch.zeros(p.shape) for name, p in params.items()}
    scale = 1024.0 if dtype == "fp16" else 1.0  # else small gradients vanish
    for micro in range(accumulation):
        for rank in range(2):
            x, y = oracle.data(step, micro, rank)
            loss = (
                nn.functional.cross_entropy(model(x.half()).float(), y) if dtype == "fp16" else oracle.loss_of(model, x, y, dtype)
            ) / accumulation
            for name, g in zip(params, torch.autograd.grad(scale * loss, list(params.values())), strict=True):
                total[name] += g.float() / scale / 2
    return total


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_one_process(facts: Any, tensors: Any, name: str) -> None:
    """Every stage of ZeRO, with accumulation, clipping, offload and skipped steps: summed over the interval's steps, mean over ranks."""
    case, seen = GRADIENTS[name], tensors(name)
    torch.set_num_threads(oracle.THREADS)
    assert facts(name)["stages"] == [4, 8]
    if "fp16" in name and case["stage"] > 0:  # FP16_UnfusedOptimizer does not take the initial scale
        assert facts(name)["attempts"] > 8, "no step was skipped"
    dtype = case.get("dtype", "fp32")
    start = torch.cat([p.detach().view(-1) for p in Net().parameters()])
    before = [start.bfloat16().float() if dtype == "bf16" else start.half().float() if dtype == "fp16" else start, *seen["all weights"]]
    for stage in (4, 8):
        total: dict[str, Tensor] = {}
        size: dict[str, float] = {}
        for step in range(stage - 4, stage):
            for parameter, gradient in local_gradients(before[step], step, dtype, case.get("accumulation", 1)).items():
                total[parameter] = total.get(parameter, torch.zeros(())) + gradient
                size[layer_of(parameter)] = max(size.get(layer_of(parameter), 0.0), float(gradient.abs().max()))
        layers = {key.split("/")[2] for key in seen if key.startswith(f"{stage}/gradient/")}
        assert layers == {"embeddings", *(f"blocks.{i}" for i in range(5))}
        for layer in layers:
            expected = torch.zeros(64)
            for key in seen:
                if key.startswith(f"elements/{layer}/"):
                    elements, slots = seen[key]
                    expected[slots] = total[key.split("/")[2]].view(-1)[elements]
            got = seen[f"{stage}/gradient/{layer}"]
            assert expected.count_nonzero() > 60 and got.dtype == torch.float32
            terms, kept = 4 * 2 * case.get("accumulation", 1), torch.float16 if dtype == "fp16" else torch.float32
            bound = rounding(terms, 4 * size[layer], kept)  # four steps, none above `size`
            assert bound < 0.2 * size[layer], "a step that is missing would be hidden"
            assert (got - expected).abs().max() <= bound


def grams_of(weights: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    from workers import worker_policies

    model: nn.Module = Net()
    if dtype == "bf16":
        model = model.bfloat16()
    model.load_state_dict(dict(weights))
    found = {}
    for layer in find_layers(model):
        layer.modules[-1].register_forward_hook(lambda _m, _a, output, name=layer.name: found.update({name: centered_gram(output)}))
    with torch.no_grad():
        model.eval()(worker_policies.probe_batch(dtype)[: worker_policies.PROBE])
    return found


@pytest.mark.parametrize("name", PROBES)
def test_the_probes_matrices_are_those_of_one_process(tensors: Any, name: str) -> None:
    torch.set_num_threads(oracle.THREADS)
    seen = tensors(name)
    steps = sorted({int(key.split("/")[0]) for key in seen if "/parameter/" in key})
    assert steps == ([*range(1, 11)] if PROBES[name]["stage"] == 0 else [3, 9])
    for step in steps:
        weights = {key.split("/")[2]: value for key, value in seen.items() if key.startswith(f"{step}/parameter/")}
        expected = grams_of(weights, PROBES[name].get("dtype", "fp32"))
        assert expected.keys() == {"embeddings", *(f"blocks.{i}" for i in range(5)), "head"}
        for layer, gram in expected.items():
            assert torch.equal(seen[f"{step}/gram/{layer}"], gram), (step, layer)


def single(
    stage: int,
    steps: int,
    frozen_at: Mapping[str, int],
    scales: Callable[[int], Mapping[str, float]] = lambda step: {},
    dtype: str = "fp32",
) -> tuple[Tensor, dict[str, list[float]]]:
    """One process with plain torch, on fp32 masters: the weights after each step, (steps, numel), and each layer's learning rates.

    frozen_at: layers and the number of steps after which they froze. scales: factors on their learning rates in the step after `step`.
    """
    torch.set_num_threads(oracle.THREADS)
    model: nn.Module = Net().bfloat16() if dtype == "bf16" else Net()
    names = [n for n, _ in model.named_parameters()]
    params = list(model.parameters())
    master = {p: p.detach().float().clone().requires_grad_() for p in params}
    layers = list(dict.fromkeys(layer_of(n) for n in names))
    groups = [{"params": [master[p] for n, p in zip(names, params, strict=True) if layer_of(n) == layer]} for layer in layers]
    optimizer = torch.optim.AdamW(groups, lr=oracle.LR, weight_decay=oracle.DECAY)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    weights, rates = [], {layer: [] for layer in layers}
    for step in range(steps):
        live = [p for n, p in zip(names, params, strict=True) if frozen_at.get(layer_of(n), steps) > step]
        optimizer.zero_grad()
        for p, gradient in oracle._gradients(model, live, Cell("", stage, dtype), step, range(2)).items():
            master[p].grad = gradient.float()
        schedule = [group["lr"] for group in optimizer.param_groups]
        for layer, group in zip(layers, optimizer.param_groups, strict=True):
            group["lr"] *= scales(step).get(layer, 1.0)
            rates[layer].append(group["lr"])
        optimizer.step()
        for group, lr in zip(optimizer.param_groups, schedule, strict=True):
            group["lr"] = lr
        scheduler.step()
        for p in live:
            p.data.copy_(master[p].data)
        weights.append(torch.cat([p.detach().float().view(-1) for p in params]))
    return torch.stack(weights), rates


@pytest.mark.parametrize("name", [name for name in PROBES if "bf16" not in name])
def test_training_does_not_notice_the_probe(facts: Any, tensors: Any, name: str) -> None:
    assert facts(name)["events"] == [["freeze", 4, ["embeddings", "blocks.0"]]]
    expected, _ = single(PROBES[name]["stage"], 10, {"embeddings": 4, "blocks.0": 4})
    assert torch.equal(tensors(name)["all weights"], expected)


@pytest.mark.parametrize("name", FREEZEOUTS)
def test_freezeout_trains_each_layer_along_its_own_cosine(facts: Any, tensors: Any, name: str) -> None:
    """Bit for bit the single process that scales each layer's rate, with a scheduler that goes on from the current rate; and resumed."""
    fact, seen = facts(name), tensors(name)
    infos = (
        LayerInfo(name="embeddings", kind="embedding", numel=1),
        *(LayerInfo(name=f"blocks.{i}", kind="block", numel=1) for i in range(5)),
        LayerInfo(name="head", kind="head", numel=1),
    )
    # ends: 0.4, 0.5, … 0.9 of 12 steps: 4.8, 6, 7.2, 8.4, 9.6, 10.8; each freezes at the next step
    frozen_at = dict(zip((info.name for info in infos), (5, 6, 8, 9, 10, 11), strict=False))
    assert fact["events"] == [[step, [layer]] for layer, step in frozen_at.items()]
    policy = FreezeOutPolicy(0.4, "linear")
    case = FREEZEOUTS[name]
    expected, rates = single(case["stage"], 12, frozen_at, lambda step: policy.lr_scales(step, 12, infos, ()), case.get("dtype", "fp32"))
    assert torch.equal(seen["all weights"], expected)
    assert fact["lr"] == pytest.approx([oracle.LR * 0.95 ** (step + 1) for step in range(12)], rel=1e-12), "the scheduler saw a factor"
    assert fact["groups"] == 7
    for layer, lrs in rates.items():
        if layer != "head":
            spent = seen[f"11/lr_spent/{layer}"]
            assert spent.tolist() == pytest.approx(np.cumsum(lrs[: len(spent)]).tolist(), rel=1e-12), layer


def test_gradients_go_on_from_a_checkpoint_in_mid_interval(facts: Any) -> None:
    assert facts("resumed")["stages"] == [8] and facts("resumed")["same"] == [True] * 6
    assert facts("resumed", rank=1)["stages"] == []


def test_what_trained_in_a_part_of_the_interval_has_no_gradient(facts: Any) -> None:
    blocks = [f"blocks.{i}" for i in range(5)]
    # embeddings and blocks.0 freeze at step 5, blocks.0 is back at step 7
    assert facts("thawed")["names"] == [[*blocks, "embeddings"], blocks[1:], blocks]


def test_refusals_name_what_is_missing(facts: Any) -> None:
    for rank in (0, 1):
        said = facts("refused", rank)
        assert "'freezeout' needs parameter groups that contain one layer each" in said["groups"]
        assert "group 0 contains weights of embeddings, blocks.0, blocks.1, …" in said["groups"]
        assert said["dry"] == "", "a dry run scales nothing"
        assert said["length"].startswith("smartfrz.policy: 'freezeout' needs the length of the run, which is unknown")
        assert said["probe"].startswith("smartfrz.policy: 'egeria' needs a probe batch; allowed: an integer >= 2 at smartfrz.probe")
        assert said["pipeline gradients"] == "smartfrz.policy: 'autofreeze' needs gradients, which a pipeline does not give yet"
        assert said["pipeline activations"] == "smartfrz.policy: 'egeria' needs a probe batch, which a pipeline does not take yet"
        assert said["pipeline probe"] == "smartfrz.probe: got 4; allowed in a pipeline: null"
        assert said["pipeline rates"] == (
            "smartfrz.policy: 'freezeout' needs learning rates of single layers, which a pipeline does not give yet"
        )
        assert said["pipeline late"] == ""
        assert (
            said["short"]
            == "smartfrz.probe: got 16, but probe_batch contains a tensor of shape (9, 7); allowed: at most its first dimension"
        )


# --- what they do ---------------------------------------------------------------------------------------------------------------


def freezes(fact: Mapping[str, Any]) -> dict[int, list[str]]:
    assert [text for text in fact["warnings"] if "nothing will freeze" not in text] == [], "a policy failed"
    return {step: layers for kind, step, layers in fact["events"] if kind == "freeze"}


def body_of(fact: Mapping[str, Any]) -> list[str]:
    return [name for name, kind, _ in fact["layers"] if kind != "head"]


def test_every_rank_froze_the_same(facts: Any) -> None:
    for name in POLICIES:
        assert facts(name)["frozen"] == facts(name, rank=1)["frozen"]


def test_late_froze_all_that_it_may_at_its_step_and_nothing_at_the_last(facts: Any) -> None:
    late = facts("late")
    assert freezes(late) == {int(0.7 * STEPS): body_of(late)[: int(0.75 * 7)]}
    assert late["views"][-1]["step"] == STEPS - 1
    assert freezes(facts("last")) == {} and facts("last")["saved"] == 0.0
    assert late["warnings"] == []
    (warned,) = facts("last")["warnings"]
    assert f"as its own settings begin at {STEPS}, and the run ends at {STEPS}: nothing will freeze" in warned


def test_the_views_count_flops(facts: Any) -> None:
    views = facts("late")["views"]
    assert all(view["profiled"] for view in views)
    full = [view["flops"][0] for view in views]
    assert full == pytest.approx([full[0] * view["step"] for view in views])
    done = [view["flops"][1] for view in views]
    assert all(d == f for d, f, view in zip(done, full, views, strict=True) if view["step"] <= 16) and done[-1] < full[-1]


@pytest.mark.parametrize("name", ["random", "random-any"])
def test_random_froze_its_draw(facts: Any, name: str) -> None:
    fact = facts(name)
    ratio = POLICIES[name]["random"].get("ratio")
    policy = RandomPolicy(ratio, seed=5, order=POLICIES[name].get("order", "front_to_back"))
    infos = tuple(LayerInfo(name=n, kind=k, numel=m) for n, k, m in fact["layers"])
    due: dict[int, list[str]] = {}
    for step in range(1, STEPS):
        chosen = policy.decide(blank_view(step, infos, [n for names in due.values() for n in names])).freeze
        if chosen:
            due[step] = list(chosen)
    assert freezes(fact) == due and sum(map(len, due.values())) == int((ratio or 0.75) * 7)
    if name == "random":
        assert fact["frozen"] == body_of(fact)[:5]


def blank_view(step: int, infos: tuple[LayerInfo, ...], frozen: Sequence[str]) -> View:
    return View(
        step=step,
        total_steps=STEPS,
        lr_spent=0.0,
        lr_remaining=None,
        layers=infos,
        frozen=tuple(frozen),
        candidates=tuple(i.name for i in infos if i.kind != "head" and i.name not in frozen),
        windows={},
        window_size=30,
    )


def norms_at(seen: Mapping[str, Tensor], fact: Mapping[str, Any], step: int) -> dict[str, float]:
    numel = {name: n for name, _, n in fact["layers"]}
    return {
        name: float(np.sqrt(np.mean(seen[f"{step}/gradient/{name}"].double().numpy() ** 2) * numel[name]))
        for name in body_of(fact)
        if f"{step}/gradient/{name}" in seen
    }


def test_autofreeze_froze_the_front_with_the_smallest_changes(facts: Any, tensors: Any) -> None:
    fact, seen = facts("autofreeze"), tensors("autofreeze")
    frozen: list[str] = []
    expected: dict[int, list[str]] = {}
    before: dict[str, float] = {}
    for view in fact["views"]:
        step = view["step"]
        assert view["frozen"] == frozen
        now = norms_at(seen, fact, step)
        if before:
            change = {n: abs(before[n] - now[n]) / before[n] for n in now if n != "embeddings"}
            median = np.quantile(list(change.values()), 0.5)
            change["embeddings"] = change.get("blocks.0", 0.0)
            chosen = []
            for name in body_of(fact):
                if name not in frozen:
                    if change[name] > median:
                        break
                    chosen.append(name)
            if chosen:
                expected[step] = chosen
                frozen = frozen + chosen
        before = now
    assert expected and freezes(fact) == expected


def test_pipetransformer_froze_its_share_bounded_by_the_gradients(facts: Any, tensors: Any) -> None:
    fact, seen = facts("pipetransformer"), tensors("pipetransformer")
    names, count, frozen = body_of(fact), 0.0, 0
    expected: dict[int, list[str]] = {}
    bounded = False
    for epoch in range(1, 6):
        norms = norms_at(seen, fact, 4 * epoch)
        active = [n for n in names[frozen:] if n != "embeddings"]
        flattest = names.index(min(active, key=norms.__getitem__)) + 1
        share = count + (len(names) - count) / 3
        bounded = bounded or flattest < share
        count = max(count, min(share, flattest))
        if int(count + 1e-9) > frozen:
            expected[4 * epoch] = names[frozen : int(count + 1e-9)]
            frozen = int(count + 1e-9)
    assert expected and freezes(fact) == expected


def test_weight_drift_froze_what_moved_little(facts: Any, tensors: Any) -> None:
    fact, seen = facts("weight_drift"), tensors("weight_drift")
    names, frozen = body_of(fact), []
    expected: dict[int, list[str]] = {}
    for view in fact["views"]:
        step = view["step"]
        chosen = []
        for name in names if step >= STEPS // 4 else []:
            before, now = seen[f"{step}/weights/{'blocks.0' if name == 'embeddings' else name}"].double().numpy()
            still = np.abs(now - before).sum() / np.abs(before).sum() < 0.05
            if name not in frozen and still and len(frozen) + len(chosen) < 5:
                chosen.append(name)
            elif name not in frozen:
                break
        if chosen:
            expected[step] = chosen
            frozen = frozen + chosen
    assert expected and freezes(fact) == expected
    assert min(expected) >= STEPS // 4


def test_egeria_froze_the_front_layer_whose_plasticity_stood_still(facts: Any, tensors: Any) -> None:
    """The rule again, with numpy: loss, moving average and straight line."""
    fact, seen = facts("egeria"), tensors("egeria")
    names, window, tolerance, refresh = body_of(fact), 2, 0.6, 2
    frozen: list[str] = []
    expected: dict[int, list[str]] = {}
    losses: dict[str, list[float]] = {name: [] for name in names[1:]}
    steepest = dict.fromkeys(names[1:], 0.0)
    reference: dict[str, Any] = {}
    flat, last_front = 0, ""
    for stage, view in enumerate(fact["views"]):
        step = view["step"]
        assert view["frozen"] == frozen
        rows = {}
        for name in names[1:]:
            gram = seen[f"{step}/gram/{name}"].numpy()
            rows[name] = gram / np.linalg.norm(gram, axis=1, keepdims=True)
        slope = {}
        for name in names[1:]:
            if name in reference and name not in frozen:
                losses[name].append(float(np.mean((rows[name] - reference[name]) ** 2)))
                if len(losses[name]) >= 2 * window - 1:
                    smooth = np.convolve(losses[name], np.ones(window) / window, "valid")[-window:]
                    slope[name] = abs(np.polyfit(range(window), smooth, 1)[0])
                    steepest[name] = max(steepest[name], slope[name])
        if stage % refresh == 0:
            reference = rows
        front = next(name for name in names[1:] if name not in frozen)
        small = front in slope and slope[front] <= tolerance * steepest[front]
        flat = (flat + 1 if front == last_front else 1) if small else 0
        last_front = front
        if flat >= window and len(frozen) < 5:
            chosen = ["embeddings", front] if not frozen else [front]
            expected[step] = chosen
            frozen = frozen + chosen
    assert expected and freezes(fact) == expected
