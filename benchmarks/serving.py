"""Throughput of the ONNX Runtime endpoint against the bare session and against onnxruntime-genai, in one run.

    python benchmarks/serving.py DIR --precision fp32 --concurrency 1,4,8,16

For each concurrency, alternating over --rounds: the same prompts and output lengths go
- through the bare session: every prompt prefilled, then decode steps of all rows, with nothing else around them:
  what the hardware allows;
- through a running `prune2serve serve` in a closed loop of that many clients (streaming, ignore_eos);
- and, once a round, one at a time through onnxruntime-genai's own Generator.
Output tokens per second of wall time, prompts included in the time. Ratios are of medians of this run.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import statistics
import tempfile
import time
from pathlib import Path

SUBJECTS = ("a lighthouse", "the tide", "a violin", "the moon", "bread", "a glacier", "coal", "an atlas")
QUESTIONS = ("Describe {} in a few sentences.", "Why do people care about {}?", "Write a short poem about {} at night.")


def prompts(count: int) -> list[str]:
    """Distinct short prompts, so that no cache of prefixes can help anyone."""
    return [
        f"{index}. " + QUESTIONS[index % len(QUESTIONS)].format(SUBJECTS[index % len(SUBJECTS)])
        for index in range(count)
    ]


def bare_session(runner, ids: list[list[int]], num_tokens: int) -> float:
    """Seconds for a full batch without a server: prefill each row, then decode all of them together."""
    start = time.perf_counter()
    tokens = []
    for row, prompt in enumerate(ids):
        for at in range(0, len(prompt), runner.options.prefill_chunk):
            logits = runner.prefill(row, prompt[at : at + runner.options.prefill_chunk], at)
        tokens.append(int(logits[-1].argmax()))
    lengths = [len(prompt) for prompt in ids]
    for _ in range(num_tokens - 1):
        lengths = [length + 1 for length in lengths]
        tokens = runner.decode(tokens, lengths).argmax(-1).tolist()
    return time.perf_counter() - start


def genai_generator(model, ids: list[list[int]], num_tokens: int) -> float:
    """Seconds for the prompts one after the other through onnxruntime-genai."""
    import onnxruntime_genai as og

    start = time.perf_counter()
    for prompt in ids:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + num_tokens, min_length=len(prompt) + num_tokens)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        for _ in range(num_tokens):
            generator.generate_next_token()
    return time.perf_counter() - start


async def closed_loop(url: str, texts: list[str], concurrency: int, num_tokens: int) -> float:
    """Seconds until `concurrency` clients have worked off the prompts; checks every answer's length."""
    import httpx

    waiting = list(reversed(texts))
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=concurrency)) as client:

        async def one() -> None:
            while waiting:
                body = {
                    "prompt": waiting.pop(),
                    "max_tokens": num_tokens,
                    "ignore_eos": True,
                    "temperature": 0,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
                usage = None
                async with client.stream("POST", "/v1/completions", json=body) as answer:
                    answer.raise_for_status()
                    async for line in answer.aiter_lines():
                        if line.startswith("data: {"):
                            usage = json.loads(line[6:]).get("usage") or usage
                assert usage and usage["completion_tokens"] == num_tokens, usage

        start = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(concurrency)))
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "int4"])
    parser.add_argument("--concurrency", default="1,4,8,16")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--waves", type=int, default=2, help="requests a client sends, per round")
    arguments = parser.parse_args()
    levels = [int(level) for level in arguments.concurrency.split(",")]

    import onnxruntime_genai as og

    from prune2serve.export.onnx_graph import ensure_onnx, onnx_home
    from prune2serve.serve.engine import served
    from prune2serve.serve.ort_session import ModelRunner, RunnerOptions
    from prune2serve.serve.tokenization import TextModel

    onnx = ensure_onnx(arguments.directory, arguments.precision, cache=onnx_home(arguments.directory))
    text = TextModel(arguments.directory)
    texts = prompts(max(levels) * arguments.waves)
    ids = [text.encode(one) for one in texts]
    runner = ModelRunner(onnx, RunnerOptions(num_rows=max(levels), max_length=1024))
    genai = og.Model(str(onnx))
    flags = [str(arguments.directory), "--engine", "onnxruntime", "--device", "cpu", "--precision", arguments.precision]
    flags += ["--max-num-seqs", str(max(levels)), "--max-model-len", "1024"]
    bare: dict[int, list[float]] = {level: [] for level in levels}
    server: dict[int, list[float]] = {level: [] for level in levels}
    alone: list[float] = []
    length = arguments.output_tokens
    with tempfile.TemporaryDirectory() as folder, served(flags, log_file=Path(folder) / "serve.log") as running:
        asyncio.run(closed_loop(running.url, texts[:2], 1, 8))  # warm both sides
        bare_session(runner, ids[:2], 8)
        for _ in range(arguments.rounds):
            alone.append(2 * length / genai_generator(genai, ids[:2], length))
            for level in levels:
                count = level * arguments.waves
                bare[level].append(level * length / bare_session(runner, ids[:level], length))
                server[level].append(
                    count * length / asyncio.run(closed_loop(running.url, texts[:count], level, length))
                )
    report(arguments, levels, bare, server, alone)


def report(arguments, levels: list[int], bare: dict, server: dict, alone: list[float]) -> None:
    versions = {name: importlib.metadata.version(name) for name in ("onnxruntime", "onnxruntime-genai", "prune2serve")}
    single = statistics.median(alone)
    print(f"{arguments.directory} {arguments.precision}, {arguments.output_tokens} output tokens, {versions}")
    print(f"onnxruntime-genai Generator, one request at a time: {single:.1f} tokens/s")
    print(f"{'clients':>8} {'bare tok/s':>11} {'served tok/s':>13} {'served/bare':>12} {'served/genai':>13}")
    for level in levels:
        most, got = statistics.median(bare[level]), statistics.median(server[level])
        print(f"{level:>8} {most:>11.1f} {got:>13.1f} {got / most:>12.2f} {got / single:>13.2f}")


if __name__ == "__main__":
    main()
