"""The load generator: sends requests on schedule and notes when every chunk arrives.

aiohttp, because it costs a tenth of httpx here (0.2 ms of CPU a request against 2.4 ms; 2,800 trivial
requests per second against 400 on two cores; `benchmarks/measure.py client`). Timestamps are
`time.perf_counter_ns`, taken before a chunk is parsed.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prune2serve.serve.workload import Request

if TYPE_CHECKING:
    import aiohttp

TIMEOUT_S = 600


@dataclass(frozen=True)
class Target:
    """Where requests go."""

    url: str
    """Without /v1."""
    model: str
    api: Literal["completions", "chat"] = "completions"
    key: str | None = field(default=None, repr=False)
    extra_body: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of one request; `prune2serve.records.RequestTrace` adds where it stood in the design."""

    prompt: int
    scheduled_ns: int
    start_ns: int
    chunk_ns: tuple[int, ...]
    prompt_tokens: int | None
    output_tokens: int
    error: str | None


def body_of(target: Target, request: Request) -> bytes:
    """Return the JSON body: greedy, streamed, with usage, and exactly `output_tokens` long."""
    body: dict[str, Any] = {
        "model": target.model,
        "max_tokens": request.output_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.extra_body,
    }
    if target.api == "chat":
        body["messages"] = [{"role": "user", "content": request.prompt}]
    else:
        body["prompt"] = request.prompt
    return json.dumps(body).encode()


class EventStream:
    """Splits a server-sent event stream into JSON payloads, however the network cut it."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        # An event ends at an empty line; some proxies end lines with CRLF, and JSON holds no bare CR.
        *events, self._rest = (self._rest + data.replace(b"\r", b"")).split(b"\n\n")
        for event in events:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            payload = b"\n".join(lines)
            if payload and payload != b"[DONE]":
                yield json.loads(payload)


class _Reading:
    """The chunks of one response so far."""

    def __init__(self) -> None:
        self.chunk_ns: list[int] = []
        self.usage: dict[str, Any] = {}
        self.error: str | None = None
        self._last_is_closing = False

    def take(self, payload: dict[str, Any], now: int) -> None:
        if payload.get("error"):
            self.error = str(payload["error"])[:300]
        if payload.get("usage"):
            self.usage = payload["usage"]
        for choice in payload.get("choices") or ():
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("content") or delta.get("reasoning_content")
            if "role" in delta and not text:
                continue  # A chat stream opens with a chunk that names the role and carries no token.
            # A token whose text is held back or special has an empty chunk, and so has a mere end mark: only
            # the usage tells them apart, at the end.
            self._last_is_closing = not text and choice.get("finish_reason") is not None
            self.chunk_ns.append(now)

    def finish(self) -> None:
        expected = self.usage.get("completion_tokens")
        if self._last_is_closing and (expected is None or len(self.chunk_ns) > expected):
            self.chunk_ns.pop()


async def send(
    session: aiohttp.ClientSession, target: Target, request: Request, scheduled_ns: int | None = None
) -> Outcome:
    """Send one request and read its stream to the end. Failures are returned, not raised."""
    import aiohttp

    path = "/v1/chat/completions" if target.api == "chat" else "/v1/completions"
    body, stream, reading = body_of(target, request), EventStream(), _Reading()
    headers = {"Content-Type": "application/json"}
    if target.key:
        headers["Authorization"] = f"Bearer {target.key}"
    start_ns = time.perf_counter_ns()
    try:
        async with session.post(target.url + path, data=body, headers=headers) as response:
            if response.status != 200:
                reading.error = f"HTTP {response.status}: {(await response.text())[:300]}"
            else:
                async for data in response.content.iter_any():
                    now = time.perf_counter_ns()
                    for payload in stream.feed(data):
                        reading.take(payload, now)
    except (aiohttp.ClientError, TimeoutError, ValueError, ConnectionError) as error:
        reading.error = f"{type(error).__name__}: {error}"[:300]
    reading.finish()
    if reading.error is None and not reading.chunk_ns:
        reading.error = "the answer held no tokens"
    return Outcome(
        prompt=request.index,
        scheduled_ns=start_ns if scheduled_ns is None else scheduled_ns,
        start_ns=start_ns,
        chunk_ns=tuple(reading.chunk_ns),
        prompt_tokens=reading.usage.get("prompt_tokens"),
        output_tokens=int(reading.usage.get("completion_tokens") or len(reading.chunk_ns)),
        error=reading.error,
    )


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold garbage collection back: a collection in mid-stream would look like the server's latency."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def run_period(
    session: aiohttp.ClientSession, target: Target, requests: Sequence[Request], concurrency: int | None
) -> list[Outcome]:
    """Send all requests and return their outcomes in the requests' order.

    Requests with an `offset_s` go out at that time after the start, whatever is still in flight (open loop),
    at most `concurrency` at once if that is not None; the others are sent by `concurrency` workers, each
    waiting for its answer before it sends the next (closed loop).
    """
    gate = asyncio.Semaphore(concurrency or max(len(requests), 1))
    start = 0

    async def one(request: Request) -> Outcome:
        scheduled = None
        if request.offset_s is not None:
            scheduled = start + round(request.offset_s * 1e9)
            await asyncio.sleep(max(0.0, (scheduled - time.perf_counter_ns()) / 1e9))
        async with gate:
            return await send(session, target, request, scheduled)

    with undisturbed():
        start = time.perf_counter_ns() + 2_000_000
        return list(await asyncio.gather(*(one(request) for request in requests)))


def open_session() -> aiohttp.ClientSession:
    """Return a session without a connection limit, so that the client never queues what it should send."""
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=600),
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
        read_bufsize=2**20,
    )


class LoopLag:
    """Watches how late this process's event loop wakes up: a busy client would time itself."""

    def __init__(self, every_s: float = 0.01) -> None:
        self._every_s = every_s
        self.lags_ms: list[float] = []

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Watch while the block runs."""
        watcher = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watcher.cancel()

    async def _watch(self) -> None:
        while True:
            due = time.perf_counter() + self._every_s
            await asyncio.sleep(self._every_s)
            self.lags_ms.append(max(0.0, (time.perf_counter() - due) * 1e3))
