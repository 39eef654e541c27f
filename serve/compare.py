"""One comparison: start both arms, warm up, run rounds until precise enough, and make the record.

Plan (arms, workload, stopping rule) -> Run (traces, what was observed) -> Comparison
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from prune2serve.serve import client, preflight, rows
from prune2serve.serve.client import Outcome, Target
from prune2serve.serve.design import ARMS, Arm, Period, StoppingRule, periods_of_round
from prune2serve.serve.endpoint import Endpoint, counters, describe
from prune2serve.serve.environment import environment
from prune2serve.serve.ideal import ModelCost, attribute, ideal_ratios
from prune2serve.serve.metrics import Slo
from prune2serve.serve.workload import Workload, requests_for

from prune2serve.errors import Prune2ServeError
from prune2serve.progress import Task, say, task
from prune2serve.records import Check, Comparison, RequestTrace

if TYPE_CHECKING:
    import aiohttp

WARM_UP_PERIODS = 2


@dataclass(frozen=True)
class Plan:
    """What to compare and how."""

    start: Mapping[Arm, Callable[[], Endpoint]]
    """How to get each arm's endpoint."""
    workload: Workload
    stopping: StoppingRule
    api: str = "completions"
    both_resident: bool = True
    """False: one server at a time, stopped and started at every change of arm."""
    slo: Slo | None = None
    seed: int = 0
    directories: tuple[Path, Path] | None = None
    """Parent's and pruned model directory, where they are known."""
    costs: tuple[ModelCost, ModelCost] | None = None
    allow_unfair: bool = False
    label: str = "Measuring"


@dataclass
class Run:
    """What happened."""

    names: dict[Arm, str] = field(default_factory=dict)
    facts: dict[Arm, dict[str, Any]] = field(default_factory=dict)
    commands: dict[Arm, tuple[str, ...]] = field(default_factory=dict)
    traces: list[RequestTrace] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    counters: dict[Arm, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    stopped: str = ""
    """Why it ended."""


class Pair:
    """The two endpoints, both up or one at a time."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._up: dict[Arm, Endpoint] = {}

    def get(self, arm: Arm) -> tuple[Endpoint, bool]:
        """Return the arm's endpoint, started if need be, and whether it is fresh."""
        if arm in self._up:
            return self._up[arm], False
        if not self._plan.both_resident:
            self.stop()
        self._up[arm] = self._plan.start[arm]()
        self._up[arm].facts = describe(self._up[arm])
        return self._up[arm], True

    def stop(self) -> None:
        for endpoint in self._up.values():
            endpoint.stop()
        self._up.clear()


def run(plan: Plan) -> Run:
    """Run the plan's rounds.

    Raises:
        Prune2ServeError: an endpoint does not start, a fairness check refuses, or the warm-up fails.
    """
    pair = Pair(plan)
    try:
        return asyncio.run(_run(plan, pair))
    finally:
        pair.stop()


async def _run(plan: Plan, pair: Pair) -> Run:
    made = Run()
    load_before, calibration = preflight.other_load(), preflight.calibrate()
    async with client.open_session() as session:
        for arm in ARMS:
            await _ready(plan, pair, arm, session, made)
        if plan.both_resident:
            made.checks += preflight.before(pair.get("baseline")[0], pair.get("candidate")[0], plan.directories)
            _refuse(made.checks, plan.allow_unfair)
        lag = client.LoopLag()
        begun, cpu = time.monotonic(), time.process_time()
        with task(plan.label, None) as bar:
            await _rounds(plan, pair, session, made, bar, lag)
        made.seconds = time.monotonic() - begun
    observed = preflight.Observed(
        calibration_ms=(calibration, preflight.calibrate()),
        load_before=load_before,
        client_cpu_share=(time.process_time() - cpu) / made.seconds,
        loop_lag_p99_ms=float(np.quantile(lag.lags_ms or [0.0], 0.99)),
        counters=made.counters,
        same_server=_same_server(made),
    )
    made.checks += preflight.after(made.traces, observed)
    return made


def _same_server(made: Run) -> bool:
    urls = {facts.get("url") for facts in made.facts.values()}
    return len(urls) == 1


async def _ready(
    plan: Plan, pair: Pair, arm: Arm, session: aiohttp.ClientSession, made: Run
) -> tuple[Endpoint, Target]:
    """Return the arm's endpoint, warmed up if it is fresh."""
    endpoint, fresh = await asyncio.to_thread(pair.get, arm)
    target = Target(endpoint.url, endpoint.name, plan.api, endpoint.key)  # type: ignore[arg-type]
    if not fresh:
        return endpoint, target
    made.names[arm], made.commands[arm] = endpoint.name, endpoint.command
    made.facts[arm] = {"url": endpoint.url, **endpoint.facts}
    for number in range(WARM_UP_PERIODS):
        requests = requests_for(plan.workload, -1 - number, salt=int(arm == "candidate"))
        period = Period(-1, number, arm)
        outcomes = await client.run_period(session, target, requests, plan.workload.arrival.concurrency)
        _keep(made, period, outcomes)
        failed = next((o for o in outcomes if o.error), None)
        if failed:
            raise Prune2ServeError(f"the {arm} at {endpoint.url} failed in the warm-up: {failed.error}")
        if any(o.output_tokens < 2 for o in outcomes):
            raise Prune2ServeError(
                f"the {arm} at {endpoint.url} answered with fewer than two tokens: latencies need at least two; "
                "raise --output-tokens, or use a server that honours ignore_eos"
            )
    return endpoint, target


def _keep(made: Run, period: Period, outcomes: list[Outcome]) -> None:
    shift = period.index // 2 * len(outcomes)
    made.traces += [
        RequestTrace(
            arm=period.arm,
            round=period.round,
            period=period.index,
            prompt=o.prompt + shift,
            scheduled_ns=o.scheduled_ns,
            start_ns=o.start_ns,
            chunk_ns=o.chunk_ns,
            prompt_tokens=o.prompt_tokens,
            output_tokens=o.output_tokens,
            error=o.error,
        )
        for o in outcomes
    ]


async def _rounds(
    plan: Plan, pair: Pair, session: aiohttp.ClientSession, made: Run, bar: Task, lag: client.LoopLag
) -> None:
    """Run rounds until the stopping rule is met."""
    made.stopped = "time limit" if plan.stopping.max_rounds is None else "number of rounds"
    for index in plan.stopping.rounds():
        for period in periods_of_round(index, plan.seed):
            await _period(plan, pair, session, made, period, lag)
        watched = rows.rows_of(made.traces, only=rows.WATCHED, seed=plan.seed)
        widths = [rows.half_width(row) for row in watched]
        known = [width for width in widths if width is not None]
        bar.describe(f"{plan.label}: round {index + 1}" + (f", ±{max(known):.1%}" if known else ""))
        bar.advance()
        if plan.stopping.precise(index + 1, widths):
            made.stopped = "precision reached"
            return


async def _period(
    plan: Plan, pair: Pair, session: aiohttp.ClientSession, made: Run, period: Period, lag: client.LoopLag
) -> None:
    endpoint, target = await _ready(plan, pair, period.arm, session, made)
    salt = int(period.arm == "candidate") if _same_server(made) else 0
    requests = requests_for(plan.workload, period.half_round, salt)
    earlier = await asyncio.to_thread(counters, endpoint)
    async with lag.watching():
        outcomes = await client.run_period(session, target, requests, plan.workload.arrival.concurrency)
    later = await asyncio.to_thread(counters, endpoint)
    _keep(made, period, outcomes)
    growth = made.counters.setdefault(period.arm, {})
    for name, value in later.items():
        growth[name] = growth.get(name, 0.0) + value - earlier.get(name, 0.0)


def _refuse(checks: list[Check], allow_unfair: bool) -> None:
    """Stop before any load is sent if the arms cannot be compared."""
    failed = [check for check in checks if check.status == "failed"]
    if failed and not allow_unfair:
        raise Prune2ServeError(
            f"the arms are not comparable: {failed[0].name}: {failed[0].detail}; "
            "make them alike, or pass --allow-unfair"
        )


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
    comparison = Comparison(
        baseline=made.names.get("baseline", "baseline"),
        candidate=made.names.get("candidate", "candidate"),
        rows=table,
        ideal_ratio=ideal.decode if ideal else None,
        settings=_settings(plan, made, len(a)),
        checks=tuple(made.checks),
        attribution=attribute(ideal, parts["baseline"], parts["candidate"]) if ideal else {},
        noise_floor=floor.rows if floor else (),
        environment=environment(),
        requests=tuple(made.traces),
    )
    return replace(comparison, verdict=verdict(comparison))


def _ideal(plan: Plan, made: Run) -> Any:
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
