"""One comparison: start both arms, warm up, run rounds until precise enough, and make the record.

Plan (arms, workload, stopping rule) -> Run (traces, what was observed) -> Comparison
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prune2serve.errors import Prune2ServeError
from prune2serve.progress import Task, task
from prune2serve.records import Check, RequestTrace
from prune2serve.serve import client, preflight, rows
from prune2serve.serve.client import Outcome, Target
from prune2serve.serve.design import ARMS, CONFIRMING_ROUNDS, Arm, Period, StoppingRule, periods_of_round
from prune2serve.serve.endpoint import Endpoint, counters, describe
from prune2serve.serve.ideal import ModelCost
from prune2serve.serve.metrics import Slo
from prune2serve.serve.workload import Workload, requests_for

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
        self.warm: set[Arm] = set()
        """Arms whose server has answered the warm-up."""

    def get(self, arm: Arm) -> Endpoint:
        """Return the arm's endpoint, started if need be. Blocks, but only when no request is in flight."""
        if arm not in self._up:
            if not self._plan.both_resident:
                self.stop()
            self._up[arm] = self._plan.start[arm]()
            self._up[arm].facts = describe(self._up[arm])
        return self._up[arm]

    def stop(self) -> None:
        for endpoint in self._up.values():
            endpoint.stop()
        self._up.clear()
        self.warm.clear()


def run(plan: Plan) -> Run:
    """Run the plan's rounds.

    Raises:
        Prune2ServeError: an endpoint does not start, a fairness check refuses, or the warm-up fails.
    """
    pair = Pair(plan)
    with stopped_by_sigterm():
        try:
            # Outside the event loop, which would hold back a Ctrl-C until a long export is done.
            for arm in ARMS if plan.both_resident else ARMS[:1]:
                pair.get(arm)
            return asyncio.run(_run(plan, pair))
        finally:
            pair.stop()


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the run as an exception does, so that the servers are stopped too."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


async def _run(plan: Plan, pair: Pair) -> Run:
    made = Run()
    load_before, calibration = preflight.other_load(), preflight.calibrate()
    async with client.open_session() as session:
        for arm in ARMS:
            await _ready(plan, pair, arm, session, made)
        made.checks += preflight.before(made.facts["baseline"], made.facts["candidate"], plan.directories)
        if plan.both_resident:
            made.checks.append(preflight.threads(pair.get("baseline"), pair.get("candidate")))
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
    """True when both arms are one running endpoint, whose cache the second arm would find warm."""
    urls = {facts.get("url") for facts in made.facts.values()}
    return len(urls) == 1 and not any(made.commands.values())


async def _ready(
    plan: Plan, pair: Pair, arm: Arm, session: aiohttp.ClientSession, made: Run
) -> tuple[Endpoint, Target]:
    """Return the arm's endpoint, warmed up if it is fresh."""
    endpoint = pair.get(arm)
    target = Target(endpoint.url, endpoint.name, plan.api, endpoint.key)  # type: ignore[arg-type]
    if arm in pair.warm:
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
    pair.warm.add(arm)
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
    remaining: int | None = None
    for index in plan.stopping.rounds():
        for period in periods_of_round(index, plan.seed):
            await _period(plan, pair, session, made, period, lag)
        watched = rows.rows_of(made.traces, only=rows.WATCHED, seed=plan.seed)
        widths = [rows.half_width(row) for row in watched]
        known = [width for width in widths if width is not None]
        bar.describe(f"{plan.label}: round {index + 1}" + (f", ±{max(known):.1%}" if known else ""))
        bar.advance()
        if remaining is not None:
            remaining -= 1
        elif plan.stopping.precise(index + 1, widths):
            remaining = CONFIRMING_ROUNDS
        if remaining == 0:
            made.stopped = "precision reached"
            return


async def _period(
    plan: Plan, pair: Pair, session: aiohttp.ClientSession, made: Run, period: Period, lag: client.LoopLag
) -> None:
    endpoint, target = await _ready(plan, pair, period.arm, session, made)
    salt = int(period.arm == "candidate") if _same_server(made) else 0
    requests = requests_for(plan.workload, period.half_round, salt)
    earlier = counters(endpoint)
    async with lag.watching():
        outcomes = await client.run_period(session, target, requests, plan.workload.arrival.concurrency)
    later = counters(endpoint)
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
