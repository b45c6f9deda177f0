"""Pipelines that freeze, are saved, reshaped, and go on with other stages and replicas; compared with the run that just went on.

Launched by test_reshape.py. Global micro-batch g of a step is the same whatever the width: replica r of D takes r, D + r, 2D + r, …
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from reference import oracle
from reference.bounds import distance
from safetensors.torch import load_file, save_file
from torch import Tensor
from workers import ranks
from workers.worker_pipeline import DTYPES, engine_for, weights

from smartfrz_ds.backends.deepspeed.flat.backend import FlatBackend
from smartfrz_ds.checkpoint.reshape import reshape


def train(engine: Any, case: dict[str, Any], first: int, end: int) -> list[Tensor]:
    """All weights after each of these steps."""
    grid, seen = engine.grid, []
    replica, replicas = grid.get_data_parallel_rank(), grid.get_data_parallel_world_size()
    for step in range(first, end):
        if action := case["plan"].get(str(step)):
            getattr(engine.smartfrz, action[0])(action[1])
        data = [oracle.data(step, m * replicas + replica, 0) for m in range(engine.micro_batches)]
        engine.train_batch(iter([(x.to(DTYPES[case.get("dtype", "fp32")]), y) for x, y in data]))
        seen.append(weights(engine))
    return seen


def held(engine: Any) -> dict[str, Any]:
    """What every stage's optimizer holds, by the parameters' names: masters, moments, step counts; and which wait for a thaw."""
    backend, mine = engine.smartfrz.backend, {}
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            mine[name] = {"kept": p in backend._kept}
        elif isinstance(backend, FlatBackend):
            index = next(i for i in range(len(backend.groups)) if any(p is q for q in backend.active(i)))
            step = backend.own_steps.count.get(p, backend.base_optimizer().state[backend.master(index)]["step"])
            moments = {key: safe_get_full_optimizer_state(p, key).clone() for key in ("exp_avg", "exp_avg_sq")}
            mine[name] = {"step": float(step), "master": safe_get_full_fp32_param(p).clone(), **moments}
        else:
            mine[name] = {"master": p.detach().clone()} | {k: v.clone() for k, v in engine.optimizer.state[p].items()}
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return {name: state for part in told for name, state in part.items()}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names whose state is not the same, bit for bit."""

    def same(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) else bool(x == y)

    return [n for n in sorted(a.keys() | b.keys()) if n not in a or n not in b or not all(same(v, b[n].get(k)) for k, v in a[n].items())]


def load_error(engine: Any, folder: Path) -> str:
    try:
        engine.load_checkpoint(str(folder))
    except ValueError as error:
        return str(error)
    return ""


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    engine, saved = engine_for(case), folder / case["name"]
    history = train(engine, case, 0, case["save"])
    engine.save_checkpoint(str(saved), client_state={"mine": [1, 2]})
    at_save, counts = held(engine), [len(e.layers) for e in engine.smartfrz.report().events]
    replicas = engine.grid.get_data_parallel_world_size()
    history += train(engine, case, case["save"], case["steps"])
    engine.destroy()
    if dist.get_rank() == 0:
        save_file({"weights": torch.stack(history)}, folder / f"{case['name']}.safetensors")
    out: dict[str, Any] = {"resumed": {}, "states": {n: sorted(s) for n, s in at_save.items()}}
    out["steps"] = {n: float(s["step"]) for n, s in at_save.items() if "step" in s}
    for pp, dp, bounds, method in case["targets"]:
        new = folder / f"{case['name']}-{pp}x{dp}"
        if dist.get_rank() == 0:
            reshape(saved, pp, dp, output=new, bounds=bounds)
        dist.barrier()
        micro = case["micro"] * replicas // dp
        engine = engine_for(case | {"pp": pp, "micro": micro, "partition": method})
        with torch.no_grad():
            for p in engine.module.parameters():
                p.mul_(0.5)
        found: dict[str, Any] = {}
        if dp != replicas:
            found["refused"] = load_error(engine, saved)
        _, client = engine.load_checkpoint(str(new))
        assert list(engine.module.parts) == bounds, engine.module.parts
        found |= {
            "mine": client["mine"],
            "step": engine.smartfrz.step,
            "global_steps": engine.global_steps,
            "frozen": list(engine.smartfrz.frozen),
            "events": [len(e.layers) for e in engine.smartfrz.report().events] == counts,
            "start": bool(torch.equal(weights(engine), history[case["save"] - 1])),
            "different": differences(at_save, held(engine)),
        }
        after = train(engine, case, case["save"], case["steps"])
        found["worst"] = distance(torch.stack(after), torch.stack(history[case["save"] :]))
        out["resumed"][f"{pp}x{dp}"] = found
        engine.destroy()
    out["moved"] = distance(history[-1], history[case["save"] - 1])
    return out


def go_on(case: dict[str, Any], new: Path) -> dict[str, Any]:
    """What another launch, maybe of another number of ranks, has saved and the test has reshaped."""
    history = load_file(Path(case["saved"]) / f"{case['name']}.safetensors")["weights"]
    engine = engine_for(case)
    engine.load_checkpoint(str(new))
    start = bool(torch.equal(weights(engine), history[case["save"] - 1]))
    after = torch.stack(train(engine, case, case["save"], case["steps"]))
    engine.destroy()
    return {"start": start, "worst": distance(after, history[case["save"] :])}


def main() -> None:
    torch.set_num_threads(oracle.THREADS)
    with ranks.job() as (job, folder):
        for case in job:
            with ranks.case(case["name"]):
                ranks.write(folder, case["name"], go_on(case, Path(case["from"])) if "from" in case else run(case, folder))


if __name__ == "__main__":
    main()
