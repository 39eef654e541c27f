"""From request traces to the table: every metric of both arms with its ratio, interval and verdict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import log

import numpy as np

from prune2serve.records import ComparisonRow, RequestTrace
from prune2serve.serve import metrics, statistics
from prune2serve.serve.ideal import Ideal
from prune2serve.serve.metrics import Slo
from prune2serve.serve.statistics import Estimate, Values

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
WATCHED = ("mean_ttft", "mean_tpot", "output_throughput")
"""Metrics whose precision decides when a run may stop."""


def _one(value: float | None) -> tuple[float, ...]:
    return () if value is None else (value,)


LATENCIES: dict[str, Callable[[RequestTrace], Iterable[float]]] = {
    "ttft": lambda trace: _one(metrics.ttft_ns(trace)),
    "tpot": lambda trace: _one(metrics.tpot_ns(trace)),
    "itl": metrics.itl_ns,
    "e2e": lambda trace: _one(metrics.e2e_ns(trace)),
}
HIGHER_IS_BETTER = ("output_throughput", "request_throughput", "goodput")

ByRound = dict[int, dict[int, list[RequestTrace]]]
"""round -> period -> traces of one arm."""


def by_round(traces: Iterable[RequestTrace], arm: str) -> ByRound:
    """Group one arm's traces, without the warm-up."""
    found: ByRound = defaultdict(lambda: defaultdict(list))
    for trace in traces:
        if trace.arm == arm and trace.round >= 0:
            found[trace.round][trace.period].append(trace)
    return found


def latency_values(rounds: ByRound, name: str) -> Values:
    """Return one latency of one arm in milliseconds, an array a round."""
    take = LATENCIES[name]
    return Values(
        [
            np.array([v for traces in rounds[r].values() for t in traces for v in take(t)], dtype=float)
            / metrics.NS_PER_MS
            for r in sorted(rounds)
        ]
    )


def _rates(rounds: ByRound, amount: Callable[[list[RequestTrace]], float]) -> tuple[np.ndarray, np.ndarray]:
    """Return (amount, wall seconds) of every round; a round's seconds are the sum of its periods'."""
    amounts, seconds = [], []
    for r in sorted(rounds):
        amounts.append(sum(amount(traces) for traces in rounds[r].values()))
        seconds.append(sum(metrics.span_seconds(traces) for traces in rounds[r].values()))
    return np.array(amounts, dtype=float), np.maximum(np.array(seconds), 1e-9)


def rows_of(
    traces: Sequence[RequestTrace],
    *,
    slo: Slo | None = None,
    ideal: Ideal | None = None,
    floor: Mapping[str, float] | None = None,
    seed: int = 0,
    only: Sequence[str] | None = None,
) -> tuple[ComparisonRow, ...]:
    """Compute the rows.

    Args:
        floor: metric -> relative change that the same design saw with one model on both arms; smaller effects
        are
            not called distinguishable, whatever their interval.
        only: the metrics wanted; None for all.
    """
    a, b = by_round(traces, "baseline"), by_round(traces, "candidate")
    weights = statistics.resample_weights(max(len(a), 1), seed)
    estimates = _estimates(a, b, weights, slo, only)
    ideals = _ideals(a, ideal)
    return tuple(
        _row(metric, unit, found, ideals, (floor or {}).get(metric)) for metric, (unit, found) in estimates.items()
    )


def _estimates(
    a: ByRound, b: ByRound, weights: np.ndarray, slo: Slo | None, only: Sequence[str] | None
) -> dict[str, tuple[str, Estimate | None]]:
    found: dict[str, tuple[str, Estimate | None]] = {}

    def wanted(name: str) -> bool:
        return only is None or name in only

    for latency in LATENCIES:
        if not any(wanted(f"{kind}_{latency}") for kind in ("mean", *QUANTILES)):
            continue
        x, y = latency_values(a, latency), latency_values(b, latency)
        if wanted(f"mean_{latency}"):
            found[f"mean_{latency}"] = ("ms", statistics.compare_means(x, y, weights))
        for name, q in QUANTILES.items():
            if wanted(f"{name}_{latency}"):
                found[f"{name}_{latency}"] = ("ms", statistics.compare_quantiles(x, y, q, weights))
    rates: dict[str, tuple[str, Callable[[list[RequestTrace]], float]]] = {
        "output_throughput": ("tok/s", metrics.output_tokens),
        "request_throughput": ("req/s", lambda traces: sum(t.error is None for t in traces)),
    }
    if slo is not None:
        rates["goodput"] = ("req/s", lambda traces: metrics.num_good(traces, slo))
    for name, (unit, amount) in rates.items():
        if wanted(name):
            found[name] = (unit, statistics.compare_rates(_rates(a, amount), _rates(b, amount), weights))
    return found


def mean_parts(rounds: ByRound) -> dict[str, float]:
    """Return the mean TTFT (`prefill`) and mean E2E - TTFT (`decode`) of one arm in ms; empty without
    requests."""
    traces = [t for periods in rounds.values() for traces in periods.values() for t in traces]
    good = [t for t in traces if metrics.has_latency(t)]
    if not good:
        return {}
    first = sum(t.chunk_ns[0] - t.start_ns for t in good) / len(good) / metrics.NS_PER_MS
    rest = sum(t.chunk_ns[-1] - t.chunk_ns[0] for t in good) / len(good) / metrics.NS_PER_MS
    return {"prefill": first, "decode": rest}


def _ideals(baseline: ByRound, ideal: Ideal | None) -> dict[str, float]:
    """Return the ideal ratio of every kind of metric: the last word of a metric's name -> ratio."""
    parts = mean_parts(baseline)
    if ideal is None or not parts:
        return {}
    whole = ideal.end_to_end(parts["prefill"] / (parts["prefill"] + parts["decode"]))
    ideals = {"ttft": ideal.prefill, "tpot": ideal.decode, "itl": ideal.decode, "e2e": whole}
    return ideals | {"throughput": 1 / whole}


def _row(
    metric: str, unit: str, found: Estimate | None, ideals: Mapping[str, float], floor: float | None
) -> ComparisonRow:
    row = ComparisonRow(metric, unit, None, None, None, ideal_ratio=ideals.get(metric.rpartition("_")[2]))
    if found is None:
        return row
    return replace(
        row,
        baseline=found.baseline,
        candidate=found.candidate,
        ratio=found.ratio,
        interval=found.interval,
        difference=found.difference,
        difference_interval=found.difference_interval,
        smallest_effect=found.smallest_effect,
        verdict=_verdict(metric, found, floor),
    )


def _verdict(metric: str, found: Estimate, floor: float | None) -> str | None:  # type: ignore[return]
    if found.interval is None:
        return None
    below_floor = floor is not None and abs(log(found.ratio)) <= log(1 + floor)
    if found.interval[0] <= 1 <= found.interval[1] or below_floor:
        return "not distinguishable"
    return "better" if (found.ratio > 1) == (metric in HIGHER_IS_BETTER) else "worse"


def noise_floor(rows: Iterable[ComparisonRow]) -> dict[str, float]:
    """Return, per metric, the largest relative change that an A/A run's interval still allows."""
    return {
        row.metric: float(np.exp(max(abs(log(bound)) for bound in row.interval)) - 1)
        for row in rows
        if row.interval is not None
    }


def half_width(row: ComparisonRow) -> float | None:
    """Half the width of the ratio's interval, relative to the ratio."""
    if row.interval is None or not row.ratio:
        return None
    return (row.interval[1] - row.interval[0]) / 2 / row.ratio
