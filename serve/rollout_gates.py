"""When a rollout stops by itself: an Argo Rollouts AnalysisTemplate over the endpoints' own metrics."""

from __future__ import annotations

import math
from typing import Any

from prune2serve.records import Comparison
from prune2serve.serve.rollout_settings import Arm, RolloutSettings, metadata

MARGIN = 1.1
"""Without a measured comparison, the build may be this much slower than its parent before a rollout stops."""

GATES = {
    "ttft_p95": ("vllm:time_to_first_token_seconds", "ttft"),
    "tpot_p95": ("vllm:request_time_per_output_token_seconds", "tpot"),
}
"""Argo metric -> the histogram behind it, and how the comparison's metrics of that kind begin."""


def argo_analysis(settings: RolloutSettings, comparison: Comparison | None = None) -> Any:
    """Argo Rollouts: stops when the build is slower than measured allows, or when its requests fail."""
    metrics = [
        _latency_gate(settings, name, histogram, threshold(comparison, kind))
        for name, (histogram, kind) in GATES.items()
    ]
    metrics.append(_error_gate(settings))
    return {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "AnalysisTemplate",
        "metadata": metadata(settings, "gate"),
        "spec": {"metrics": metrics},
    }


def threshold(comparison: Comparison | None, kind: str) -> float:
    """The largest allowed ratio, candidate to baseline, of the latencies whose metric begins with `kind`.

    From a measured comparison: the upper end of the p95's (else any such metric's) interval, or its ratio where it
    has none, and a tenth on top for what changes between machines. Without one: MARGIN.
    """
    rows = [row for row in comparison.rows if row.metric.startswith(kind)] if comparison is not None else []
    rows.sort(key=lambda row: "p95" not in row.metric)
    for row in rows:
        upper = row.interval[1] if row.interval is not None else row.ratio
        if upper is not None and math.isfinite(upper):
            return round(upper * MARGIN, 3)
    return MARGIN


def _latency_gate(settings: RolloutSettings, name: str, histogram: str, allowed: float) -> dict[str, Any]:
    def quantile(arm: Arm) -> str:
        rate = f'sum by (le) (rate({histogram}_bucket{{model_name="{arm.name}"}}[5m]))'
        return f"histogram_quantile(0.95, {rate})"

    query = f"{quantile(settings.candidate)} / {quantile(settings.baseline)}"
    return _gate(settings, name, query, f"result[0] <= {allowed}")


def _error_gate(settings: RolloutSettings) -> dict[str, Any]:
    counter = f'vllm:request_success_total{{model_name="{settings.candidate.name}"'
    failed = f'sum(increase({counter},finished_reason="error"}}[5m])) or vector(0)'
    query = f"({failed}) / clamp_min(sum(increase({counter}}}[5m])), 1)"
    return _gate(settings, "error_rate", query, "result[0] <= 0.01")


def _gate(settings: RolloutSettings, name: str, query: str, condition: str) -> dict[str, Any]:
    # Without traffic there is no value: neither a success nor a failure.
    condition = f"len(result) == 0 || isNaN(result[0]) || {condition}"
    return {
        "name": name.replace("_", "-"),
        "interval": "1m",
        "count": 10,
        "failureLimit": 2,
        "successCondition": condition,
        "provider": {"prometheus": {"address": settings.prometheus, "query": query}},
    }
