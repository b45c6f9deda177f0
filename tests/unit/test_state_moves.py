"""One tensor of the optimizer's state on its way to another layout, as on the host and as on a device (by way of the host), and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from smartfrz_ds.backends.deepspeed.flat import state_moves
from smartfrz_ds.backends.deepspeed.flat.partition import FlatLayout, plan_moves
from smartfrz_ds.backends.deepspeed.flat.state_moves import GroupMoves, HostLink, Returning, TensorMove, move_tensor
from smartfrz_ds.backends.transaction import Transaction
from smartfrz_ds.distributed.collectives import Collectives

PARAMS = tuple(Parameter(torch.zeros(n)) for n in (5, 3, 8, 2))
ALL, REST = FlatLayout(PARAMS, 1, alignment=4), FlatLayout(PARAMS[2:], 1, alignment=4)


class Holder:
    """Stands for the optimizer: it has one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def install(self, tensor: Tensor) -> None:
        self.tensor = tensor


def state() -> Tensor:
    values = torch.zeros(ALL.numel)
    values[:18] = torch.arange(1.0, 19.0)
    return values


@pytest.fixture(params=["host", "device by the host", "device beside"])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that were freed before. Where nothing is the host, every tensor moves as if it were on a device."""
    if request.param != "host":
        monkeypatch.setattr(state_moves, "HOST", "nowhere")
    return 10**6 if request.param == "device beside" else 0


def transaction() -> Transaction:
    return Transaction(Collectives(torch.device("cpu")))


def test_what_leaves_waits_and_the_rest_moves_up(room: int) -> None:
    holder, tx = Holder(state()), transaction()
    moves = GroupMoves.plan(ALL, REST, PARAMS[:2], rank=0, group=None)
    move = TensorMove(holder.tensor, moves, HostLink(), room)
    freed = move_tensor(tx, "m", move, [], holder.install)
    tx.finish()
    assert holder.tensor.tolist() == [*range(9, 19), 0, 0]
    assert move.waiting.tolist() == list(range(1, 9))
    assert freed == (0 if state_moves.HOST == "cpu" else 4 * (ALL.numel - REST.numel))
    back = plan_moves(moves.kept, ALL, PARAMS[:2])
    tx = transaction()
    again = TensorMove(holder.tensor, GroupMoves.plan(REST, ALL, [], rank=0, group=None), HostLink(), room)
    move_tensor(tx, "m", again, [Returning(back, move.waiting)], holder.install)
    tx.finish()
    assert torch.equal(holder.tensor, state())


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("fails", ["fill", "exchange", "install", "later"])
def test_an_error_brings_the_tensor_back(room: int, fails: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a copy of what leaves waits, or the old tensor with all of its elements."""
    holder, tx = Holder(state()), transaction()
    if whole:
        monkeypatch.setattr(state_moves, "WHOLE_FROM", 0.4)
    moves = GroupMoves.plan(ALL, REST, PARAMS[:2], rank=0, group=None, keep=not whole)
    assert moves.waiting_elements(0) == (ALL.numel if whole else 8)
    move = TensorMove(holder.tensor, moves, HostLink(), room)
    armed = [True]

    def fail(*_: object) -> None:
        if armed[0]:
            armed[0] = False
            raise MemoryError("no room")

    if fails == "exchange":
        monkeypatch.setattr(TensorMove, "run", lambda self, tx: tx.fail_later(MemoryError("no room")))

    def install(tensor: Tensor) -> None:
        holder.install(tensor)
        if fails == "install":
            fail()

    with pytest.raises(MemoryError) as caught:
        move_tensor(tx, "m", move, [], install, fail if fails == "fill" else None)
        fail()
    assert tx.roll_back(caught.value) == "rank 0: MemoryError: no room"
    assert torch.equal(holder.tensor, state())


def test_a_tensor_that_leaves_whole_waits_where_it_is(room: int) -> None:
    """A rank whose partition is frozen whole: no second copy of it, in the order of the buffer, and an undo brings it back."""
    params, other = PARAMS[:3], Parameter(torch.zeros(4))
    full, empty = FlatLayout(params, 1, alignment=4), FlatLayout((other,), 1, alignment=4)
    holder, tx = Holder(torch.arange(1.0, 17.0)), transaction()
    place = holder.tensor.data_ptr()
    move = TensorMove(holder.tensor, GroupMoves.plan(full, empty, params[::-1], rank=0, group=None), HostLink(), room)
    move_tensor(tx, "m", move, [], holder.install)
    assert holder.tensor.tolist() == [0] * 4
    assert move.waiting.tolist() == list(range(1, 17))
    if state_moves.HOST == "cpu":
        assert move.waiting.data_ptr() == place
    assert tx.roll_back(MemoryError("later")) == "rank 0: MemoryError: later"
    assert holder.tensor.tolist() == list(range(1, 17))
