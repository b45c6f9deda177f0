"""Other code that reads the engine's memory: saves in flight are waited for, callbacks follow a change.

Background: a freeze permutes and shrinks the buffers of ZeRO in place. A save in the background that was still copying them would have
written weights of two layouts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.api
from reference import oracle
from reference.async_saves import NoCopy, SlowStager, SlowWriter, copied, differing, open_later
from reference.torch_models import made, steps
from torch.distributed.checkpoint.state_dict import get_state_dict

from smartfrz_ds.backends.readers import count_graphs, graphed_modules, shared

Run = tuple[oracle.Net, torch.optim.Optimizer, Any]


@pytest.fixture
def run() -> Iterator[Run]:
    model, optimizer, controller = made("torch", keep_state=10)
    steps(model, optimizer, range(2), rank=0)
    yield model, optimizer, controller
    controller.detach()


def state_of(run: Run) -> dict[str, Any]:
    return dict(zip(("model", "optim"), get_state_dict(*run[:2]), strict=True))


def check_saved(folder: Path, saved: dict[str, Any]) -> None:
    found = copied(saved, zeros=True)
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    assert differing(found, saved) == []


def test_a_save_that_is_being_staged_is_waited_for(run: Run, tmp_path: Path) -> None:
    """The steps after the freeze would change what is staged: the checkpoint is bit for bit the state at the save."""
    model, optimizer, controller = run
    gate, state = threading.Event(), state_of(run)
    saved, stager = copied(state), SlowStager(gate)
    response = dcp.async_save(state, checkpoint_id=tmp_path / "ck", async_stager=stager, no_dist=True)
    open_later(gate)
    assert not response.staging_completion.done()
    controller.freeze(["embeddings", "blocks.0"])
    assert response.staging_completion.done(), "the freeze did not wait"
    steps(model, optimizer, range(2, 4), rank=0)
    response.upload_completion.result()
    stager.close()
    check_saved(tmp_path / "ck", saved)
    assert differing(state_of(run)["model"], saved["model"]), "the steps moved weights"


def test_a_save_without_a_copy_is_waited_for_to_its_end(run: Run, tmp_path: Path) -> None:
    gate, state = threading.Event(), state_of(run)
    saved, writer = copied(state), SlowWriter(tmp_path / "ck", gate)
    upload = dcp.async_save(state, storage_writer=writer, async_stager=NoCopy(), no_dist=True)
    open_later(gate)
    run[2].freeze(["embeddings"])
    assert upload.done(), "the freeze did not wait"
    check_saved(tmp_path / "ck", saved)


def test_a_save_that_is_copied_already_is_not_waited_for(run: Run, tmp_path: Path) -> None:
    """The default: async_save copies before it returns. Only writing is left, which reads nothing of the engine's."""
    model, optimizer, controller = run
    gate, state = threading.Event(), state_of(run)
    saved = copied(state)
    upload = dcp.async_save(state, storage_writer=SlowWriter(tmp_path / "ck", gate), no_dist=True)
    controller.freeze(["embeddings"])
    steps(model, optimizer, range(2, 4), rank=0)
    assert not upload.done()
    gate.set()
    upload.result()
    check_saved(tmp_path / "ck", saved)


def test_a_save_that_fails_holds_nothing_up(run: Run, tmp_path: Path) -> None:
    gate = threading.Event()
    upload = dcp.async_save(
        state_of(run), storage_writer=SlowWriter(tmp_path / "ck", gate, "disk full"), async_stager=NoCopy(), no_dist=True
    )
    open_later(gate)
    run[2].freeze(["embeddings"])
    with pytest.raises(dcp.api.CheckpointException, match="disk full"):
        upload.result()
    assert run[2].frozen == ("embeddings",)


def test_weights_that_stay_where_they_are_may_be_shared(run: Run) -> None:
    """Without DeepSpeed a change moves no weights: the other process goes on to see them."""
    model, optimizer, controller = run
    model.share_memory()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    steps(model, optimizer, range(2, 3), rank=0)
    controller.freeze(["embeddings"])
    controller.thaw(["embeddings"])
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()}


def test_shared_weights_are_seen(run: Run) -> None:
    """In shared memory, or sent to another process (which puts a CPU tensor there); views of a shared buffer too."""
    model, _, controller = run
    weights = {name: p.data for name, p in model.named_parameters()}
    assert shared(weights) == [] and controller._readers.refusal(moves=True) == ""
    ForkingPickler.dumps(model.head.weight.data)
    assert shared(weights) == ["head.weight"]
    flat = torch.zeros(8).share_memory_()
    assert shared({"a": flat[:4], "b": torch.zeros(4), "c": flat[4:]}) == ["a", "c"]
    assert controller._readers.refusal(moves=True).startswith("weights are shared with other processes (head.weight): register a callback")
    assert count_graphs() == 0 and graphed_modules(model) == []


def test_callbacks_follow_each_change(run: Run, tmp_path: Path) -> None:
    model, optimizer, controller = run
    seen: list[tuple[str, Any]] = []
    first = controller.on_layout_change(lambda frozen: seen.append(("first", frozen)))
    controller.on_layout_change(lambda frozen: seen.append(("events", len(controller.report().events))))
    controller.freeze(["embeddings"])
    assert seen == [("first", ("embeddings",)), ("events", 1)], "in their order, and the change is recorded"
    first.remove()
    controller.thaw(["embeddings"])
    assert seen[2:] == [("events", 2)]
    with controller.on_layout_change(lambda frozen: seen.append(("within", frozen))):
        controller.freeze(["blocks.0"])
        controller.freeze(["blocks.0"])
    assert seen[3:] == [("events", 3), ("within", ("blocks.0",))], "nothing follows where nothing changed"
    controller.save(tmp_path)
    controller.thaw(["blocks.0"])
    controller.restore(tmp_path)
    assert seen[5:] == [("events", 4), ("events", 4)] and controller.frozen == ("blocks.0",)
    with pytest.raises(ValueError, match="nothing would be left"):
        controller.freeze(controller.layers)
    assert len(seen) == 7, "nothing follows a refusal"
    controller.thaw(["blocks.0"])
    steps(model, optimizer, range(2, 3), rank=0)


def test_an_error_in_a_callback_leaves_the_change_in_force(run: Run) -> None:
    model, optimizer, controller = run
    seen: list[Any] = []

    def fail(frozen: Any) -> None:
        raise KeyError("lost")

    failing = controller.on_layout_change(fail)
    controller.on_layout_change(seen.append)
    with pytest.raises(
        RuntimeError, match=r"raised after the freeze at step 2, which stays in force on every rank: rank 0: KeyError: 'lost'"
    ):
        controller.freeze(["embeddings"])
    assert seen == [("embeddings",)] and controller.frozen == ("embeddings",) and len(controller.report().events) == 1
    failing.remove()
    before = model.inp.weight.detach().clone()
    steps(model, optimizer, range(2, 4), rank=0)
    assert torch.equal(before, model.inp.weight)


@pytest.mark.gpu
def test_cuda_graphs_are_refused_until_a_callback_records_them_again() -> None:
    model = oracle.Net().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, capturable=True)
    import smartfrz_ds

    controller = smartfrz_ds.attach_torch(model, optimizer, {"policy": "manual", "order": "any"})
    x = torch.randn(4, oracle.INPUTS, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        model(x)
    with pytest.raises(RuntimeError, match="this process holds 1 CUDA graph, "):
        controller.freeze(["embeddings"])
    with controller.on_layout_change(lambda frozen: None):
        controller.freeze(["embeddings"])
    del graph
    controller.thaw(["embeddings"])
    compiled = torch.compile(model, mode="reduce-overhead")  # torch records its own graphs again
    for _ in range(3):
        compiled(x).sum().backward()
        optimizer.zero_grad()
    controller.freeze(["embeddings"])
    model.zero_grad()
    model.blocks[0] = torch.cuda.make_graphed_callables(model.blocks[0], (torch.randn(4, oracle.WIDTH, device="cuda"),))
    assert graphed_modules(model) == ["blocks.0"]
    controller.detach()
