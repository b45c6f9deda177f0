"""`smartfrz reshape`: a pipeline's checkpoint goes on with other stages and replicas, on real PipelineEngines. See worker_reshape.py."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_worker
from reference.bounds import noisy, spread
from typer.testing import CliRunner
from workers import worker_pipeline

from smartfrz_ds.checkpoint.files import COMPLETE_FILE, SIDE_FILE, complete_tags, digest_of, pack, unpack, unpack_tensors, write_complete
from smartfrz_ds.checkpoint.reshape import reshape
from smartfrz_ds.checkpoint.reshape_states import Stage, entry_of, new_stages, whole_states
from smartfrz_ds.cli.main import app

ALL = ["embeddings", *(f"layers.{i}" for i in range(1, 7))]
# Stages of 6 and 5 entries. Saved with stage 0 frozen as a whole; then a thaw out of the kept state.
WHOLE = {"plan": {"2": ["freeze", ALL], "5": ["thaw", ALL[3:]]}, "save": 4, "steps": 7, "smartfrz": {"keep_state": 100}}
# Saved with layers that came back with moments of their own, and step counts; then one freezes again.
BACK = {"plan": {"1": ["freeze", ALL], "3": ["thaw", ALL[4:]], "6": ["freeze", ALL[4:6]]}, "save": 5, "steps": 7}
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
# stages, replicas, bounds, partition_method of the new engine; uniform makes (0, 6, 11) of two stages: layers move when it loads
ONE, OTHER_CUT, MOVED = [1, 2, [0, 11], "uniform"], [2, 1, [0, 5, 11], "parameters"], [2, 1, [0, 8, 11], "uniform"]
LESS, MORE = [2, 2, [0, 6, 11], "uniform"], [4, 1, [0, 3, 6, 9, 11], "uniform"]


def case(name: str, plan: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "pp": 2, "micro": 4, "targets": [ONE, OTHER_CUT], **plan, **more}


TWO = [
    case("z0", WHOLE, targets=[ONE, MOVED]),
    case("z1-back", BACK, stage=1, groups=True),
    case("bf16-z1", WHOLE, stage=1, dtype="bf16", groups=True, targets=[ONE]),
    case("bf16-z1-fp32", BACK, stage=1, dtype="bf16", config=FP32_ACCUMULATION, targets=[ONE]),
    case("bf16-z0", {"plan": {}, "save": 1, "steps": 1}, dtype="bf16", targets=[]),
]
FOUR = [
    case("4-z0", WHOLE, pp=4, targets=[LESS, [1, 4, [0, 11], "uniform"]]),
    case("4-z1", WHOLE, pp=4, stage=1, targets=[LESS]),
    case("4-z1-back", BACK, pp=4, stage=1, targets=[LESS]),
    case("4-bf16-z1", BACK, pp=4, stage=1, dtype="bf16", targets=[LESS]),
    case("2x2-z0", BACK, targets=[MORE]),
    case("2x2-z1", WHOLE, stage=1, targets=[MORE, [1, 4, [0, 11], "uniform"]]),
    case("2x2-bf16-z1-fp32", WHOLE, stage=1, dtype="bf16", config=FP32_ACCUMULATION, targets=[MORE]),
]
CASES = {c["name"]: c for c in [*TWO, *FOUR]}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_worker("reshape", TWO, tmp_path_factory.mktemp("reshape"), timeout=300)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_worker("reshape", FOUR, tmp_path_factory.mktemp("reshape4"), ranks=4, timeout=500)


def check(folder: Path, name: str, world: int) -> None:
    now = CASES[name]
    replicas, dtype = world // now["pp"], DTYPES[now.get("dtype", "fp32")]
    # other replicas add micro-batches' gradients in another order: what that makes of the same training in plain torch
    oracle = functools.partial(worker_pipeline.reference, now, replicas)
    samples = [seen["weights"] for seen in noisy(oracle, dtype=dtype, since=now["save"])]
    bound = spread(samples, oracle()["weights"], dtype)
    for rank in range(world):
        seen = json.loads((folder / f"{name}.{rank}.json").read_text())
        frozen = [n for n in seen["states"] if "step" not in seen["states"][n]]
        kept = "smartfrz" in now
        assert len(frozen) == (38 if kept else 20) and len(seen["states"]) == 54
        assert set(seen["steps"].values()) == ({4.0} if kept else {5.0, 2.0})
        for pp, dp, _, _ in now["targets"]:
            found = seen["resumed"][f"{pp}x{dp}"]
            assert found["start"] and found["different"] == [] and found["mine"] == [1, 2] and found["events"]
            assert found["step"] == found["global_steps"] == now["save"]
            assert found["frozen"] == (ALL if kept else ALL[:4])
            assert found["worst"] <= (0.0 if dp == replicas else bound), found
            if dp != replicas:
                assert "smartfrz reshape" in found["refused"] and f"--pp {pp} --dp {dp}" in found["refused"]
        assert seen["moved"] > max(3 * bound, 1e-3)


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", [c["name"] for c in TWO if c["targets"]])
def test_two_stages_go_on_as_one_and_as_others(two: Path, name: str) -> None:
    check(two, name, 2)


@pytest.mark.slow
@pytest.mark.distributed(4)
@pytest.mark.parametrize("name", [c["name"] for c in FOUR])
def test_four_ranks(four: Path, name: str) -> None:
    check(four, name, 4)


@pytest.mark.slow
@pytest.mark.distributed(4)
@pytest.mark.parametrize("stages", [1, 3, 4])
def test_other_stages_alone_change_not_a_bit(two: Path, tmp_path: Path, stages: int) -> None:
    job = []
    for now in (c for c in TWO if c["targets"]):
        made = reshape(two / now["name"], stages, 1, output=tmp_path / now["name"])
        job.append(now | {"pp": stages, "from": str(made.folder.parent), "saved": str(two)})
    folder = run_worker("reshape", job, tmp_path / "out", ranks=stages)
    for now in job:
        seen = json.loads((folder / f"{now['name']}.0.json").read_text())
        assert seen == {"start": True, "worst": 0.0}, now["name"]


# --- without engines --------------------------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, Any]:
    """All that a checkpoint says, but for the digest of the freeze state and where it came from."""
    found: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.suffix == ".pt":
            found[path.name] = torch.load(path, weights_only=False)
            found[path.name].pop("smartfrz_ds", None)
        elif path.name == SIDE_FILE:
            state = unpack(path.read_bytes())
            state.pop("reshaped_from", None)
            for private in state["privates"]:
                private["frozen"].sort()
            found[path.name] = state | {"private": None, "kept": sorted(state["kept"])}
        elif path.name != COMPLETE_FILE:
            found[path.name] = kept_by_name(*unpack_tensors(path.read_bytes()))
    return found


def kept_by_name(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Of one replica alone: what of each parameter waits for a thaw, however it is packed."""
    found: dict[str, Any] = {}
    for k, item in enumerate(about["kept"]):
        mine = {name.removeprefix(f"{k}/"): t for name, t in tensors.items() if name.startswith(f"{k}/")}
        if "param" in item:
            found[item["param"]] = mine | item["numbers"]
        for name, segments in item.get("pieces", {}).items():
            assert [s[:3] for s in segments] == [[0, segments[0][1], 0]]
            found[name] = {key: t[segments[0][3] :][: segments[0][1]] for key, t in mine.items()} | {"step": item["steps"].get(name)}
    return found


def equal(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two of these differ."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict):
        if set(a) != set(b):
            return [f"{where}: {set(a) ^ set(b)}"]
        return [x for k in a for x in equal(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, list | tuple):
        return (
            [f"{where}: length"]
            if len(a) != len(b)
            else [x for i, (v, w) in enumerate(zip(a, b, strict=True)) for x in equal(v, w, f"{where}/{i}")]
        )
    return [] if a == b or type(a).__name__.endswith("LossScaler") else [f"{where}: {a!r} is not {b!r}"]


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", ["z0", "z1-back", "bf16-z1", "bf16-z1-fp32"])
def test_there_and_back_is_the_same(two: Path, tmp_path: Path, name: str) -> None:
    """Over three replicas (partitions with padding at their ends) and stages that cut the list elsewhere."""
    before = content(two / name / f"global_step{CASES[name]['save']}")
    made = reshape(two / name, 3, 3, output=tmp_path / "a", bounds=[0, 2, 9, 11])
    assert len(list(made.folder.glob("*zero_pp_rank_*"))) == (0 if name == "z0" else 9)
    back = reshape(tmp_path / "a", 2, 1, output=tmp_path / "b", bounds=[0, 6, 11])
    assert equal(before, content(back.folder)) == []
    # a single number that differs would be seen
    other = content(back.folder)
    next(iter(other["layer_03-model_states.pt"].values())).view(-1)[5] += 0.5
    assert len(equal(before, other)) == 1


def test_a_step_count_of_a_whole_group_comes_along() -> None:
    """FusedAdam without ZeRO counts in the state of a group's last parameter alone; another cut may make another one the last."""
    state = {i: {"step": 5 if i == 2 else 1, "exp_avg": torch.full((2,), float(i))} for i in range(3)}
    old = Stage(groups=[["0.a", "1.a", "2.a"]], frozen=set())
    saved = {"state": state, "param_groups": [{"lr": 0.1, "params": [0, 1, 2]}]}
    front, back = new_stages([old], [0, 2, 3])
    assert (front.groups, back.groups) == ([["0.a", "1.a"]], [["2.a"]])
    made = whole_states([(old, saved, True)], front)
    assert [made["state"][i]["step"] for i in (0, 1)] == [5, 5] and made["param_groups"] == [{"lr": 0.1, "params": [0, 1]}]
    assert [float(made["state"][i]["exp_avg"][0]) for i in (0, 1)] == [0.0, 1.0]
    made = whole_states([(old, saved, False)], back)
    assert made["state"][0]["step"] == 5 and len(made["state"]) == 1


@pytest.mark.distributed(2)
def test_the_command(two: Path, tmp_path: Path) -> None:
    cli = CliRunner()
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in (two / "bf16-z1").rglob("*")}
    done = cli.invoke(app, ["reshape", str(two / "bf16-z1"), "--pp", "1", "--dp", "2", "--output", str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    assert "1 x 2 (stages x replicas), bounds 0,11" in done.stdout and "gradient_accumulation_steps 4 -> 2" in done.stdout
    assert "keep_state" in done.stdout
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in (two / "bf16-z1").rglob("*")} == before
    assert complete_tags(tmp_path / "new") == ["global_step4"] == [(tmp_path / "new" / "latest").read_text()]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["global_step4", "latest"]
    # without bounds, the frozen front (entries 0 to 6) weighs a third: stage 0 takes more than half of the list
    even = reshape(two / "bf16-z1", 2, 1, output=tmp_path / "even")
    assert even.parts == (0, 7, 11)

    def refused(*arguments: str, at: Path = two / "bf16-z1") -> str:
        run = cli.invoke(app, ["reshape", str(at), "--output", str(tmp_path / "none"), *arguments])
        assert run.exit_code == 2 and run.stderr.count("error:") == 1, run.output
        assert not (tmp_path / "none" / "latest").exists()
        return run.stderr

    assert "got 12; allowed: an integer from 1 to 11" in refused("--pp", "12", "--dp", "1")
    assert "replicas (--dp): got 0" in refused("--pp", "1", "--dp", "0")
    for wrong in ("0,11", "0,7,7,11", "0,4,8", "0,4,x,11"):
        assert "--bounds" in refused("--pp", "3", "--dp", "1", "--bounds", wrong)
    assert "already has global_step4" in refused("--pp", "1", "--dp", "2", "--output", str(tmp_path / "new"))
    assert "already has global_step4" in refused("--pp", "1", "--dp", "2", "--output", str(two / "bf16-z1"))
    assert "no file `latest`" in refused("--pp", "1", "--dp", "2", at=tmp_path)
    assert f"has no {SIDE_FILE}" in refused("--pp", "1", "--dp", "2", "--tag", "global_step9")
    assert "bf16 without ZeRO" in refused("--pp", "1", "--dp", "2", at=two / "bf16-z0")


@pytest.mark.distributed(2)
def test_damaged_and_foreign_checkpoints_are_refused(two: Path, tmp_path: Path) -> None:
    def changed(name: str, change: Any, *, listed: bool = True) -> Path:
        shutil.copytree(two / "bf16-z1", tmp_path / name)
        change(tmp_path / name / "global_step4")
        if listed:
            write_complete(tmp_path / name / "global_step4", 4)
        return tmp_path / name

    def side(**new: Any) -> Any:
        def change(folder: Path) -> None:
            data = pack(unpack((folder / SIDE_FILE).read_bytes()) | new)
            (folder / SIDE_FILE).write_bytes(data)

        return change

    def model(**new: Any) -> Any:
        def change(folder: Path) -> None:
            path = folder / "mp_rank_00_model_states.pt"
            torch.save(torch.load(path, weights_only=False) | new, path)

        return change

    state = unpack((two / "bf16-z1" / "global_step4" / SIDE_FILE).read_bytes())
    turned = [p | {"place": p["place"][::-1]} for p in state["privates"]]
    config = torch.load(two / "bf16-z1" / "global_step4" / "mp_rank_00_model_states.pt", weights_only=False)["ds_config"]
    robin = config | {"zero_optimization": config["zero_optimization"] | {"round_robin_gradients": True}}
    wrong = {
        "is incomplete: layer_03": changed("a", lambda f: (f / "layer_03-model_states.pt").unlink(), listed=False),
        "is not a pipeline checkpoint": changed("b", side(parts=None)),
        "is damaged: its digest": changed("c", side(step=5)),
        "zero_optimization.round_robin_gradients: the checkpoint has True": changed("d", model(ds_config=robin)),
        "was saved by DeepSpeed 0.17.0": changed("e", model(ds_version="0.17.0")),
        "no layer file for 3.": changed("f", lambda f: (f / "layer_03-model_states.pt").rename(f / "layer_03-model_00-model_states.pt")),
        "Path": changed("g", model(mine=Path("data"))),
    }
    for text, folder in wrong.items():
        with pytest.raises(ValueError, match=text):
            reshape(folder, 1, 2, output=tmp_path / "none")
    digest = {"smartfrz_ds": {"format": 1, "tag": "global_step4"}}
    for text, new in (("a custom topology", {"privates": turned}), ("earlier smartfrz_ds", {"privates": [{"steps": {}}] * 2})):
        folder = changed(text[:3], side(**new))
        data = (folder / "global_step4" / SIDE_FILE).read_bytes()
        model(smartfrz_ds=digest["smartfrz_ds"] | {"digest": digest_of(data)})(folder / "global_step4")
        write_complete(folder / "global_step4", 4)
        with pytest.raises(ValueError, match=text):
            reshape(folder, 1, 2, output=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    trusted = reshape(tmp_path / "g", 1, 2, output=tmp_path / "trusted", trust=True)
    assert torch.load(trusted.folder / "mp_rank_00_model_states.pt", weights_only=False)["mine"] == Path("data")
    for name in ("tied_modules.embed.weight", "loss_fn.weight"):
        with pytest.raises(ValueError, match=name):
            entry_of(name)


@pytest.mark.distributed(2)
def test_a_kill_leaves_no_half_checkpoint(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies in front of every file in turn; another try ends well."""
    from smartfrz_ds.checkpoint import reshape as module

    out, synced = tmp_path / "new", module._sync
    for files in range(0, 20, 3):
        child = os.fork()
        if child == 0:
            count = 0

            def dies(path: Path, files: int = files) -> None:
                nonlocal count
                synced(path)
                count += 1
                if count > files:
                    os._exit(9)

            monkeypatch.setattr(module, "_sync", dies)
            reshape(two / "bf16-z1", 1, 2, output=out)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert ended in (0, 9)
        if ended == 0:
            break
        assert complete_tags(out) == [] and not (out / "latest").exists() and not (out / "global_step4").exists()
        assert (out / ".reshaping-global_step4").is_dir()
    else:
        reshape(two / "bf16-z1", 1, 2, output=out)
    assert complete_tags(out) == ["global_step4"] and sorted(p.name for p in out.iterdir()) == ["global_step4", "latest"]
    # no room for the last file: an error, and nothing is left
    limited = tmp_path / "limited"

    def full(path: Path) -> None:
        if path.name.startswith("bf16_zero"):
            raise OSError("no space left")

    monkeypatch.setattr(module, "_sync", full)
    with pytest.raises(OSError, match="no space"):
        reshape(two / "bf16-z1", 1, 2, output=limited)
    assert list(limited.iterdir()) == []
