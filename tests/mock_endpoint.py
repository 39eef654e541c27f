"""An OpenAI-shaped endpoint with exactly known latencies, run as its own process: `python
tests/mock_endpoint.py`.

Every chunk's text is the moment it was sent (`time.perf_counter_ns`, the same clock in every process of a
Linux machine), so a client's own delay is what it measured minus what the text says. Raw asyncio, so that the
mock costs far less than the client under test.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n"


def event(payload: dict) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def framed(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def stream(writer: asyncio.StreamWriter, body: dict, options: argparse.Namespace, arrived: float) -> None:
    loop = asyncio.get_running_loop()
    factor = random.lognormvariate(0, options.noise) if options.noise else 1.0
    due = arrived + options.ttft_ms / 1e3 * factor
    writer.write(HEAD % b"text/event-stream" + b"Transfer-Encoding: chunked\r\n\r\n")
    for index in range(body["max_tokens"]):
        # Sleep to just short of the deadline and spin the rest: an event loop's timers are a millisecond
        # coarse.
        if (wait := due - loop.time() - 0.0015) > 0:
            await asyncio.sleep(wait)
        while options.exact and loop.time() < due:
            pass
        last = index == body["max_tokens"] - 1
        choice = {
            "index": 0,
            "text": f" {time.perf_counter_ns()}",
            "finish_reason": "length" if last else None,
        }
        writer.write(framed(event({"choices": [choice]})))
        due += options.itl_ms / 1e3 * factor
    usage = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": body["max_tokens"]}
    writer.write(framed(event({"choices": [], "usage": usage})) + framed(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    await writer.drain()


def answer(path: str, options: argparse.Namespace) -> dict | str | None:
    if path == "/health":
        return {}
    if path == "/v1/models":
        return {"data": [{"id": options.name, "max_model_len": 2048}]}
    if path == "/version":
        return {"version": options.version}
    return None


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, options: argparse.Namespace) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            arrived = asyncio.get_running_loop().time()
            request, *lines = head.decode().split("\r\n")
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines if line)}
            raw = await reader.readexactly(int(headers.get("content-length", 0)))
            path = request.split()[1]
            if path == "/v1/completions" and random.random() >= options.fail:
                await stream(writer, json.loads(raw), options, arrived)
                continue
            found = answer(path, options)
            status = b"200 OK" if found is not None else b"500 Internal Server Error"
            data = json.dumps(found if found is not None else {"error": {"message": "mock failure"}}).encode()
            writer.write(b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: " % status)
            writer.write(str(len(data)).encode() + b"\r\n\r\n" + data)
            await writer.drain()
    writer.close()


async def main(options: argparse.Namespace) -> None:
    server = await asyncio.start_server(lambda r, w: handle(r, w, options), "127.0.0.1", options.port)
    port = server.sockets[0].getsockname()[1]
    print(f"Serving {options.name} on http://127.0.0.1:{port} (mock)", file=sys.stderr, flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--name", default="mock")
    parser.add_argument("--version", default="mock 1")
    parser.add_argument("--ttft-ms", type=float, default=20.0)
    parser.add_argument("--itl-ms", type=float, default=5.0)
    parser.add_argument("--noise", type=float, default=0.0, help="sigma of a lognormal factor per request")
    parser.add_argument("--fail", type=float, default=0.0, help="fraction of requests that answer 500")
    parser.add_argument("--exact", action="store_true", help="spin to the deadline")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(parser.parse_args()))
