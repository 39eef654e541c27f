"""Result files of other tools: `vllm bench serve` and guidellm, written from a comparison and read for one.

Their formulas are not all ours. vLLM's are: TPOT = (E2E - TTFT) / (output tokens - 1), ITL pooled, throughput = tokens
/ whole wall time. guidellm's `time_per_output_token_ms` divides the whole latency by all output tokens, and its
`inter_token_latency_ms` is the mean gap of each request, which is our TPOT.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prune2serve.errors import Prune2ServeError
from prune2serve.records import Comparison, RequestTrace
from prune2serve.serve import metrics

PERCENTILES = (50, 90, 95, 99)


def export(comparison: Comparison, directory: Path, tool: str) -> list[Path]:
    """Write one file an arm, named TOOL-ARM.json, and return the paths."""
    written = []
    for arm, name in (("baseline", comparison.baseline), ("candidate", comparison.candidate)):
        traces = [t for t in comparison.requests if t.arm == arm and t.round >= 0]
        made = to_vllm(traces, name) if tool == "vllm" else to_guidellm(traces, name)
        path = directory / f"{tool}-{arm}.json"
        path.write_text(json.dumps(made, indent=2))
        written.append(path)
    return written


def wall_seconds(traces: Sequence[RequestTrace]) -> float:
    """Sum the wall times of one arm's periods: the pauses in which the other arm ran do not count."""
    periods: dict[tuple[int, int], list[RequestTrace]] = {}
    for trace in traces:
        periods.setdefault((trace.round, trace.period), []).append(trace)
    return sum(metrics.span_seconds(group) for group in periods.values())


def to_vllm(traces: Sequence[RequestTrace], model: str) -> dict[str, Any]:
    """Return the object that `vllm bench serve --save-result --save-detailed` writes."""
    good = [t for t in traces if metrics.has_latency(t)]
    duration = wall_seconds(traces)
    made: dict[str, Any] = {
        "backend": "openai",
        "model_id": model,
        "num_prompts": len(traces),
        "duration": duration,
        "completed": len(good),
        "failed": sum(t.error is not None for t in traces),
        "total_input_tokens": sum(t.prompt_tokens or 0 for t in good),
        "total_output_tokens": sum(t.output_tokens for t in good),
        "input_lens": [t.prompt_tokens for t in good],
        "output_lens": [t.output_tokens for t in good],
        "ttfts": [(metrics.ttft_ns(t) or 0) / 1e9 for t in good],
        "itls": [[gap / 1e9 for gap in metrics.itl_ns(t)] for t in good],
        "start_times": [t.start_ns / 1e9 for t in good],
    }
    if duration:
        made["request_throughput"] = len(good) / duration
        made["output_throughput"] = made["total_output_tokens"] / duration
        made["total_token_throughput"] = (made["total_input_tokens"] + made["total_output_tokens"]) / duration
    values = {
        "ttft": [metrics.ttft_ns(t) for t in good],
        "tpot": [metrics.tpot_ns(t) for t in good],
        "itl": [gap for t in good for gap in metrics.itl_ns(t)],
        "e2el": [metrics.e2e_ns(t) for t in good],
    }
    for name, found in values.items():
        made |= _summary(name, np.array([v for v in found if v is not None]) / metrics.NS_PER_MS)
    return made


def _summary(name: str, values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    made = {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
    }
    return made | {f"p{p}_{name}_ms": float(np.percentile(values, p)) for p in PERCENTILES}


def to_guidellm(traces: Sequence[RequestTrace], model: str) -> dict[str, Any]:
    """Return an object shaped like guidellm's `benchmarks.json`: one benchmark with its requests and summaries."""
    good = [t for t in traces if metrics.has_latency(t)]
    requests = []
    for t in good:
        e2e, ttft, tpot = metrics.e2e_ns(t) or 0, metrics.ttft_ns(t) or 0, metrics.tpot_ns(t)
        requests.append(
            {
                "prompt_tokens": t.prompt_tokens,
                "output_tokens": t.output_tokens,
                "request_start_time": t.start_ns / 1e9,
                "request_latency": e2e / 1e9,
                "time_to_first_token_ms": ttft / metrics.NS_PER_MS,
                "time_per_output_token_ms": e2e / t.output_tokens / metrics.NS_PER_MS,
                "inter_token_latency_ms": None if tpot is None else tpot / metrics.NS_PER_MS,
            }
        )
    summaries = {}
    for key in ("time_to_first_token_ms", "time_per_output_token_ms", "inter_token_latency_ms", "request_latency"):
        values = np.array([r[key] for r in requests if r[key] is not None], dtype=float)
        summaries[key] = {"successful": _distribution(values)} if len(values) else {}
    return {
        "benchmarks": [
            {
                "args": {"model": model},
                "duration": wall_seconds(traces),
                "metrics": summaries,
                "requests": {"successful": requests, "errored": [t.error for t in traces if t.error]},
            }
        ]
    }


def _distribution(values: np.ndarray) -> dict[str, Any]:
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "std_dev": float(values.std()),
        "count": len(values),
        "percentiles": {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES},
    }


def read(path: Path) -> dict[str, float]:
    """Read another tool's result file and return our names: mean_ttft, mean_tpot, output_throughput, ...

    Raises:
        Prune2ServeError: the file is missing or is of neither tool.
    """
    if not path.is_file():
        raise Prune2ServeError(f"no result file at {path}")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise Prune2ServeError(f"{path} is not JSON: {error}") from None
    if isinstance(found, dict) and "mean_ttft_ms" in found:
        return _from_vllm(found)
    if isinstance(found, dict) and found.get("benchmarks"):
        return _from_guidellm(found["benchmarks"][0])
    raise Prune2ServeError(f"{path} is a result of neither `vllm bench serve` nor guidellm")


def _from_vllm(found: dict[str, Any]) -> dict[str, float]:
    made = {k: float(found[k]) for k in ("output_throughput", "request_throughput") if k in found}
    for theirs, ours in (("ttft", "ttft"), ("tpot", "tpot"), ("itl", "itl"), ("e2el", "e2e")):
        for statistic, name in (("mean", "mean"), ("median", "p50"), ("p90", "p90"), ("p95", "p95"), ("p99", "p99")):
            key = f"{statistic}_{theirs}_ms"
            if found.get(key) is not None:
                made[f"{name}_{ours}"] = float(found[key])
    return made


def _from_guidellm(benchmark: dict[str, Any]) -> dict[str, float]:
    """guidellm's `inter_token_latency_ms` is our TPOT; its latency is in seconds."""
    made: dict[str, float] = {}
    names = (
        ("time_to_first_token_ms", "ttft", 1),
        ("inter_token_latency_ms", "tpot", 1),
        ("request_latency", "e2e", 1e3),
    )
    for theirs, ours, factor in names:
        summary = benchmark.get("metrics", {}).get(theirs, {}).get("successful", {})
        if "mean" in summary:
            made[f"mean_{ours}"] = summary["mean"] * factor
        for name, value in summary.get("percentiles", {}).items():
            if name in ("p50", "p90", "p95", "p99"):
                made[f"{name}_{ours}"] = value * factor
    return made
