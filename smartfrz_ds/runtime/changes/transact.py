"""Runs a change of the engine on every rank or on none; the error shows which of the two happened."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

from smartfrz_ds.backends.transaction import Transaction
from smartfrz_ds.errors import ChangeUndone, FreezeError
from smartfrz_ds.runtime.run_context import RunContext
from smartfrz_ds.telemetry.events import FreezeEvent

T = TypeVar("T")


def transact(run: RunContext, what: str, action: Callable[[Transaction], T], *, layers: Collection[str] = ()) -> T:
    """Run `action` on every rank, or bring every rank back to its previous layout. Collective.

    Args:
        run: The run.
        what: Name of the change, for messages: "freeze", "rebalance".
        action: Changes the engine within the transaction that it is given.
        layers: Names of the layers concerned, for the record.

    Returns:
        The result of `action`.

    Raises:
        ChangeUndone: It failed on some rank and was undone on all; recorded as an event.
        FreezeError: It failed and could not be undone; the engine state is inconsistent.
    """
    tx = Transaction(run.ranks)
    try:
        done = action(tx)
        tx.finish()
        return done
    except Exception as error:
        try:
            why = tx.roll_back(error)
        except Exception as stuck:
            raise failed(run, what, stuck) from error
        text = f"{what} failed and was undone on every rank: {why}"
        names, frozen = run.state.in_order(layers), run.state.frozen_in_order
        run.journal.record(FreezeEvent(kind="undone", step=run.state.step, layers=names, frozen=frozen, message=text))
        raise ChangeUndone(f"{text}. The layout is the previous one, and training can go on") from error
    except BaseException as error:  # an interrupt: the other ranks can't be told in time
        raise failed(run, what, error) from error


def failed(run: RunContext, what: str, error: BaseException) -> FreezeError:
    """Return the error for a change that failed after it had started."""
    last, step = run.last_checkpoint, run.state.step
    way = f"Resume from the last complete checkpoint, {last}" if last else "No checkpoint was saved yet"
    return FreezeError(f"{what} failed at step {step} after it had started; the engine state is inconsistent. {way}: {error}")
