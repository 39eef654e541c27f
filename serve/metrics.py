"""Latency terms of one request and rates of many, with their formulas.

The definitions are those of vLLM's `benchmarks/serve.py`. Other tools differ: guidellm's time per output
token divides the whole latency, first token included, by the number of tokens.

A request that failed or produced fewer than two output tokens has no latency at all (None, never 0).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prune2serve.errors import Prune2ServeError
from prune2serve.records import RequestTrace

NS_PER_MS = 1e6


def has_latency(trace: RequestTrace) -> bool:
    return trace.error is None and trace.output_tokens >= 2 and len(trace.chunk_ns) >= 1


def ttft_ns(trace: RequestTrace) -> int | None:
    """Time to first token: arrival of the first chunk - moment of sending."""
    return trace.chunk_ns[0] - trace.start_ns if has_latency(trace) else None


def e2e_ns(trace: RequestTrace) -> int | None:
    """End-to-end latency: arrival of the last chunk that carried tokens - moment of sending."""
    return trace.chunk_ns[-1] - trace.start_ns if has_latency(trace) else None


def tpot_ns(trace: RequestTrace) -> float | None:
    """Time per output token after the first: (E2E - TTFT) / (output tokens - 1). None if all came in one
    chunk."""
    if not has_latency(trace) or len(trace.chunk_ns) < 2:
        return None
    return (trace.chunk_ns[-1] - trace.chunk_ns[0]) / (trace.output_tokens - 1)


def itl_ns(trace: RequestTrace) -> tuple[int, ...]:
    """Inter-token latencies: every gap between neighbouring chunks; pooled over requests before any
    percentile."""
    if not has_latency(trace):
        return ()
    return tuple(later - earlier for earlier, later in zip(trace.chunk_ns, trace.chunk_ns[1:], strict=False))


@dataclass(frozen=True)
class Slo:
    """Limits that a request must meet to count as goodput, in milliseconds; None is no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    def met_by(self, trace: RequestTrace) -> bool:
        """True if every latency with a limit has a value at most that limit."""
        pairs = (
            (self.ttft_ms, ttft_ns(trace)),
            (self.tpot_ms, tpot_ns(trace)),
            (self.e2e_ms, e2e_ns(trace)),
        )
        return all(limit is None or (value is not None and value <= limit * NS_PER_MS) for limit, value in pairs)


def parse_slo(text: str) -> Slo:
    """Read 'ttft=500,tpot=50,e2e=5000' (milliseconds)."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            limit = float(value)
        except ValueError:
            limit = 0.0
        limits[name] = limit
        if name not in ("ttft", "tpot", "e2e") or not limit > 0:
            raise Prune2ServeError(f"--slo has {part.strip()!r}; expected ttft=MS, tpot=MS or e2e=MS, joined by commas")
    return Slo(limits.get("ttft"), limits.get("tpot"), limits.get("e2e"))


def span_seconds(traces: Iterable[RequestTrace]) -> float:
    """Wall time of one period: first request sent to last chunk received, ramp and drain included."""
    traces = [trace for trace in traces if trace.chunk_ns]
    if not traces:
        return 0.0
    return (max(t.chunk_ns[-1] for t in traces) - min(t.start_ns for t in traces)) / 1e9


def output_tokens(traces: Iterable[RequestTrace]) -> int:
    """Tokens of the requests that succeeded. Output throughput = this / the sum of the periods' wall times.
    Tokens of the requests that succeeded. Output throughput = this / the sum of the periods' wall times."""
    return sum(trace.output_tokens for trace in traces if trace.error is None)


def num_good(traces: Iterable[RequestTrace], slo: Slo) -> int:
    """Requests that succeeded within the SLO. Goodput = this / the sum of the periods' wall times."""
    return sum(has_latency(trace) and slo.met_by(trace) for trace in traces)
