"""The store of the prefix cache: rows shared by processes of a host, one writer a row, and what happens when it is full."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smartfrz_ds.cache.keys import describe
from smartfrz_ds.cache.store import Row, RowStore
from smartfrz_ds.cache.tiers import Tiers

SIZE = 200


def keys(numbers: range) -> list[bytes]:
    return [n.to_bytes(16) for n in numbers]


def rows(numbers: range) -> list[Row]:
    return [[memoryview(np.full(150, n % 256, np.uint8)), memoryview(np.full(50, (n + 1) % 256, np.uint8))] for n in numbers]


def empty(count: int) -> list[Row]:
    return [[memoryview(np.zeros(150, np.uint8)), memoryview(np.zeros(50, np.uint8))] for _ in range(count)]


def content(found: list[Row]) -> list[bytes]:
    return [b"".join(bytes(part) for part in row) for row in found]


def insert(store: RowStore, numbers: range, *, evict: bool = True, source: int = 1) -> list[int]:
    return store.insert(keys(numbers), rows(numbers), source, list(range(len(numbers))), evict=evict)


def test_another_process_reads_what_this_one_wrote_and_nothing_is_written_twice() -> None:
    store = RowStore.create(1 << 20)
    assert os.fstat(store.descriptor).st_mode & 0o777 == 0o600
    insert(store, range(10))
    other = RowStore.join(os.getpid(), store.descriptor, store.index)
    insert(other, range(5, 15), source=2)
    assert store.rows == other.rows == 15 and store.nbytes == 15 * SIZE
    found = store.find(keys(range(16)))
    assert found[15] is None and [x.source for x in found[:15] if x] == [1] * 10 + [2] * 5
    assert [x.place for x in found[:15] if x] == [*range(10), *range(5, 10)]
    target = empty(15)
    assert store.read([x for x in found if x], target) and content(target) == content(rows(range(15)))
    other.close()
    store.close()


def test_full_store_lets_go_what_was_used_longest_ago() -> None:
    store = RowStore.create(16 * 256)
    assert insert(store, range(16)) == [] and not store.is_full
    assert insert(store, range(16, 18), evict=False) == [0, 1] and store.is_full and store.evicted == 0
    store.find(keys(range(4)))
    insert(store, range(20, 24))
    found = [n for n, x in enumerate(store.find(keys(range(24)))) if x]
    assert {0, 1, 2, 3, 20, 21, 22, 23} <= set(found) and len(found) == 16 and store.evicted == 4


def test_row_that_is_let_go_while_it_is_read_is_noticed() -> None:
    store = RowStore.create(4 * 256)
    insert(store, range(4))
    found = [x for x in store.find(keys(range(4))) if x]
    insert(store, range(10, 13))
    assert not store.read(found, empty(4))


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 40), st.integers(1, 6)), max_size=40))
@settings(max_examples=60, deadline=None)
def test_two_processes_never_read_another_rows_bytes(calls: list[tuple[int, int, int]]) -> None:
    first = RowStore.create(12 * 256)
    both = [first, RowStore.join(os.getpid(), first.descriptor, first.index)]
    for who, start, count in calls:
        numbers = range(start, start + count)
        insert(both[who], numbers)
        found = both[1 - who].find(keys(numbers))
        there = [(n, x) for n, x in zip(numbers, found, strict=True) if x is not None]
        target = empty(len(there))
        assert both[1 - who].read([x for _, x in there], target)
        assert content(target) == content([rows(range(n, n + 1))[0] for n, _ in there])
    for store in both:
        store.close()


def test_no_space_left_keeps_what_is_there() -> None:
    """A limit on the size of files stands for a full disk: the file can't grow, and the rows that it has stay."""
    program = f"""
import resource, signal, sys
sys.path[:0] = {sys.path!r}
from test_row_store import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = RowStore.create(1 << 30)
insert(store, range(50))
resource.setrlimit(resource.RLIMIT_FSIZE, (9 << 20, 9 << 20))
for start in range(100, 50000, 5000):
    insert(store, range(start, start + 5000), evict=False)
assert store.is_full and (8 << 20) // 256 < store.rows <= (9 << 20) // 256
target = empty(50)
assert store.read(store.find(keys(range(50))), target) and content(target) == content(rows(range(50)))
print("kept", store.rows)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("kept"), done.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize("moment", ["claiming", "claimed"])
def test_writer_that_is_killed_leaves_no_half_row(moment: str) -> None:
    """Between the claim of an entry and the end of its row, the writer dies: nobody sees the row, and the store goes on."""
    store = RowStore.create(1 << 20)
    call = {"claimed": "os.pwritev", "claiming": "np.void"}[moment]
    program = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
from test_row_store import *
store = RowStore.join({os.getpid()}, {store.descriptor}, {store.index})
insert(store, range(3))
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
{call} = die
insert(store, range(3, 6))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = store.find(keys(range(6)))
    assert all(found[:3]) and not any(found[3:])
    insert(store, range(10, 14))
    assert all(store.find(keys(range(10, 14))))


def test_disk_takes_what_memory_has_no_room_for(tmp_path: Path) -> None:
    tiers = Tiers.create(4 * 256, str(tmp_path), 1 << 20)
    numbers = range(10)
    tiers.insert(keys(numbers), rows(numbers))
    found = [x for x in tiers.find(keys(numbers)) if x]
    target = empty(10)
    assert [of for of, _ in found] == [0] * 4 + [1] * 6 and tiers.read(found, target)
    assert content(target) == content(rows(numbers)) and tiers.evicted == 0 and not list(tmp_path.iterdir())
    tiers.close()


def test_keys_differ_where_anything_differs() -> None:
    x = torch.arange(12).view(4, 3)
    mask = torch.ones(4, 3)

    def key(*args: object, state: bytes = b"", **kwargs: object) -> tuple[bytes, ...]:
        batch = describe(args, kwargs, state)
        assert not isinstance(batch, str)
        return batch.keys

    plain = key(x, mask=mask)
    moved = x.clone()
    moved[0, 0], moved[0, 1] = moved[0, 0] + 16, moved[0, 1] - 8  # what a sum of hashes confused
    others = [
        key(x, mask=mask, state=b"other"),
        key(x, mask=mask.bool()),
        key(x, mask=mask.double()),
        key(x.int(), mask=mask),
        key(torch.cat([x, x]), mask=torch.cat([mask, mask])),
        key(x, mask=mask, flag=True),
        key(x, mask=mask, flag=1),
        key(x, other=mask),
        key(x, mask=None),
        key(x, mask=mask, scale=torch.ones(())),
        key(x, mask=mask, scale=torch.zeros(())),
    ]
    assert len({plain[0], *(k[0] for k in others)}) == 1 + len(others)
    assert key(moved, mask=mask)[0] != plain[0] and key(moved, mask=mask)[1:] == plain[1:]
    assert key(x[[2, 0, 1, 3]], mask=mask) == (plain[2], plain[0], plain[1], plain[3])


def test_where_rows_may_be_columns_the_whole_batch_is_the_key() -> None:
    square, vector = torch.arange(9).view(3, 3), torch.arange(3)
    one = describe((square, vector), {}, b"")
    other = describe((square, torch.tensor([0, 1, 5])), {}, b"")
    assert not isinstance(one, str) and not isinstance(other, str)
    assert not set(one.keys) & set(other.keys) and one.kind == other.kind


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((object(),), "is a object, which has no key"),
        ((torch.ones(3, 2, requires_grad=True),), "requires a gradient"),
        ((torch.ones(3, 2).to_sparse(),), "is not a dense tensor"),
        ((1, "a"), "no tensor with rows"),
    ],
)
def test_arguments_without_a_key(arguments: tuple[object, ...], reason: str) -> None:
    assert reason in str(describe(arguments, {}, b""))


_KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from test_row_store import *

store = RowStore.create(12 * 256)
insert(store, range(12))
moment = alive = wrong = 0
while not alive:
    moment += {step}
    leave, stay = os.pipe()
    child = os.fork()
    if not child:
        here = RowStore.join(os.getppid(), store.descriptor, store.index)
        if {grandchild} and not os.fork():  # a worker of a data loader, which has everything that its parent had open
            os.close(stay)
            os.read(leave, 1)  # until the other end is closed
            os._exit(0)
        left = [moment]

        def trace(frame, event, argument):
            if not frame.f_code.co_filename.endswith("store.py"):
                return None
            frame.f_trace_opcodes = True
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        numbers = range(20 * moment, 20 * moment + 5)
        arguments = keys(numbers), rows(numbers), 1, list(range(5))
        sys.settrace(trace)
        here.insert(*arguments, evict=True)
        os._exit(0)
    alive = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    signal.alarm(20)  # a lock of the dead would make this wait indefinitely
    store._seen = -(1 << 20)  # reads the whole index, as a rank does that is far behind
    for first in range(0, 20 * moment + 5, 4000):
        numbers = range(first, min(first + 4000, 20 * moment + 5))
        there = [(n, x) for n, x in zip(numbers, store.find(keys(numbers)), strict=True) if x is not None]
        target = empty(len(there))
        assert store.read([x for _, x in there], target)
        wrong += content(target) != content([rows(range(n, n + 1))[0] for n, _ in there])
    if store.rows == 12 and not any(store.find(keys(range(12)))):
        store.close()
        store = RowStore.create(12 * 256)
        insert(store, range(12))
    signal.alarm(0)
    os.close(leave)
    os.close(stay)
print("moments", moment, "wrong", wrong)
"""


@pytest.mark.parametrize("grandchild", [False, True], ids=["alone", "with-a-worker"])
def test_killed_at_any_moment(grandchild: bool) -> None:
    """A rank is killed at each bytecode instruction of a write that lets older rows go: no row is ever another's, and no lock stays.

    Background: an entry got its new key while it still counted as ready, with the bytes of the row before; and a lock of `flock` is
    inherited by the workers of a data loader, which outlive the rank.
    """
    program = _KILLED.format(path=sys.path, step=151 if grandchild else 11, grandchild=grandchild)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=300)
    assert done.returncode == 0, done.stderr
    said = done.stdout.split()
    assert int(said[1]) > 100 and said[3] == "0", done.stdout


def test_two_runs_in_one_folder_have_files_of_their_own(tmp_path: Path) -> None:
    """For their user only, whatever the umask, and without a name, so that neither finds, overwrites or leaves anything."""
    before = os.umask(0)
    try:
        runs = [Tiers.create(4 * 256, str(tmp_path / "new" / "folder"), 1 << 20) for _ in range(2)]
    finally:
        os.umask(before)
    for number, run in enumerate(runs):
        for descriptor in (d for pair in run.address[1] for d in pair):
            assert os.fstat(descriptor).st_mode & 0o777 == 0o600 and os.fstat(descriptor).st_nlink == 0
            assert not os.get_inheritable(descriptor)
        run.insert(keys(range(10)), rows(range(100 * number, 100 * number + 10)))
    assert not list((tmp_path / "new" / "folder").iterdir())
    for number, run in enumerate(runs):
        found = [x for x in run.find(keys(range(10))) if x]
        target = empty(10)
        assert run.read(found, target) and content(target) == content(rows(range(100 * number, 100 * number + 10)))
        run.close()
