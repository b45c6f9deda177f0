"""The matched run as the judge: full training that was shortened to the cost of a freezing run, against that run.

Every difference is paired: same task, seed, initial weights and order of batches. Several tasks count the same each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, variance
from typing import NamedTuple

from .curves import Row
from .files import FULL, MATCHED, MATCHED_TIME

LEVEL = 0.05  # 1 minus the confidence of an interval; the error rate of a family of tests


class Interval(NamedTuple):
    """Mean (NaN without values), its 95 % interval (NaN where it cannot be computed), standard error and number of values."""

    mean: float
    low: float
    high: float
    error: float
    n: int


class Pair(NamedTuple):
    """A freezing run, full training, and the matched run: full training itself where nothing was saved."""

    run: Row
    full: Row
    matched: Row

    @property
    def metric(self) -> float:
        """Metric of the freezing run minus that of the matched run."""
        return self.run.metric - self.matched.metric

    @property
    def loss(self) -> float:
        """Loss of the freezing run minus that of the matched run, as a fraction of the loss of full training."""
        return (self.run.loss - self.matched.loss) / self.full.loss


def pairs(rows: Iterable[Row], entry: str, label: str, judge: str = MATCHED) -> dict[str, list[Pair]]:
    """Pair the runs of a setting with their matched runs.

    Args:
        rows: All runs.
        entry: The policy's entry.
        label: Its setting.
        judge: "matched" or "matched-time".

    Returns:
        Pairs by task, without runs whose matched run does not exist yet.
    """
    rows = list(rows)
    full = {(r.task, r.seed): r for r in rows if r.entry == FULL}
    shorter = {(r.task, r.seed, r.steps): r for r in rows if r.entry == judge}
    found: dict[str, list[Pair]] = {}
    for r in rows:
        steps = r.matched_time_steps if judge == MATCHED_TIME else r.matched_steps
        whole = full.get((r.task, r.seed))
        if (r.entry, r.label) != (entry, label) or steps is None or whole is None:
            continue
        matched = whole if steps == whole.steps else shorter.get((r.task, r.seed, steps))
        if matched is not None:
            found.setdefault(r.task, []).append(Pair(r, whole, matched))
    return found


def interval(values: Sequence[float]) -> Interval:
    """Compute the mean of independent values and Student's interval for it."""
    return over_groups([values])


def over_groups(groups: Iterable[Sequence[float]]) -> Interval:
    """Compute the mean of the groups' means, and its interval with the degrees of freedom of Welch and Satterthwaite.

    Empty groups are left out; n counts groups. A single group has its own number of values.
    """
    seen = [list(g) for g in groups if len(g)]
    if not seen:
        return Interval(math.nan, math.nan, math.nan, math.nan, 0)
    middle, n = mean(mean(g) for g in seen), len(seen) if len(seen) > 1 else len(seen[0])
    if any(len(g) < 2 for g in seen):
        return Interval(middle, math.nan, math.nan, math.nan, n)
    parts = [variance(g) / len(g) / len(seen) ** 2 for g in seen]
    error = math.sqrt(sum(parts))
    if error == 0:  # all differences of each group are equal: 0 where nothing froze; else too few, or answers that are too coarse
        edge = 0.0 if middle == 0 else math.nan
        return Interval(middle, edge, edge, 0.0, n)
    freedom = sum(parts) ** 2 / sum(part**2 / (len(g) - 1) for part, g in zip(parts, seen, strict=True))
    reach = error * _t_quantile(1 - LEVEL / 2, freedom)
    return Interval(middle, middle - reach, middle + reach, error, n)


def p_value(values: Sequence[float]) -> float:
    """Test whether the mean of paired differences is 0: two-sided, Student; where all are equal, by their signs. NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    from scipy import stats

    error = math.sqrt(variance(values) / len(values))
    if error == 0:  # of the 2^n assignments of signs, two are as extreme
        return 1.0 if values[0] == 0 else 2.0 ** (1 - len(values))
    return float(2 * stats.t.sf(abs(mean(values)) / error, len(values) - 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values of a family of tests with Holm's method. NaN values are not part of the family."""
    known = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    adjusted, highest = {}, 0.0
    for rank, (p, name) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        adjusted[name] = highest
    return {name: adjusted.get(name, math.nan) for name in p_values}


def verdicts(differences: Mapping[str, Sequence[float]]) -> tuple[list[str], list[str]]:
    """Return the tasks on which the differences are above and below 0 at the family's error rate, with Holm's correction."""
    adjusted = holm({task: p_value(values) for task, values in differences.items()})
    clear = [task for task, p in adjusted.items() if p <= LEVEL]
    return [t for t in clear if mean(differences[t]) > 0], [t for t in clear if mean(differences[t]) < 0]


def _t_quantile(probability: float, freedom: float) -> float:
    from scipy import stats

    return float(stats.t.ppf(probability, freedom))
