"""Saves and loads checkpoints of real 2-rank engines; each case writes what it saw. Launched by test_checkpoint.py."""

from __future__ import annotations

import gc
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state
from reference import oracle
from reference.bounds import distance
from safetensors.torch import save_file
from workers import ranks
from workers.worker_exact import engine_for, full

from smartfrz_ds.backends.deepspeed.flat.buffers import link
from smartfrz_ds.checkpoint.files import COMPLETE_FILE, SIDE_FILE


def moved() -> torch.nn.Module:
    """A net with other weights than every run starts with: what is not loaded shows."""
    model = oracle.Net()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5).add_(0.01)
    return model


def train(engine: Any, cell: oracle.Cell, first: int, last: int, *, plan: bool = True, save: Callable[[int], None] | None = None) -> Any:
    """Steps `first` .. `last` - 1, with the cell's plan; `save(k)` after step k - 1. Gives the weights after each step."""
    weights = {}
    for step in range(first, last):
        if plan and (event := cell.at(step)):
            getattr(engine.smartfrz, event[0])(event[1])
        for micro in range(cell.accumulation):
            x, y = oracle.data(step, micro, dist.get_rank())
            engine.backward(oracle.loss_of(engine, x, y, cell.dtype))
            engine.step()
        weights[step + 1] = torch.cat([p.float().view(-1) for p in full(engine.module).values()])
        if save is not None:
            save(step + 1)
    return weights


def moments(engine: Any, cell: oracle.Cell) -> dict[str, torch.Tensor]:
    """What DeepSpeed's accessors show of the moments of active parameters.

    DeepSpeed links them once, after the first group's first step, when the other groups have none yet (flat/buffers.py): an engine in which
    nothing was ever frozen is linked here.
    """
    out = {}
    if cell.stage in (1, 2):
        link(engine.optimizer, engine.smartfrz.backend.masters())
    for name, p in engine.module.named_parameters():
        if p.requires_grad and cell.stage > 0:
            out |= {f"{name}.{k}": safe_get_full_optimizer_state(p, k).clone() for k in ("exp_avg", "exp_avg_sq")}
    return out


def resume(cell: oracle.Cell, folder: Path, saves: list[int], back: list[int]) -> dict[str, Any]:
    """An undisturbed run that saves; from each checkpoint a new engine, and from those in `back` the old one, to the end."""
    engine = engine_for(cell, oracle.Net())[0]
    states: dict[int, Any] = {}

    def save(k: int) -> None:
        if k in saves:
            engine.save_checkpoint(str(folder), client_state={"k": k, "nested": {"a": [1, 2]}})
            states[k] = list(engine.smartfrz.frozen)

    straight = train(engine, cell, 0, cell.steps, save=save)
    final_moments = moments(engine, cell)
    seen: dict[str, Any] = {"frozen": states, "resumed": {}, "rolled_back": {}}

    def follow(other: Any, k: int) -> dict[str, Any]:
        path, client = other.load_checkpoint(str(folder), tag=f"global_step{k}")
        now = torch.cat([p.float().view(-1) for p in full(other.module).values()])
        start = [torch.equal(now, straight[k]), other.smartfrz.step, list(other.smartfrz.frozen)]
        again = train(other, cell, k, cell.steps)
        now_moments = moments(other, cell)
        return {
            "start": start,
            "worst": max(distance(again[s], straight[s]) for s in again),
            "moments": all(torch.equal(v, now_moments[n]) for n, v in final_moments.items()) and len(now_moments) == len(final_moments),
            "client": {key: v for key, v in client.items() if key in ("k", "nested", "smartfrz_ds")},
            "path": path,
        }

    seen["last_checkpoint"] = engine.smartfrz.last_checkpoint
    for k in back:
        seen["rolled_back"][k] = follow(engine, k)
    engine.destroy()
    for k in saves:
        other = engine_for(cell, moved())[0]
        seen["resumed"][k] = follow(other, k)
        other.destroy()
        gc.collect()
    if dist.get_rank() == 0:
        (folder / "cell.json").write_text(json.dumps(vars(cell)))
        save_file({str(k): v.contiguous() for k, v in straight.items()}, folder / "weights.safetensors")
    return seen


# --- single cases -----------------------------------------------------------------------------------------------------------------

HALF = ["embeddings", "blocks.0", "blocks.1"]


def caught(action: Callable[[], Any]) -> dict[str, str]:
    try:
        action()
    except Exception as error:
        return {"type": type(error).__name__, "message": str(error)}
    return {}


def frozen_run(folder: Path, cell: oracle.Cell, *, tags: tuple[int, ...] = (2, 4, 6)) -> tuple[Any, dict[int, torch.Tensor]]:
    """An engine that froze HALF before step 3 and saved at `tags`, with the weights after each step."""
    engine = engine_for(cell, oracle.Net())[0]
    return engine, train(engine, cell, 0, max(tags), save=lambda k: k in tags and engine.save_checkpoint(str(folder)))


def on_rank0(action: Callable[[], Any]) -> None:
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def snapshot(engine: Any) -> list[Any]:
    return [
        list(engine.smartfrz.frozen),
        engine.smartfrz.step,
        engine.global_steps,
        torch.cat([p.view(-1) for p in full(engine.module).values()]),
    ]


def same(a: list[Any], b: list[Any]) -> bool:
    return a[:3] == b[:3] and torch.equal(a[3], b[3])


def cell_of(stage: int, **more: Any) -> oracle.Cell:
    return oracle.Cell(f"z{stage}", stage, plan={"3": ["freeze", HALF]}, **more)


def errors(folder: Path) -> dict[str, Any]:
    """Checkpoints with which something is wrong; the engine that tries has frozen something else and must stay as it is."""
    engine, _ = frozen_run(folder, cell_of(2))
    tag = folder / "global_step4"
    out: dict[str, Any] = {}

    def attempt(name: str, prepare: Callable[[Path], Any], engine: Any = engine) -> None:
        copy = folder / name / "global_step4"
        on_rank0(lambda: (shutil.copytree(tag, copy), prepare(copy)))
        before = snapshot(engine)
        out[name] = caught(lambda: engine.load_checkpoint(str(copy.parent), tag="global_step4"))
        out[name]["unchanged"] = same(before, snapshot(engine))

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    engine.smartfrz.thaw(["blocks.1"])
    attempt("lost", lambda copy: (copy / SIDE_FILE).unlink())
    attempt("damaged", lambda copy: damage(copy / SIDE_FILE))
    attempt("truncated", lambda copy: (copy / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"half"))
    attempt("unfinished", lambda copy: (copy / COMPLETE_FILE).unlink())
    attempt("model_states", lambda copy: ((copy / "mp_rank_00_model_states.pt").write_bytes(b"x"), write_list(copy)))
    out["absent"] = caught(lambda: engine.load_checkpoint(str(folder), tag="nothing"))
    out["reserved"] = caught(lambda: engine.save_checkpoint(str(folder / "r"), client_state={"smartfrz_ds": 1}))

    for name, model in {"fewer_layers": oracle.Net(blocks=3), "other_sizes": oracle.Net(width=24)}.items():
        attempt(name, lambda copy: None, engine_for(cell_of(2), model)[0])
    x, y = oracle.data(0, 0, dist.get_rank())
    engine.backward(oracle.loss_of(engine, x, y, "fp32"))
    before = snapshot(engine)
    out["pending"] = caught(lambda: engine.load_checkpoint(str(folder), tag="global_step4"))
    out["pending"]["unchanged"] = same(before, snapshot(engine))
    return out


def write_list(folder: Path) -> None:
    from smartfrz_ds.checkpoint.files import write_complete

    write_complete(folder, 4)


def latest(folder: Path) -> dict[str, Any]:
    """`latest` that is torn or names what can't be loaded."""
    engine, weights = frozen_run(folder, cell_of(1))
    out: dict[str, Any] = {"good": engine.load_checkpoint(str(folder))[0]}
    for name, text in {"empty": "", "missing": "global_step9", "incomplete": "global_step6"}.items():

        def prepare(name: str = name, text: str = text) -> None:
            (folder / "latest").write_text(text)
            if name == "incomplete":
                (folder / "global_step6" / COMPLETE_FILE).unlink()

        on_rank0(prepare)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            path, _ = engine.load_checkpoint(str(folder))
        now = torch.cat([p.view(-1) for p in full(engine.module).values()])
        step = engine.smartfrz.step
        out[name] = {
            "path": path,
            "equal": torch.equal(now, weights[step]),
            "warnings": [str(w.message) for w in seen if "smartfrz" in str(w.message)],
        }
    on_rank0(lambda: [(folder / f"global_step{k}" / COMPLETE_FILE).unlink(missing_ok=True) for k in (2, 4, 6)])
    out["none"] = caught(lambda: engine.load_checkpoint(str(folder)))
    out["no_latest"] = list(engine.load_checkpoint(str(folder / "empty_folder")))
    return out


def without_plugin(folder: Path, stage: int) -> dict[str, Any]:
    """A checkpoint that plain DeepSpeed wrote, into an engine that has frozen: everything trains again, exactly."""
    cell = cell_of(stage)
    model = oracle.Net()
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(oracle.groups_of(params, params, 1), lr=oracle.LR, weight_decay=oracle.DECAY)
    config = {
        "train_micro_batch_size_per_gpu": oracle.BATCH,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    plain = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=oracle.schedule(optimizer), config=config)[0]
    straight = train(plain, cell, 0, 9, plan=False, save=lambda k: k == 4 and plain.save_checkpoint(str(folder), client_state={"mine": 1}))
    engine = engine_for(cell, moved())[0]
    train(engine, cell, 0, 5)
    frozen = list(engine.smartfrz.frozen)
    _, client = engine.load_checkpoint(str(folder))
    again = train(engine, cell, 4, 9, plan=False)
    return {
        "frozen": [frozen, list(engine.smartfrz.frozen)],
        "step": engine.smartfrz.step,
        "worst": max((again[s] - straight[s]).abs().max().item() for s in again),
        "mine": client["mine"],
    }


def disabled(folder: Path, stage: int) -> dict[str, Any]:
    """`enabled: false`: the layout of the checkpoint comes back, the run goes on as it would have, and nothing more is decided."""
    cell = cell_of(stage)
    _, straight = frozen_run(folder, cell, tags=(2, 4, 9))
    off = oracle.Cell(
        **{**vars(cell), "config": {"smartfrz": {"enabled": False, "policy": "linear", "linear": {"start_step": 1, "end_step": 3}}}}
    )
    engine = engine_for(off, moved())[0]
    before = [type(engine).__name__, hasattr(engine, "smartfrz")]
    engine.load_checkpoint(str(folder), tag="global_step2")
    unfrozen = [type(engine).__name__, hasattr(engine, "smartfrz")]
    _, client = engine.load_checkpoint(str(folder), tag="global_step4")
    again = train(engine, off, 4, 9, plan=False)
    return {
        "before": before,
        "unfrozen": unfrozen,
        "frozen": list(engine.smartfrz.frozen),
        "worst": max((again[s] - straight[s]).abs().max().item() for s in again),
        "marker": "smartfrz_ds" in client,
    }


def parts(folder: Path, stage: int) -> dict[str, Any]:
    """load_module_only and load_optimizer_states=False."""
    cell = cell_of(stage)
    _, straight = frozen_run(folder, cell)
    engine = engine_for(cell, moved())[0]
    train(engine, cell, 0, 2)
    engine.smartfrz.freeze(["embeddings"])
    # under ZeRO-3 DeepSpeed loads weights without the optimizer only this way, and from `latest`
    engine.load_checkpoint(str(folder), tag="global_step6", load_module_only=True, load_optimizer_states=stage < 3)
    now = torch.cat([p.view(-1) for p in full(engine.module).values()])
    out = {"module_only": [torch.equal(now, straight[6]), engine.smartfrz.step, list(engine.smartfrz.frozen)]}
    held = full(engine.module)
    train(engine, cell, 7, 9, plan=False)  # a master that was not refreshed would bring the old weights back
    after = full(engine.module)
    out["frozen_held"] = all(torch.equal(held[n], after[n]) == (oracle.layer_of(n) == "embeddings") for n in held)
    out["moved"] = max((after[n] - held[n]).abs().max().item() for n in held)
    engine.load_checkpoint(str(folder), tag="global_step6", load_optimizer_states=False)
    now = torch.cat([p.view(-1) for p in full(engine.module).values()])
    out["no_optimizer"] = [torch.equal(now, straight[6]), engine.smartfrz.step, list(engine.smartfrz.frozen)]
    train(engine, cell, 6, 8)
    return out


def settled(log: Path) -> str:
    """Read the log while rank 0 does not write to it: a line that crosses a page of the file is seen in parts by others."""
    dist.barrier()
    text = log.read_text()
    dist.barrier()
    return text


def policy(folder: Path) -> dict[str, Any]:
    """A policy with a history and a log: decisions, windows and log lines after a resume are those of the straight run."""
    settings = {
        "policy": "linear",
        "linear": {"start_step": 4, "end_step": 16},
        "order": "front_to_back",
        "snapshot_interval": 1,
        "freeze_interval": 2,
        "warmup_steps": 0,
        "window": 5,
        "cooldown": 1,
        "max_frozen_fraction": 0.6,
        "log_path": str(folder / "log.jsonl"),
    }
    cell = oracle.Cell("policy", 2, config={"smartfrz": settings})
    engine = engine_for(cell, oracle.Net())[0]
    saved: dict[int, Any] = {}

    def save(k: int) -> None:
        if k == 9:
            engine.save_checkpoint(str(folder))
            saved.update(state=engine.smartfrz.state_dict())

    train(engine, cell, 0, 20, save=save)
    log = settled(folder / "log.jsonl")
    end = engine.smartfrz.state_dict()
    engine.smartfrz.release()  # as the end of its process does: else the other engine gets a log of its own
    other = engine_for(cell, moved())[0]
    other.load_checkpoint(str(folder))
    at = other.smartfrz.state_dict()
    train(other, cell, 9, 10)
    cut = settled(folder / "log.jsonl")  # at the first step
    train(other, cell, 10, 20)
    again = other.smartfrz.state_dict()

    def strip(state: dict[str, Any]) -> dict[str, Any]:
        return {
            k: v for k, v in state.items() if k not in ("history", "events", "log_position", "log_mark", "status")
        }  # seconds have other digits

    def windows(a: dict[str, Any], b: dict[str, Any]) -> bool:
        return a["history"].keys() == b["history"].keys() and all(
            torch.equal(a["history"][n][k], b["history"][n][k]) for n in a["history"] for k in a["history"][n]
        )

    def lines(text: str) -> list[Any]:
        told = [e for e in map(json.loads, text.splitlines()) if e["kind"] not in ("start", "status")]
        return [[e["kind"], e["step"], e["layers"]] for e in told]

    return {
        "state": strip(at) == strip(saved["state"]) and all(at[k] == saved["state"][k] for k in ("log_position", "log_mark")),
        "windows": windows(at, saved["state"]) and windows(again, end),
        "history": len(at["history"]),
        "end": strip(again) == strip(end),
        "cut": lines(cut),
        "log": [lines(log), lines(settled(folder / "log.jsonl"))],
        "events": [[e.kind, e.step] for e in other.smartfrz.report().events],
    }


def guarded(folder: Path, stage: int) -> dict[str, Any]:
    """A freeze that turns out a mistake two steps after a resume: it is taken back as in the straight run, bit for bit."""
    guard = {"tolerance": 0.1, "window": 6, "smoothing": 0.5}
    cell = oracle.Cell(f"z{stage}", stage, plan={"3": ["freeze", HALF]}, config={"smartfrz": {"guard": guard}})
    rank = dist.get_rank()

    def told(k: int) -> float:
        return (1.0 if k < 7 else 2.0) + 0.1 * rank + 0.01 * k

    def go(engine: Any, first: int, last: int, saves: tuple[int, ...] = ()) -> dict[int, torch.Tensor]:
        def after(k: int) -> None:
            if k in saves:
                engine.save_checkpoint(str(folder))
            engine.smartfrz.observe(loss=told(k))  # of the step to come

        engine.smartfrz.observe(loss=told(first))
        return train(engine, cell, first, last, save=after)

    engine = engine_for(cell, oracle.Net())[0]
    straight = go(engine, 0, 12, saves=(2, 5))
    end, end_moments = engine.smartfrz.state_dict(), moments(engine, cell)
    seen: dict[str, Any] = {
        "events": [[e.kind, e.step, list(e.layers)] for e in engine.smartfrz.report().events],
        "resumed": {},
    }
    for k in (2, 5):  # before the freeze, and within its window
        other = engine_for(cell, moved())[0]
        other.load_checkpoint(str(folder), tag=f"global_step{k}")
        again = go(other, k, 12)
        now = other.smartfrz.state_dict()
        seen["resumed"][k] = {
            "worst": max((again[s] - straight[s]).abs().max().item() for s in again),
            "moments": all(torch.equal(v, end_moments[n]) for n, v in moments(other, cell).items()),
            "guard": now["guard"] == end["guard"],
            "events": [[e.kind, e.step, list(e.layers)] for e in other.smartfrz.report().events],
        }
        other.destroy()
    return seen


def universal(folder: Path) -> dict[str, Any]:
    """On another number of ranks, from a converted checkpoint."""
    cell = oracle.Cell(**json.loads((folder / "cell.json").read_text()))
    cell = oracle.Cell(**{**vars(cell), "keep_state": 0, "config": {**cell.config, "checkpoint": {"load_universal": True}}})
    engine = engine_for(cell, moved())[0]
    engine.load_checkpoint(str(folder))
    loaded = torch.cat([p.float().view(-1) for p in full(engine.module).values()])
    k = engine.smartfrz.step
    out = {"step": k, "frozen": list(engine.smartfrz.frozen), "windows": len(engine.smartfrz.state_dict()["history"])}
    weights = {}
    for step in range(k, cell.steps):  # the batches of both ranks, in one process
        loss = torch.stack([oracle.loss_of(engine, *oracle.data(step, 0, rank), "fp32") for rank in (0, 1)]).mean()
        engine.backward(loss)
        engine.step()
        weights[str(step + 1)] = torch.cat([p.float().view(-1) for p in full(engine.module).values()])
    save_file({"loaded": loaded, **weights}, folder / "universal.safetensors")
    return out


def other_ranks(folder: Path) -> dict[str, Any]:
    """A checkpoint of 2 ranks that was not converted, on 1."""
    cell = oracle.Cell(**json.loads((folder / "cell.json").read_text()))
    engine = engine_for(cell, moved())[0]
    before = snapshot(engine)
    out: dict[str, Any] = caught(lambda: engine.load_checkpoint(str(folder)))
    return out | {"unchanged": same(before, snapshot(engine))}


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f for f in (errors, latest, without_plugin, disabled, parts, policy, guarded, universal, other_ranks)
}


def main() -> None:
    with ranks.job() as (job, folder):
        for item in job:
            own = Path(item.get("folder", folder / item["name"]))
            own.mkdir(parents=True, exist_ok=True)
            with ranks.case(item["name"]):
                if "cell" in item:
                    seen = resume(oracle.Cell(**item["cell"]), own, item["saves"], item["back"])
                else:
                    seen = CASES[item["case"]](own, *item.get("arguments", []))
                ranks.write(folder, item["name"], seen)


if __name__ == "__main__":
    main()
