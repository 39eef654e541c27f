"""Named checks that a comparison is fair: what would otherwise be mistaken for the effect of pruning.

`before` compares the two arms before any load, and may refuse; `after` looks at what the run saw. Each check
is one `Check` with the values seen. "skipped" means that the endpoints do not say, not that all is well.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prune2serve.records import Check, RequestTrace
from prune2serve.serve import metrics
from prune2serve.serve.design import ARMS
from prune2serve.serve.endpoint import Endpoint

MAX_DRIFT = 0.05
MAX_LAG_SHARE = 0.1
"""Of the mean time per output token: a client later than that times itself."""
MAX_CLIENT_CPU = 0.8
MAX_CACHE_DIFFERENCE = 0.01
DTYPE_FIELDS = ("dtype", "torch_dtype", "quantization_config", "vocab_size", "hidden_size", "num_attention_heads")


def same(name: str, what: str, a: Any, b: Any) -> Check:
    """Check that two values are equal; skipped when neither or only one is known."""
    if a is None or b is None:
        return Check(name, "skipped", f"{what}: {'neither arm says' if a is b else 'one arm does not say'}")
    if a == b:
        return Check(name, "ok", f"{what}: {a} on both")
    return Check(name, "failed", f"{what}: {a} on the baseline, {b} on the candidate")


def before(a: Mapping[str, Any], b: Mapping[str, Any], directories: tuple[Path, Path] | None) -> list[Check]:
    """Compare what the endpoints say of themselves (`endpoint.describe`), and the model directories, if any."""
    return [
        same("engine", "engine, precision and slots", a.get("engine"), b.get("engine")),
        same("engine version", "version", a.get("version"), b.get("version")),
        same("context length", "max_model_len", a.get("max_model_len"), b.get("max_model_len")),
        same("KV budget", "KV cache", a.get("kv_cache"), b.get("kv_cache")),
        _precision(directories),
    ]


def _precision(directories: tuple[Path, Path] | None) -> Check:
    name = "dtype and quantisation"
    if directories is None:
        return Check(name, "skipped", "the arms are URLs: their weights cannot be seen")
    configs = [json.loads((directory / "config.json").read_text()) for directory in directories]
    for field in DTYPE_FIELDS:
        x, y = (config.get(field) for config in configs)
        if x is not None and y is not None and x != y:
            return Check(name, "failed", f"{field}: {x} in the parent, {y} in the pruned model")
    dtype = configs[1].get("dtype") or configs[1].get("torch_dtype") or "unstated"
    return Check(name, "ok", f"{dtype} weights, the same widths and no difference in quantisation")


def threads(a: Endpoint, b: Endpoint) -> Check:
    """Compare the cores and threads of two servers that were started here and are both up."""
    name = "threads and devices"
    if a.process is None or b.process is None:
        return Check(name, "skipped", "the arms were not started here")
    import psutil

    seen = []
    for endpoint in (a, b):
        assert endpoint.process is not None
        process = psutil.Process(endpoint.process.pid)
        seen.append((len(process.cpu_affinity()), process.num_threads()))
    (cores_a, threads_a), (cores_b, threads_b) = seen
    if cores_a != cores_b:
        return Check(name, "failed", f"{cores_a} cores for the baseline, {cores_b} for the candidate")
    if abs(threads_a - threads_b) > 2:
        return Check(name, "warning", f"{threads_a} threads in the baseline, {threads_b} in the candidate")
    return Check(name, "ok", f"{cores_a} cores each, {threads_a} and {threads_b} threads")


@dataclass(frozen=True)
class Observed:
    """What one run saw beside the requests."""

    calibration_ms: tuple[float, float]
    """A fixed piece of arithmetic, before and after."""
    load_before: float
    """Share of the machine that other processes used before the run, 0 to 1."""
    client_cpu_share: float
    """CPU seconds of the client per wall second."""
    loop_lag_p99_ms: float
    counters: Mapping[str, Mapping[str, float]]
    """Arm -> growth of the server's counters during the measured rounds."""
    same_server: bool


def calibrate(repeats: int = 7) -> float:
    """Return the milliseconds of a fixed piece of arithmetic (median): it shows heat and other load."""
    matrix = np.full((256, 256), 0.5, dtype=np.float32)
    times = []
    for _ in range(repeats):
        begun = time.perf_counter_ns()
        for _ in range(20):
            matrix = matrix @ matrix
            matrix /= matrix.max()
        times.append((time.perf_counter_ns() - begun) / 1e6)
    return float(np.median(times))


def other_load(seconds: float = 0.5) -> float:
    """Return the share of the machine's CPU in use while we wait."""
    import psutil

    return float(psutil.cpu_percent(interval=seconds)) / 100


def after(traces: Sequence[RequestTrace], observed: Observed) -> list[Check]:
    """Judge the run."""
    measured = [t for t in traces if t.round >= 0]
    arms = {arm: [t for t in measured if t.arm == arm] for arm in ("baseline", "candidate")}
    return [
        _failures(arms),
        _tokens(arms),
        _prefix_cache(observed),
        _drift(observed),
        _load(observed),
        _client(measured, observed),
        _schedule(measured),
    ]


def _failures(arms: Mapping[str, list[RequestTrace]]) -> Check:
    failed = {arm: [t for t in traces if t.error] for arm, traces in arms.items()}
    if not any(failed.values()):
        return Check("failures", "ok", f"all {sum(map(len, arms.values()))} requests succeeded")
    reason = next(t.error for traces in failed.values() for t in traces)
    counts = " and ".join(f"{len(failed[arm])} of {len(arms[arm])} on the {arm}" for arm in arms)
    worst = max(len(failed[arm]) / max(len(arms[arm]), 1) for arm in arms)
    return Check("failures", "failed" if worst > 0.05 else "warning", f"failed: {counts}; first reason: {reason}")


def _tokens(arms: Mapping[str, list[RequestTrace]]) -> Check:
    name = "same tokens"
    totals = {
        arm: (
            sum(t.prompt_tokens or 0 for t in traces if not t.error),
            sum(t.output_tokens for t in traces if not t.error),
        )
        for arm, traces in arms.items()
    }
    a, b = totals["baseline"], totals["candidate"]
    if a == b:
        return Check(name, "ok", f"{a[0]} prompt and {a[1]} output tokens on each arm")
    detail = f"{a[0]} prompt and {a[1]} output tokens on the baseline, {b[0]} and {b[1]} on the candidate"
    apart = max(abs(x - y) / max(x, y, 1) for x, y in zip(a, b, strict=True))
    return Check(name, "warning" if apart < 0.01 else "failed", f"{detail}: is ignore_eos honoured?")


def _prefix_cache(observed: Observed) -> Check:
    name = "prefix cache"
    rates = {}
    for arm in ARMS:
        counters = observed.counters.get(arm, {})
        queries = _counter(counters, "vllm:prefix_cache_queries")
        if not queries:
            return Check(name, "skipped", "an endpoint counts no prefix cache queries")
        rates[arm] = (_counter(counters, "vllm:prefix_cache_hits") or 0.0) / queries
    detail = f"hit rate {rates['baseline']:.1%} on the baseline, {rates['candidate']:.1%} on the candidate"
    apart = abs(rates["baseline"] - rates["candidate"]) > MAX_CACHE_DIFFERENCE
    return Check(name, "warning" if apart else "ok", detail)


def _counter(counters: Mapping[str, float], name: str) -> float | None:
    return counters.get(f"{name}_total", counters.get(name))


def _drift(observed: Observed) -> Check:
    first, last = observed.calibration_ms
    detail = f"a fixed calculation took {first:.1f} ms before and {last:.1f} ms after ({last / first - 1:+.1%})"
    return Check("drift", "ok" if abs(last / first - 1) <= MAX_DRIFT else "warning", detail)


def _load(observed: Observed) -> Check:
    detail = f"{observed.load_before:.0%} of the CPU was in use before the run"
    return Check("other load", "ok" if observed.load_before <= 0.2 else "warning", detail)


def _client(measured: Sequence[RequestTrace], observed: Observed) -> Check:
    name = "client not the bottleneck"
    tpots = [t for t in map(metrics.tpot_ns, measured) if t is not None]
    detail = (
        f"the client used {observed.client_cpu_share:.0%} of a core and woke up late by "
        f"{observed.loop_lag_p99_ms:.2f} ms (p99)"
    )
    if observed.client_cpu_share > MAX_CLIENT_CPU:
        return Check(name, "failed", f"{detail}: it limits the load; ask for less, or use another machine")
    if tpots and observed.loop_lag_p99_ms > MAX_LAG_SHARE * float(np.mean(tpots)) / metrics.NS_PER_MS:
        return Check(name, "warning", f"{detail}: more than {MAX_LAG_SHARE:.0%} of the time per output token")
    return Check(name, "ok", detail)


def _schedule(measured: Sequence[RequestTrace]) -> Check:
    name = "arrival schedule"
    late = [(t.start_ns - t.scheduled_ns) / metrics.NS_PER_MS for t in measured]
    if not any(late):
        return Check(name, "ok", "closed loop: each request follows an answer")
    p99 = float(np.quantile(late, 0.99))
    detail = f"requests went out {p99:.1f} ms late (p99)"
    return Check(name, "ok" if p99 < 10 else "warning", detail)
