"""The few collectives with which ranks compare and exchange small data.

Each costs one collective and one copy to the host, whatever the number of ranks. Only objects of more than about a kilobyte, and
differences between ranks, take a second one.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from smartfrz_ds.errors import RanksDisagree

T = TypeVar("T")

_SIZE = 8  # bytes of a length
_BLOCK = 1024  # bytes of the first exchange of data whose length only its own rank knows


class Collectives:
    """The processes that agree. Every method is collective.

    Args:
        device: The device that the group's backend needs for its tensors (the model's).
        group: Their process group; None: all processes.

    Attributes:
        alone: Whether there is only one process.
        count: Number of processes.
        rank: This process's rank in the group.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self.device, self.group = device, group
        self.count = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        self.alone = self.count == 1
        self._first = 0 if group is None else dist.get_global_rank(group, 0)  # the global rank of rank 0

    def end(self) -> None:
        """Give up the group, which must be one of its own. Not collective."""
        dist.destroy_process_group(self.group)

    def assert_same(self, what: str, about: str) -> None:
        """Compare a text with those of all other ranks.

        Args:
            what: This rank's text.
            about: Name of the subject, plural, for the error.

        Raises:
            RanksDisagree: The texts differ. Raised on every rank, with each rank's digest and the different texts.
        """
        own = hashlib.sha256(what.encode()).digest()
        everyone = self._gathered(own)
        if everyone != own * self.count:
            digests = _parts(everyone, len(own))
            listed = ", ".join(f"rank {r}: {d.hex()[:16]}" for r, d in enumerate(digests))
            texts = self.gather_objects(what)
            told = "; ".join(f"rank {r}: {text}" for r, text in enumerate(texts) if text not in texts[:r])
            raise RanksDisagree(f"the ranks have different {about} ({listed}). This is rank {self.rank}. {told}")

    def raise_if_any_failed(self, problem: str, error: type[Exception]) -> None:
        """Tell all ranks whether this one can continue.

        Args:
            problem: Why this rank cannot continue; "" if it can.
            error: Type of the error that this rank will raise.

        Raises:
            RuntimeError, ValueError: Another rank cannot continue; with its text. A rank with a problem returns, to raise its own error.
        """
        kind = _kind(error) if problem else 0
        kinds = self._gathered(bytes([kind]))
        if not any(kinds):
            return
        problems = self.gather_objects(problem)
        if not problem:
            _raise_problems({rank: (kinds[rank], text) for rank, text in enumerate(problems) if text})

    def run_on_all_ranks(self, action: Callable[[], T]) -> T:
        """Run a local action that can fail, and raise on every rank if it fails on any.

        Args:
            action: Runs on every rank, without collectives.

        Returns:
            This rank's result.

        Raises:
            Exception: The action's own error on a rank where it failed; on all others as in `raise_if_any_failed`.
        """
        try:
            made = action()
        except Exception as error:
            self.raise_if_any_failed(str(error) or type(error).__name__, type(error))
            raise
        self.raise_if_any_failed("", ValueError)
        return made

    def gather_results(self, action: Callable[[], tuple[T, Sequence[int]]], count: int) -> tuple[T, list[tuple[int, ...]]]:
        """Run a local action that can fail, and gather some numbers that it returns; raise on every rank if it fails on any.

        Args:
            action: Runs on every rank, without collectives. Returns this rank's result and its integers, of at most 64 bits.
            count: Number of the integers.

        Returns:
            This rank's result, and the integers of all ranks, by rank.

        Raises:
            Exception: As in `run_on_all_ranks`.
        """
        failure: Exception | None = None
        numbers: Sequence[int] = [0] * count
        try:
            made, numbers = action()
        except Exception as error:
            failure = error
        rows = self.gather_integers([0 if failure is None else _kind(type(failure)), *numbers])
        if any(kind for kind, *_ in rows):
            problems = self.gather_objects("" if failure is None else str(failure) or type(failure).__name__)
            if failure is not None:
                raise failure
            _raise_problems({rank: (rows[rank][0], text) for rank, text in enumerate(problems) if text})
        return made, [row[1:] for row in rows]

    def from_rank0(self, make: Callable[[], Any]) -> Any:
        """Call `make` on rank 0, and return its result on every rank.

        Args:
            make: Returns a JSON-serializable value. Called on rank 0 only.

        Raises:
            ValueError: `make` raised. Raised on every rank, with its text.
        """
        told = b""
        if self.rank == 0:
            try:
                told = json.dumps({"answer": make()}).encode()
            except Exception as error:  # the others wait for an answer
                told = json.dumps({"error": str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"}).encode()
        heard = json.loads(self.broadcast_bytes(told))
        if "error" in heard:
            raise ValueError(heard["error"])
        return heard["answer"]

    def union(self, names: Iterable[str]) -> list[str]:
        """Return the names of all ranks, each once, in the order of the ranks; the same on every rank."""
        return list(dict.fromkeys(name for part in self.gather_objects(list(names)) for name in part))

    def merged(self, names: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Return, for each key, the names of all ranks, each once, in the order of the ranks; the same on every rank."""
        told = self.gather_objects({key: list(some) for key, some in names.items()})
        keys = dict.fromkeys(key for part in told for key in part)
        return {key: list(dict.fromkeys(name for part in told for name in part.get(key, ()))) for key in keys}

    def gather_objects(self, own: Any) -> list[Any]:
        """Return each rank's object (picklable), in the order of the ranks."""
        if self.alone:
            return [own]
        # Not dist.all_gather_object: it uses the process's current device, which may not be the group's before an engine exists.
        data = pickle.dumps(own)
        heads = self.gather_bytes(_head(data))
        longest = max(_length(head) for head in heads)
        rests = self.gather_bytes(data[_BLOCK:].ljust(longest - _BLOCK, b"\0")) if longest > _BLOCK else [b""] * self.count
        return [pickle.loads((head[_SIZE:] + rest)[: _length(head)]) for head, rest in zip(heads, rests, strict=True)]

    def broadcast(self, numbers: Sequence[float]) -> list[float]:
        """Return rank 0's numbers as float64. The count must be the same on every rank."""
        if self.alone:
            return list(numbers)
        tensor = torch.tensor(list(numbers), dtype=torch.float64, device=self.device)
        dist.broadcast(tensor, src=self._first, group=self.group)
        return tensor.tolist()

    def broadcast_bytes(self, data: bytes) -> bytes:
        """Return rank 0's bytes. The arguments of other ranks are ignored."""
        if self.alone:
            return data
        head = self._broadcast(_head(data))
        rest = _length(head) - _BLOCK
        return (head[_SIZE:] + (self._broadcast(data[_BLOCK:].ljust(rest, b"\0")[:rest]) if rest > 0 else b""))[: _length(head)]

    def _broadcast(self, data: bytes) -> bytes:
        """Return rank 0's bytes. The length must be the same on every rank."""
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
        dist.broadcast(buffer, src=self._first, group=self.group)
        return buffer.cpu().numpy().tobytes()

    def gather_integers(self, own: Sequence[int]) -> list[tuple[int, ...]]:
        """Return each rank's integers, of at most 64 bits, by rank. The count must be the same on every rank."""
        row = struct.Struct(f"<{len(own)}q")
        return list(row.iter_unpack(self._gathered(row.pack(*own))))

    def gather_bytes(self, own: bytes) -> list[bytes]:
        """Return each rank's bytes, by rank. The length must be the same on every rank."""
        return _parts(self._gathered(own), len(own)) if own else [own] * self.count

    def _gathered(self, own: bytes) -> bytes:
        """Return the bytes of all ranks, one after the other. One copy to the host, whatever the number of ranks."""
        if self.alone:
            return own
        mine = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(self.device)
        everyone = torch.empty(self.count * len(own), dtype=torch.uint8, device=self.device)
        _all_gather(everyone, mine, self.group)
        return everyone.cpu().numpy().tobytes()

    def mean(self, own: float | Tensor | None) -> float | None:
        """Return the mean over the ranks that have a number; None if no rank has one.

        Args:
            own: This rank's number, or a tensor of one element that was not read yet. None: it has none.
        """
        if self.alone:
            return None if own is None else float(own)
        # Filled and stacked on the device: the only copy is that of the result.
        value = own.detach().to(self.device, torch.float64).view(()) if isinstance(own, Tensor) else self._number(own or 0.0)
        both = torch.stack([value, self._number(float(own is not None))])
        dist.all_reduce(both, group=self.group)
        total, count = both.tolist()
        return total / count if count else None

    def _number(self, value: float) -> Tensor:
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def sum(self, number: int) -> int:
        """Return the sum over all ranks, exact up to 2^53."""
        return int(self.all_reduce_sum([number])[0])

    def all_reduce_min(self, numbers: Sequence[float]) -> list[float]:
        """Return the elementwise minimum over all ranks, in float64. The count must be the same on every rank."""
        return self._reduced(numbers, dist.ReduceOp.MIN)

    def all_reduce_sum(self, numbers: Sequence[float]) -> list[float]:
        """Return the elementwise sum over all ranks, in float64. The count must be the same on every rank."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def _reduced(self, numbers: Sequence[float], how: Any) -> list[float]:
        if self.alone:
            return list(numbers)
        tensor = torch.tensor(list(numbers), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=how, group=self.group)
        return tensor.tolist()


def host_ranks() -> Collectives:
    """Return collectives of all processes in a group of their own that needs no device. Collective.

    Other collectives that are under way delay it neither on the device nor in a queue.
    """
    return Collectives(torch.device("cpu"), dist.new_group(backend="gloo"))


def _all_gather(everyone: Tensor, mine: Tensor, group: dist.ProcessGroup | None) -> None:
    # into one tensor: a list costs a copy for each rank; torch has renamed the function
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everyone, mine, group=group)


def _parts(told: bytes, length: int) -> list[bytes]:
    return [told[begin : begin + length] for begin in range(0, len(told), length)]


def _head(data: bytes) -> bytes:
    """Return the length of the data and its first block, `_SIZE` + `_BLOCK` bytes."""
    return len(data).to_bytes(_SIZE, "little") + data[:_BLOCK].ljust(_BLOCK, b"\0")


def _length(head: bytes) -> int:
    return int.from_bytes(head[:_SIZE], "little")


def _kind(error: type[Exception]) -> int:
    return 2 if issubclass(error, ValueError) else 1


def _raise_problems(problems: Mapping[int, tuple[int, str]]) -> None:
    """Raise one error for those of other ranks, if there are any. problems: kind and text, by rank."""
    if problems:
        told = "; ".join(f"rank {rank} could not go on: {text}" for rank, (_, text) in problems.items())
        raise (ValueError if any(kind == 2 for kind, _ in problems.values()) else RuntimeError)(f"nothing was changed: {told}")
