"""Hooks that keep frozen parameters frozen: where they are, and where they must not be. One process; ranks: test_other_code.py."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.oracle import Net, data, loss_of
from torch import nn

import smartfrz_ds

FRONT = ["embeddings", "blocks.0"]


def made(net: nn.Module | None = None, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    net = Net() if net is None else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    return net, optimizer, smartfrz_ds.attach_torch(net, optimizer, {"policy": "manual", **settings})


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, *data(step, 0, 0), "fp32").backward()
        optimizer.step()


def front(net: Any) -> list[nn.Parameter]:
    return [*net.inp.parameters(), *net.blocks[0].parameters()]


def hooked(net: nn.Module) -> int:
    return sum(bool(p._post_accumulate_grad_hooks) for p in net.parameters())


def test_hooks_follow_the_frozen_layers() -> None:
    net, optimizer, controller = made()
    train(net, optimizer, range(4))
    for names, count in ((FRONT, 8), ([], 0), (FRONT, 8), (["embeddings"], 2)):
        controller.thaw(controller.frozen)
        controller.freeze(names)
        train(net, optimizer, range(4, 6))  # the gradient check's own hooks are gone behind the first
        assert hooked(net) == count, names
    controller.release()
    assert hooked(net) == 0 and all(p.requires_grad for p in net.parameters())


def test_copies_of_a_frozen_model_are_free() -> None:
    """An EMA or a pickled model is nobody's: its frozen parameters may be switched on and trained."""
    net, optimizer, controller = made()
    train(net, optimizer, range(4))
    controller.freeze(FRONT)
    train(net, optimizer, range(4, 6))
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert hooked(copied) == 0
        copied.requires_grad_(True)
        loss_of(copied, *data(0, 0, 0), "fp32").backward()
        assert all(p.requires_grad and p.grad is not None for p in front(copied))
    assert not any(p.requires_grad for p in front(net))


def test_after_a_resume(tmp_path: Path) -> None:
    net, optimizer, controller = made()
    train(net, optimizer, range(4))
    controller.freeze(FRONT)
    train(net, optimizer, range(4, 6))
    controller.save(tmp_path)
    torch.save([net.state_dict(), optimizer.state_dict()], tmp_path / "rest.pt")
    net, optimizer, controller = made()
    controller.restore(tmp_path)
    weights, state = torch.load(tmp_path / "rest.pt")
    net.load_state_dict(weights)
    optimizer.load_state_dict(state)
    before = [p.detach().clone() for p in front(net)]
    net.requires_grad_(True)
    with pytest.warns(RuntimeWarning, match="requires_grad=True on parameters of the frozen layers"):
        train(net, optimizer, range(6, 7))
    assert not any(p.requires_grad or p.grad is not None for p in front(net))
    assert all(torch.equal(p, was) for p, was in zip(front(net), before, strict=True))


def test_gradient_accumulation_and_what_is_said() -> None:
    """Of four micro-batches only the first computes gradients of frozen layers; the bytes are those, and it is said once."""
    net, optimizer, controller = made()
    train(net, optimizer, range(4))
    controller.freeze(FRONT)
    computed = []
    for p in front(net):
        p.requires_grad_(True).register_post_accumulate_grad_hook(lambda p: computed.append(p))
        p.requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4, 8):
            net.requires_grad_(True)
            optimizer.zero_grad()
            for micro in range(4):
                (loss_of(net, *data(step, micro, 0), "fp32") / 4).backward()
            optimizer.step()
    assert len(computed) == len(front(net))
    [text] = [str(w.message) for w in caught if "smartfrz" in str(w.message)]
    spent = sum(p.nbytes for p in front(net))
    assert f"step 5 ({spent} bytes on this rank)" in text and "layers embeddings, blocks.0 (an" in text and "thaw([…])" in text
    [event] = [e for e in controller.report().events if e.kind == "warning"]
    assert event.message in text


def test_flags_of_active_layers_are_the_users() -> None:
    net, optimizer, controller = made()
    train(net, optimizer, range(4))
    controller.freeze(FRONT)
    net.blocks[3].requires_grad_(False)
    before = net.blocks[3].up.weight.detach().clone()
    train(net, optimizer, range(4, 7))
    assert not net.blocks[3].up.weight.requires_grad and torch.equal(net.blocks[3].up.weight, before)


def test_pending_gradients_are_named_and_can_be_dropped() -> None:
    net, optimizer, controller = made()
    train(net, optimizer, range(2))
    optimizer.zero_grad()
    loss_of(net, *data(2, 0, 0), "fp32").backward()  # another model's, that goes through this one
    words = r"step boundary.*34 parameters \(inp.weight, inp.bias, blocks.0.norm.weight, …\).*drop_gradients\(\)"
    with pytest.raises(RuntimeError, match=words):
        controller.freeze(FRONT)
    controller.drop_gradients()
    controller.freeze(FRONT)
    assert controller.frozen == tuple(FRONT)
