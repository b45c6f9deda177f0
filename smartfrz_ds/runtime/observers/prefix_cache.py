"""The prefix cache as an observer of a run: which layers are its prefix, the store of this host, and whether it pays."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

from smartfrz_ds.cache.prefix_cache import PrefixCache
from smartfrz_ds.cache.tiers import Tiers
from smartfrz_ds.distributed.collectives import Collectives, host_ranks
from smartfrz_ds.distributed.hosts import hosts_of_ranks
from smartfrz_ds.model.activation_checkpointing import RecomputeBoundary
from smartfrz_ds.model.layers import Layer
from smartfrz_ds.runtime.rules.user_frozen import is_user_frozen
from smartfrz_ds.runtime.run_context import RunContext

from .protocol import LayoutChange, StepObserver

_UNSEEN = 5  # steps without a forward of the model
_MOST_EVENTS = 20  # about single classes of batches
_FIRST_REPORT = 100  # forwards; then ten times as many, and so on


class CacheWatch(StepObserver):
    """Skips the forward of a frozen prefix for batches that were seen before.

    A new prefix is taken up in a collective part of a step, because the ranks of a host share one store.

    Args:
        run: The run.
        boundary: Keeps the boundary behind the frozen prefix open for recomputation.
        restore_flags: Switches frozen parameters off again that other code has switched on.

    Raises:
        ValueError: `smartfrz.cache.mode` is "on", and the engine does not allow it.
    """

    def __init__(self, run: RunContext, boundary: RecomputeBoundary, restore_flags: Callable[[], None]) -> None:
        self._restore_flags = restore_flags
        self._run, self._boundary, self._settings = run, boundary, run.config.cache
        self._cache: PrefixCache | None = None
        self._previous: PrefixCache | None = None  # of the prefix before the last change
        self._store: Tiers | None = None
        self._changed = False  # whether the prefix has to be taken up anew
        self._told_off, self._told = False, 0
        self._next_report = _FIRST_REPORT
        self._last: float | None = None
        self._steps = 0  # with the current prefix
        self._past = (0, 0, 0.0)  # forwards, hits and seconds saved with earlier prefixes
        self._removed = False
        run.journal.speaker.cache_note = lambda: self.note
        self._refusal = run.backend.forward_ways.refusal
        self._ranks: Collectives | None = None  # those that must do the same in each forward; made with the store
        if self._refusal and self._settings.mode == "on":
            raise ValueError(f"smartfrz.cache.mode: got 'on', but {self._refusal}; allowed here: 'off' or 'auto'")

    @property
    def note(self) -> str:
        """What the cache has brought, or why it is not used."""
        if self._refusal:
            return f"off: {self._refusal}"
        if self._cache is None:
            return "no frozen layers in front yet" if not self.numbers()[0] else self._brought()
        reasons = [f"off: {self._cache.off}"] if self._cache.off else [f"not used for some batches: {x}" for x in self._cache.remarks]
        return "; ".join([self._brought(), *reasons] if self.numbers()[0] or not reasons else reasons)

    def facts(self) -> dict[str, Any]:
        """Return the fields of the report that begin with "cache_"."""
        forwards, hits, seconds = self.numbers()
        cache = self._cache
        reason = self._refusal if cache is None else cache.off or next(iter(cache.remarks), "")
        return {
            "cache_note": self.note,
            "cache_forwards": forwards,
            "cache_hits": hits,
            "cache_seconds": seconds,
            "cache_reason": reason,
            "cache_row_bytes": 0 if cache is None else cache.row_bytes,
        }

    def numbers(self) -> tuple[int, int, float]:
        """Return the forwards that could have been a hit, those that were one, and the seconds saved."""
        forwards, hits, saved = self._past
        gain = None if self._cache is None else self._cache.gain
        return (forwards, hits, saved) if gain is None else (forwards + gain.forwards, hits + gain.hits, saved + gain.saved)

    def _brought(self) -> str:
        forwards, hits, saved = self.numbers()
        share, seconds = hits / max(1, forwards), round(saved, 1) + 0.0  # not "-0.0"
        said = f"{hits:,} of {forwards:,} forwards skipped the frozen layers ({share:.0%}), {seconds:.1f} s saved"
        store = self._store
        if store is None:
            return said
        said += f", {store.rows:,} rows of {store.nbytes / 2**20:,.1f} MiB on this host"
        return said + (", which has no more room" if store.is_full else "")

    def on_layout_change(self, change: LayoutChange) -> None:
        self._let_go()
        self._changed = True

    def after_change(self, change: LayoutChange) -> None:
        self._take_up()

    def on_layers_changed(self) -> None:
        self._let_go()
        self._changed = True

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reset()

    def reset(self) -> None:
        if self._cache is not None:
            self._cache.suspect()

    def after_step(self) -> None:
        if self._changed:
            self._take_up()
        cache = self._cache
        if cache is None:
            return
        self._steps += 1
        if self._steps == _UNSEEN and self._is_unseen(cache):
            cache.off = cache.off or (
                "no forward of the model was seen that is trained on: it is compiled as a whole, trained in eval mode, or only parts of it "
                "are called"
            )
        now, forwards = perf_counter(), cache.forwards_of_step
        if self._last is not None and forwards and cache.complete_of_step == forwards:
            cache.gain.step(now - self._last, forwards)
        self._last, cache.forwards_of_step, cache.complete_of_step = now, 0, 0
        if not cache.off and self._settings.mode == "auto" and self._store is not None:
            cache.turn_off(cache.gain.objection(self._settings.min_gain, is_full=self._store.is_full))
        if cache.off and not self._told_off:
            self._say_off(cache)
        elif self.numbers()[1] and self.numbers()[0] >= self._next_report:
            self._next_report *= 10
            self._run.journal.cache(self._brought())

    def _is_unseen(self, cache: PrefixCache) -> bool:
        """Whether a rank has seen no forward that is trained on. Collective where the ranks must do the same."""
        seen = cache.trained > 0
        return not seen if self._ranks is None else not all(one for (one,) in self._ranks.gather_integers([seen]))

    def _say_off(self, cache: PrefixCache) -> None:
        self._told_off = True
        cache.remove()
        if cache.is_fault:  # of this rank, perhaps: an error would leave the others waiting, and the run needs no cache
            text = f"prefix cache off on rank {self._run.ranks.rank}: {cache.off}; the run goes on without it"
            self._run.journal.warn(text)
            if self._run.ranks.rank:  # the journal speaks on rank 0 only
                warnings.warn(f"smartfrz: {text}", RuntimeWarning, stacklevel=2)
            return
        if self._settings.mode == "on":
            raise RuntimeError(
                f"smartfrz.cache.mode: got 'on', but the prefix cache can't be used: {cache.off}; allowed here: 'off' or 'auto'"
            )
        if cache.is_damaged:
            self._run.journal.warn(f"prefix cache off: {cache.off}")
        else:
            self._run.journal.cache(f"off: {cache.off}")

    def _take_up(self) -> None:
        """Begin with the current prefix. Collective."""
        self._changed = False
        if self._removed or self._refusal:
            if self._refusal and not self._told_off:
                self._told_off = True
                self._run.journal.cache(f"off: {self._refusal}")
            return
        run = self._run
        depth = next((x.position for x in run.layers if not self._is_frozen(x)), 0)
        prefix, later = run.layers[:depth], run.layers[depth:]
        tops = [module for layer in prefix for module in layer.modules]
        if not tops:
            return
        if self._store is None and not self._open_store():
            return
        assert self._store is not None
        self._told_off, self._last, self._steps = False, None, 0
        self._cache = PrefixCache(
            run.model,
            tops,
            [module for layer in later for module in layer.modules],
            stored=run.backend.stored,
            ways=run.backend.forward_ways,
            ranks=self._ranks,
            restore_flags=self._restore_flags,
            device=run.backend.device,
            store=self._store,
            spot_check=self._settings.spot_check,
            reopen=self._boundary.reopen,
            tell=self._tell,
            shallower=self._previous if self._previous is not None and self._previous.is_part_of(tops) else None,
        )
        self._previous = None
        if self._cache.off:
            self._say_off(self._cache)
        else:
            run.journal.cache(f"on for {prefix[0].name} to {prefix[-1].name}, rows of batches are being stored")

    def _tell(self, text: str) -> None:
        """Record what the cache says of a class of batches; of many classes only the first."""
        self._told += 1
        if self._told <= _MOST_EVENTS:
            self._run.journal.cache(text)
        else:
            self._run.journal.note(f"prefix cache: {text}")

    def _is_frozen(self, layer: Layer) -> bool:
        without = next((p for m in layer.modules for p in m.parameters()), None) is None
        return without or layer.name in self._run.state.frozen or is_user_frozen(layer)

    def _open_store(self) -> bool:
        """Create this host's store, or open that of another rank of it. Collective."""
        run, settings = self._run, self._settings
        hosts = hosts_of_ranks(run.ranks)
        problem, made = "", None
        first_rank = hosts.index(hosts[run.ranks.rank])
        first = first_rank == run.ranks.rank
        if first:
            try:
                made = Tiers.create(settings.memory_bytes, settings.path, settings.disk_bytes)
            except OSError as error:
                problem = f"its store can't be created: {error}"
        addresses = run.ranks.gather_objects(None if made is None else made.address)
        if not first:
            address = addresses[first_rank]
            try:
                made = None if address is None else Tiers.join(*address)
                problem = "the first rank of this host can't create the store" if made is None else ""
            except OSError as error:
                problem = f"the store of this host can't be opened: {error}"
        problem = next((x for x in run.ranks.gather_objects(problem) if x), "")
        if problem:
            if made is not None:
                made.close()
            self._refusal = problem
            if settings.mode == "on":
                raise RuntimeError(f"smartfrz.cache.mode: got 'on', but {problem}; allowed here: 'off' or 'auto'")
            run.journal.cache(f"off: {problem}")
            return False
        self._store = made
        if run.backend.forward_ways.communicates and not run.ranks.alone:
            # on one host without the device, which a copy of its answer would make the host wait for
            self._ranks = host_ranks() if run.ranks.group is None and len(set(hosts)) == 1 else run.ranks
        return True

    def _let_go(self) -> None:
        if self._cache is not None:
            self._past = self.numbers()
            self._cache.remove()
            self._previous = None if self._cache.off else self._cache
            self._cache = None

    def remove(self) -> None:
        self._let_go()
        self._removed = True
        if self._store is not None:
            self._store.close()
            self._store = None
        if self._ranks is not None and self._ranks is not self._run.ranks:
            self._ranks.end()
        self._ranks = None
