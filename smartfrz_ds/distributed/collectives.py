"""The few collectives with which ranks compare and exchange small data. All run over the default process group."""

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


class Collectives:
    """All processes of the run. Every method is collective.

    Args:
        device: The device that the group's backend needs for its tensors (the model's).

    Attributes:
        alone: Whether there is only one process.
        count: Number of processes.
        rank: This process's rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.alone = not dist.is_initialized() or dist.get_world_size() == 1
        self.count = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0

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
        kind = 0 if not problem else 2 if issubclass(error, ValueError) else 1
        kinds = self._gathered(bytes([kind]))
        if not any(kinds):
            return
        problems = self.gather_objects(problem)
        if problem:
            return
        told = "; ".join(f"rank {r} could not go on: {p}" for r, p in enumerate(problems) if p)
        raised = ValueError if 2 in kinds else RuntimeError
        raise raised(f"nothing was changed: {told}")

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
        sizes = [size for (size,) in self.gather_integers([len(data)])]
        padded = self.gather_bytes(data.ljust(max(sizes), b"\0"))
        return [pickle.loads(part[:size]) for part, size in zip(padded, sizes, strict=True)]

    def broadcast(self, numbers: Sequence[float]) -> list[float]:
        """Return rank 0's numbers as float64. The count must be the same on every rank."""
        if self.alone:
            return list(numbers)
        tensor = torch.tensor(list(numbers), dtype=torch.float64, device=self.device)
        dist.broadcast(tensor, src=0)
        return tensor.tolist()

    def broadcast_bytes(self, data: bytes) -> bytes:
        """Return rank 0's bytes. The arguments of other ranks are ignored."""
        if self.alone:
            return data
        count = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        dist.broadcast(count, src=0)
        buffer = torch.empty(int(count.item()), dtype=torch.uint8)
        if self.rank == 0 and data:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        buffer = buffer.to(self.device)
        dist.broadcast(buffer, src=0)
        return buffer.cpu().numpy().tobytes()

    def gather_integers(self, own: Sequence[int]) -> list[tuple[int, ...]]:
        """Return each rank's integers, of at most 64 bits, by rank. The count must be the same on every rank."""
        row = struct.Struct(f"<{len(own)}q")
        return list(row.iter_unpack(self._gathered(row.pack(*own))))

    def gather_bytes(self, own: bytes) -> list[bytes]:
        """Return each rank's bytes, by rank. The length must be the same on every rank."""
        return _parts(self._gathered(own), len(own))

    def _gathered(self, own: bytes) -> bytes:
        """Return the bytes of all ranks, one after the other. One copy to the host, whatever the number of ranks."""
        if self.alone:
            return own
        mine = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(self.device)
        everyone = torch.empty(self.count, len(own), dtype=torch.uint8, device=self.device)
        _all_gather(everyone.view(-1), mine)
        return everyone.cpu().numpy().tobytes()

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
        dist.all_reduce(tensor, op=how)
        return tensor.tolist()


def _all_gather(everyone: Tensor, mine: Tensor) -> None:
    # into one tensor: a list costs a copy for each rank; torch has renamed the function
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everyone, mine)


def _parts(told: bytes, length: int) -> list[bytes]:
    return [told[begin : begin + length] for begin in range(0, len(told), length)]
