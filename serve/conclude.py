"""From a run to its record: rows, attribution, settings and one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from prune2serve.progress import say
from prune2serve.records import Check, Comparison
from prune2serve.serve import rows
from prune2serve.serve.compare import Plan, Run
from prune2serve.serve.design import ARMS
from prune2serve.serve.environment import environment
from prune2serve.serve.ideal import Ideal, attribute, ideal_ratios


def comparison_of(plan: Plan, made: Run, floor: Comparison | None = None) -> Comparison:
    """Make the record of a run; `floor` is the same design's A/A run."""
    a = rows.by_round(made.traces, "baseline")
    b = rows.by_round(made.traces, "candidate")
    ideal = _ideal(plan, made)
    table = rows.rows_of(
        made.traces,
        slo=plan.slo,
        ideal=ideal,
        floor=rows.noise_floor(floor.rows) if floor else None,
        seed=plan.seed,
    )
    parts = {
        arm: _with_queue(rows.mean_parts(r), made.counters.get(arm, {})) for arm, r in zip(ARMS, (a, b), strict=True)
    }
    by_metric = {row.metric: row.interval for row in table}
    intervals = {"prefill": by_metric.get("mean_ttft"), "decode": by_metric.get("mean_tpot")}
    comparison = Comparison(
        baseline=made.names.get("baseline", "baseline"),
        candidate=made.names.get("candidate", "candidate"),
        rows=table,
        ideal_ratio=ideal.decode if ideal else None,
        settings=_settings(plan, made, len(a)),
        checks=tuple(made.checks),
        attribution=attribute(ideal, *parts.values(), intervals) if ideal else {},
        noise_floor=floor.rows if floor else (),
        environment=environment(),
        requests=tuple(made.traces),
    )
    return replace(comparison, verdict=verdict(comparison))


def _ideal(plan: Plan, made: Run) -> Ideal | None:
    good = [t for t in made.traces if t.round >= 0 and not t.error and t.prompt_tokens]
    if plan.costs is None or not good:
        return None
    return ideal_ratios(
        *plan.costs,
        prompt=sum(t.prompt_tokens or 0 for t in good) / len(good),
        output=sum(t.output_tokens for t in good) / len(good),
        batch=plan.workload.arrival.concurrency or 1,
    )


def _with_queue(parts: dict[str, float], growth: Mapping[str, float]) -> dict[str, float]:
    """Split the server's own mean queue time off the TTFT, where it reports one."""
    count = growth.get("vllm:request_queue_time_seconds_count", 0.0)
    if not count or not parts:
        return parts
    queue = min(growth.get("vllm:request_queue_time_seconds_sum", 0.0) / count * 1e3, parts["prefill"])
    return {"queue": queue, "prefill": parts["prefill"] - queue, "decode": parts["decode"]}


def _settings(plan: Plan, made: Run, num_rounds: int) -> dict[str, Any]:
    workload, stopping = plan.workload, plan.stopping
    return {
        "num_rounds": num_rounds,
        "requests_per_period": workload.num_requests,
        "requests_per_arm": num_rounds * 2 * workload.num_requests,
        "seconds": round(made.seconds, 1),
        "stopped": made.stopped,
        "prompts": workload.source,
        "input_tokens": workload.input.mean if workload.input else None,
        "output_tokens": workload.output.mean,
        "arrival": workload.arrival.kind,
        "concurrency": workload.arrival.concurrency,
        "rate": workload.arrival.rate or None,
        "both_resident": plan.both_resident,
        "precision_target": stopping.precision,
        "time_limit_s": stopping.time_limit_s,
        "seed": plan.seed,
        "slo": {k: v for k, v in vars(plan.slo).items() if v is not None} if plan.slo else None,
        "commands": {arm: list(command) for arm, command in made.commands.items()},
        "endpoints": made.facts,
        "definitions": "TPOT = (E2E - TTFT) / (output tokens - 1); ITL = gaps between chunks, pooled; "
        "throughput = output tokens / wall time of the periods; ratio = candidate / baseline; interval = 95%, "
        "bootstrap over rounds with t quantiles",
    }


def verdict(comparison: Comparison) -> str:
    """Say the result in one sentence."""
    found = {row.metric: row for row in comparison.rows}
    row = found.get("mean_tpot")
    if row is None or row.ratio is None or row.interval is None:
        return "too little was measured for a verdict"
    if row.verdict == "not distinguishable":
        seen = f"; this run would have seen {row.smallest_effect:.1%}" if row.smallest_effect else ""
        return f"time per output token: not distinguishable ({row.ratio:.3f}x){seen}"
    faster = "less" if row.ratio < 1 else "more"
    return (
        f"time per output token: {abs(1 - row.ratio):.1%} {faster} "
        f"(ratio {row.ratio:.3f}, 95% interval {row.interval[0]:.3f} to {row.interval[1]:.3f})"
    )


def note_problems(checks: tuple[Check, ...]) -> None:
    """Say every check that is not in order."""
    for check in checks:
        if check.status in ("warning", "failed"):
            say(f"{check.status}: {check.name}: {check.detail}")
