"""The /metrics page under vLLM's metric names, so that dashboards made for vLLM work on both engines."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from prune2serve.serve.generation import FinishReason, Sequence

if TYPE_CHECKING:
    from prune2serve.serve.ort_scheduler import Scheduler

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABELS = ("model_name", "engine")
# fmt: off
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0,
    2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)
TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)
# fmt: on
LENGTH_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class EngineMetrics:
    """Counts what the engine does; safe to read from another thread."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self.mean_e2e_s = 0.0
        """Moving average over finished requests: how long a refused client should wait."""
        self._running = self._gauge("num_requests_running", "Requests in the batch, reading a prompt or decoding.")
        self._waiting = self._gauge("num_requests_waiting", "Requests waiting for a free row.")
        self._usage = self._gauge("kv_cache_usage_perc", "Share of the KV buffer's positions in use, 0 to 1.")
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up (no prefix cache: 0).")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found (no prefix cache: 0).")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens read.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._success = Counter(
            "vllm:request_success", "Finished requests.", (*LABELS, "finished_reason"), registry=self.registry
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS)
        self._itl = self._histogram("inter_token_latency_seconds", "Gap between two tokens.", TOKEN_BUCKETS)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "(E2E - TTFT) / (output tokens - 1).", TOKEN_BUCKETS
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", REQUEST_BUCKETS)
        self._queue = self._histogram("request_queue_time_seconds", "Arrival to first prefill.", REQUEST_BUCKETS)
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "First prefill to first token.", REQUEST_BUCKETS
        )
        self._decode = self._histogram("request_decode_time_seconds", "First to last token.", REQUEST_BUCKETS)
        self._prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens a request.", LENGTH_BUCKETS)
        self._output_length = self._histogram("request_generation_tokens", "Tokens a request.", LENGTH_BUCKETS)

    def page(self) -> bytes:
        """The Prometheus text page."""
        return generate_latest(self.registry)

    def observe_load(self, scheduler: Scheduler, max_length: int) -> None:
        """Note what is running and waiting now."""
        sequences = [*scheduler.running, *([scheduler.prefilling] if scheduler.prefilling else [])]
        used = sum(sequence.num_cached for sequence in sequences)
        self._running.set(len(sequences))
        self._waiting.set(len(scheduler.waiting))
        self._usage.set(used / (scheduler.num_rows * max_length))

    def observe_prompt(self, sequence: Sequence) -> None:
        """A prompt has been read."""
        self._prompt_tokens.inc(len(sequence.prompt_ids))
        if sequence.scheduled_s is not None:
            self._queue.observe(sequence.scheduled_s - sequence.arrival_s)

    def observe_token(self, sequence: Sequence) -> None:
        """A token has been generated; keeps the sequence's clocks."""
        now = time.monotonic()
        self._generation_tokens.inc()
        if sequence.first_token_s is None:
            sequence.first_token_s = now
            self._ttft.observe(now - sequence.arrival_s)
            self._prefill.observe(now - (sequence.scheduled_s or sequence.arrival_s))
        elif sequence.last_token_s is not None:
            self._itl.observe(now - sequence.last_token_s)
        sequence.last_token_s = now

    def observe_finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """A request has ended."""
        self._success.labels(self._model_name, "0", reason).inc()
        if reason not in ("stop", "length"):
            return
        e2e_s = time.monotonic() - sequence.arrival_s
        self.mean_e2e_s += (e2e_s - self.mean_e2e_s) * (0.1 if self.mean_e2e_s else 1.0)
        self._e2e.observe(e2e_s)
        self._prompt_length.observe(len(sequence.prompt_ids))
        self._output_length.observe(len(sequence.output_ids))
        if sequence.first_token_s is not None and sequence.last_token_s is not None:
            decode_s = sequence.last_token_s - sequence.first_token_s
            self._decode.observe(decode_s)
            if len(sequence.output_ids) > 1:
                self._tpot.observe(decode_s / (len(sequence.output_ids) - 1))

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, LABELS, registry=self.registry).labels(self._model_name, "0")

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, LABELS, registry=self.registry).labels(self._model_name, "0")

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(f"vllm:{name}", text, LABELS, registry=self.registry, buckets=buckets)
        return made.labels(self._model_name, "0")
