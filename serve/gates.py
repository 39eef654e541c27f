"""Conditions on a comparison that fail a command: `--fail-if 'p95_ttft_ratio > 0.9'`.

A condition on a ratio or a difference is judged on the bound of its 95% interval, not on the point: it fails
unless the interval rules it out. With `> 0.9` the upper bound must stay at or below 0.9. So noise can fail a
good build, and the answer is a longer run; it cannot pass a bad one more often than the interval's 2.5%.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prune2serve.errors import GateFailedError, Prune2ServeError, near_match
from prune2serve.records import Comparison, ComparisonRow

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
FIELDS = ("ratio", "difference", "baseline", "candidate")
PATTERN = re.compile(rf"\s*([a-z0-9_]+?)_({'|'.join(FIELDS)})\s*(>=|<=|>|<)\s*([-+0-9.eE]+)\s*")


@dataclass(frozen=True)
class Condition:
    """Something that must not hold."""

    text: str
    metric: str
    field: str
    comparison: str
    limit: float


def parse(text: str) -> Condition:
    """Read a condition. Raises Prune2ServeError with the form expected."""
    found = PATTERN.fullmatch(text)
    try:
        limit = float(found[4]) if found else None
    except ValueError:
        limit = None
    if found is None or limit is None:
        raise Prune2ServeError(
            f"--fail-if has {text!r}; expected METRIC_FIELD OPERATOR NUMBER such as 'p95_ttft_ratio > 0.9', "
            f"with a field of {', '.join(FIELDS)} and an operator of {', '.join(OPERATORS)}"
        )
    return Condition(text.strip(), found[1], found[2], found[3], limit)


def check(conditions: Sequence[Condition], comparison: Comparison) -> None:
    """Raise GateFailedError if a condition holds or cannot be ruled out.

    Raises:
        Prune2ServeError: a condition names an unknown metric.
        GateFailedError: with every condition that failed and the values.
    """
    rows = {row.metric: row for row in comparison.rows}
    for condition in conditions:
        if condition.metric not in rows:
            hint = near_match(condition.metric, rows) or f"; known are {', '.join(rows)}"
            raise Prune2ServeError(f"--fail-if {condition.text!r}: no metric {condition.metric!r}{hint}")
    failed = [why for c in conditions if (why := failure(c, rows[c.metric]))]
    if failed:
        raise GateFailedError("; ".join(failed))


def failure(condition: Condition, row: ComparisonRow) -> str | None:
    """Say why a condition fails the gate, or None if it is ruled out."""
    point = getattr(row, condition.field)
    if point is None:
        return f"{condition.text}: {condition.metric} has no value"
    interval = {"ratio": row.interval, "difference": row.difference_interval}.get(condition.field)
    if interval is None and condition.field in ("ratio", "difference"):
        return f"{condition.text}: {condition.field} is {point:.4g}, but too little was measured for an interval"
    low, high = interval or (point, point)
    bound = high if condition.comparison in (">", ">=") else low
    if not OPERATORS[condition.comparison](bound, condition.limit):
        return None
    interval_text = f" (95% interval {low:.4g} to {high:.4g})" if interval else ""
    return f"{condition.text}: {condition.metric}'s {condition.field} is {point:.4g}{interval_text}"
