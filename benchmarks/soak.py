"""Many mixed requests, a tenth of them from clients that misbehave: nothing may leak and no good answer be wrong.

    python benchmarks/soak.py DIR --requests 2000 --concurrency 32

Every well-behaved request is greedy or seeded and its answer is compared with the one the same request got alone
on the idle server. Misbehaving clients send broken JSON, wrong types, too large a body, hang up in the middle of a
stream or before the answer, or read very slowly. At the end the server must be idle, with every slot free.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import re
import tempfile
import time
from pathlib import Path

WORDS = ["the", "a", "quick", "brown", "fox", "jumps", "over", "two", "river", "light", "café", "🙂", "моря", "night"]
BAD = ("broken JSON", "wrong type", "body too large", "hangs up mid-stream", "hangs up waiting", "reads slowly")


def make_request(index: int) -> tuple[str, dict]:
    """One of a few dozen distinct requests."""
    chooser = random.Random(index % 48)
    text = " ".join(chooser.choices(WORDS, k=chooser.randint(1, 60)))
    body: dict = {"max_tokens": chooser.randint(1, 40), "ignore_eos": chooser.random() < 0.5}
    body |= {"temperature": 0} if chooser.random() < 0.5 else {"temperature": 1.0, "top_p": 0.9, "seed": index % 48}
    if chooser.random() < 0.3:
        body["stop"] = [" the", "🙂"]
    if chooser.random() < 0.3:
        return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}
    return "/v1/completions", {**body, "prompt": text, "logprobs": chooser.choice([None, 2])}


async def ask(client, path: str, body: dict, *, stream: bool) -> str:
    """The answer's text; waits and tries again on 429."""
    while True:
        async with client.stream("POST", path, json={**body, "stream": stream}) as answer:
            if answer.status_code == 429:
                await answer.aread()
                await asyncio.sleep(0.05)
                continue
            if answer.status_code != 200:
                raise AssertionError(f"{answer.status_code}: {(await answer.aread())[:300]!r}")
            if not stream:
                return text_of(json.loads(await answer.aread())["choices"][0])
            lines = [line async for line in answer.aiter_lines() if line.startswith("data: {")]
            return "".join(text_of(json.loads(line[6:])["choices"][0]) for line in lines)


def text_of(choice: dict) -> str:
    if "text" in choice:
        return choice["text"]
    return (choice.get("message") or choice.get("delta") or {}).get("content") or ""


async def misbehave(client, url: str, kind: str) -> None:
    """Be one bad client; raises when the server's answer is not the refusal it should be."""
    long = {"prompt": "the quick", "max_tokens": 300, "ignore_eos": True, "stream": kind != "hangs up waiting"}
    refusals = {
        "broken JSON": (b'{"prompt": "x', 400),
        "wrong type": (b'{"prompt": {"a": 1}}', 400),
        "body too large": (b'{"prompt": "' + b"x" * 9_000_000 + b'"}', 413),
    }
    if kind in refusals:
        content, status = refusals[kind]
        answer = await client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == status, answer.status_code
        return
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = json.dumps(long).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    writer.write(head.encode() + b"\r\n\r\n" + data)
    await writer.drain()
    if kind == "reads slowly":
        for _ in range(20):
            await asyncio.sleep(0.05)
            if not await reader.read(16):
                break
    else:
        await asyncio.sleep(random.random() * 0.3)
    writer.transport.abort()


async def soak(url: str, arguments) -> dict:
    """Send everything; return what was seen."""
    import httpx

    limits = httpx.Limits(max_connections=arguments.concurrency)
    seen: collections.Counter[str] = collections.Counter()
    wrong: list[int] = []
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        expected = [await ask(client, *make_request(index), stream=False) for index in range(48)]
        memory = [rss(arguments.pid())]
        pending = iter(range(arguments.requests))
        chooser = random.Random(0)
        bad = {index for index in range(arguments.requests) if chooser.random() < 0.1}

        async def worker() -> None:
            for index in pending:
                if index in bad:
                    kind = BAD[index % len(BAD)]
                    await misbehave(client, url, kind)
                    seen[kind] += 1
                elif await ask(client, *make_request(index), stream=index % 2 == 0) == expected[index % 48]:
                    seen["right"] += 1
                else:
                    wrong.append(index)
                if sum(seen.values()) % (arguments.requests // 4) == 0:
                    memory.append(rss(arguments.pid()))

        start = time.monotonic()
        await asyncio.gather(*(worker() for _ in range(arguments.concurrency)))
        seconds = time.monotonic() - start
        left = await settle(client)
        memory.append(rss(arguments.pid()))
    return {"seen": dict(seen), "wrong": wrong, "left": left, "rss_mib": memory, "seconds": seconds}


async def settle(client) -> float:
    """Requests still held by the server after at most 10 s of silence."""
    held = 1.0
    for _ in range(100):
        page = (await client.get("/metrics")).text
        values = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", page, re.MULTILINE)
        held = sum(map(float, values))
        if held == 0:
            break
        await asyncio.sleep(0.1)
    return held


def rss(pid: int) -> int:
    import psutil

    return psutil.Process(pid).memory_info().rss // 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--max-model-len", type=int, default=512)
    arguments = parser.parse_args()

    from prune2serve.serve.engine import served

    flags = [str(arguments.directory), "--engine", "onnxruntime", "--device", "cpu"]
    flags += ["--max-num-seqs", "8", "--max-num-waiting", "16", "--max-model-len", str(arguments.max_model_len)]
    with tempfile.TemporaryDirectory() as folder, served(flags, log_file=Path(folder) / "serve.log") as server:
        arguments.pid = lambda: server.pid
        found = asyncio.run(soak(server.url, arguments))
        alive = server.poll() is None
        log = server.log_tail(5)
    print(f"{arguments.requests} requests by {arguments.concurrency} clients in {found['seconds']:.0f} s")
    for kind, count in sorted(found["seen"].items()):
        print(f"  {kind:<22} {count}")
    print(f"  wrong answers          {len(found['wrong'])}")
    print(f"  requests still held    {found['left']:g}")
    print(f"  server's RSS in MiB    {found['rss_mib']}")
    print(f"  log's last lines       {log!r}")
    if found["wrong"] or found["left"] or not alive:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
