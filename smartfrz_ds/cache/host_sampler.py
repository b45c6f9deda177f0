"""A sampler that keeps samples on their host, whose ranks share the rows of the prefix cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from hashlib import blake2b

import torch
import torch.distributed as dist
from torch.utils.data import Sampler

from smartfrz_ds.distributed.collectives import Collectives
from smartfrz_ds.distributed.devices import collective_device
from smartfrz_ds.distributed.hosts import hosts_of_ranks


class HostSampler(Sampler[int]):
    """Deal a dataset out to the hosts once, and in each epoch anew to the ranks of each host.

    The prefix cache stores rows on the host that computed them. `DistributedSampler` deals all samples out to all ranks in each epoch, so
    that with H hosts a batch of B rows is complete on its host with a probability of (1/H)^B only. Here each host has a fixed share of the
    dataset, drawn at random with the seed and in proportion to its ranks. In each epoch it is permuted anew and dealt out to the host's
    ranks. All ranks get equally many samples.

    What it costs: a batch has its part from each host's share (stratified sampling), and two samples of different hosts never come on
    the same rank. Shares are random, so gradients have the same expectation. With batch statistics on single ranks, or data of which a
    share is too small to be a fair sample, prefer `DistributedSampler`.

    As with `DistributedSampler`, call `set_epoch` before each epoch. The order depends on the seed, the epoch and the hosts alone, so a run
    that resumes on as many hosts and ranks goes on with `set_epoch(epoch, start=samples)`.

    Args:
        dataset: The dataset, or anything with its length.
        shuffle: Whether each epoch permutes the shares anew.
        seed: The same on all ranks.
        drop_last: Whether samples are left out in each epoch (others in each) so that all ranks get equally many; else some come twice.
        batch_size: None: this rank's samples are returned, for a `DataLoader` that nobody shards further, and for DeepSpeed. The rows of
            a rank's batch: those of all ranks are returned, one batch for each rank in turn, as Accelerate and the Trainer deal batches out
            themselves (with `split_batches: false`). The number of samples of a rank is then a multiple of it.
        hosts: The host of each rank, such as (0, 0, 1, 1). None: all ranks are asked, so all must create the sampler at the same point.
        rank: This process. None: its rank in `torch.distributed`; 0 without a process group.

    Raises:
        ValueError: An argument is out of range, or the dataset has fewer samples than there are ranks.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        batch_size: int | None = None,
        hosts: Sequence[int] | None = None,
        rank: int | None = None,
    ) -> None:
        is_running = dist.is_available() and dist.is_initialized()
        if hosts is None:
            hosts = hosts_of_ranks(Collectives(collective_device())) if is_running else (0,)
        self._hosts = tuple(hosts)
        self._rank = rank if rank is not None else dist.get_rank() if is_running else 0
        ranks, rows = len(self._hosts), len(dataset)
        if not ranks or (is_running and rank is None and ranks != dist.get_world_size()):
            raise ValueError(f"hosts: got {ranks} entries; allowed: one for each of the ranks, or None")
        if not 0 <= self._rank < ranks:
            raise ValueError(f"rank: got {self._rank}; allowed: an integer from 0 to {ranks - 1}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}; allowed: an integer >= 1, or None")
        step = batch_size or 1
        each = rows // ranks // step * step if drop_last else -(-rows // (ranks * step)) * step
        if rows < ranks or not each:
            raise ValueError(f"dataset: got {rows} samples for {ranks} ranks; allowed: at least {ranks * (step if drop_last else 1)}")
        self._each, self._step, self._of_all = each, step, batch_size is not None
        self._shuffle, self._seed, self._epoch, self._start = shuffle, seed, 0, 0
        self._shares = self._deal_out(rows)

    def _deal_out(self, rows: int) -> dict[int, list[int]]:
        """Return each host's samples: as many for each of its ranks as for any other rank, to within one sample a host."""
        order = torch.randperm(rows, generator=self._generator("shares")).tolist() if self._shuffle else list(range(rows))
        shares, before = {}, 0
        for host in dict.fromkeys(self._hosts):
            up_to = before + self._hosts.count(host)
            shares[host] = order[before * rows // len(self._hosts) : up_to * rows // len(self._hosts)]
            before = up_to
        return shares

    def _generator(self, *what: object) -> torch.Generator:
        digest = blake2b(repr((self._seed, *what)).encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest))

    def _of_host(self, host: int) -> list[int]:
        """Return the samples of a host's ranks in this epoch, in turns."""
        share = self._shares[host]
        if self._shuffle:
            share = [share[i] for i in torch.randperm(len(share), generator=self._generator(self._epoch, host)).tolist()]
        wanted = self._each * self._hosts.count(host)
        return (share * -(-wanted // len(share)))[:wanted]

    def _of_rank(self, rank: int) -> list[int]:
        host = self._hosts[rank]
        return self._of_host(host)[self._hosts[:rank].count(host) :: self._hosts.count(host)]

    def __iter__(self) -> Iterator[int]:
        if not self._of_all:
            return iter(self._of_rank(self._rank)[self._start :])
        of_ranks, step = [self._of_rank(rank) for rank in range(len(self._hosts))], self._step
        return iter([i for at in range(self._start, self._each, step) for own in of_ranks for i in own[at : at + step]])

    def __len__(self) -> int:
        return self._each * (len(self._hosts) if self._of_all else 1)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch.

        Args:
            epoch: Its number, >= 0.
            start: Samples of each rank that were used already, for a run that resumes within the epoch; with a `batch_size`, a multiple
                of it.

        Raises:
            ValueError: `start` is out of range.
        """
        if not 0 <= start <= self._each or start % self._step:
            raise ValueError(f"start: got {start}; allowed: a multiple of {self._step} from 0 to {self._each}, the samples of a rank")
        self._epoch, self._start = epoch, start
