"""What `prune2serve measure` promises, tried: the intervals' coverage, the power, and the client's own cost.

python benchmarks/measure.py coverage      # simulated A/A experiments: how often does the interval hold 1?
python benchmarks/measure.py power         # a true 5% effect: found as often as promised?
python benchmarks/measure.py client        # an endpoint with known latencies: what does the client add?
"""

from __future__ import annotations

import argparse
import asyncio
import math
import subprocess
import sys
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

from prune2serve.serve import client, design, statistics
from prune2serve.serve.statistics import Values
from prune2serve.serve.workload import Request

MOCK = Path(__file__).parent.parent / "tests" / "mock_endpoint.py"


def simulate(
    generator: np.random.Generator,
    num_rounds: int,
    ratio: float = 1.0,
    *,
    requests: int = 4,
    autocorrelation: float = 0.7,
    mood: float = 0.05,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the latencies of both arms, an array a round, with the noise of a real machine.

    Periods share a mood (autoregressive, 5%), a linear drift (10%) and, in one run of four, a sudden change (15%);
    prompts differ by 10% and are the same in both arms; requests have 5% of their own, and 3% of them are held up,
    by half their time on average.
    """
    periods = num_rounds * 4
    moods = np.empty(periods)
    moods[0] = generator.normal() * mood
    for i in range(1, periods):
        step = math.sqrt(1 - autocorrelation**2) * mood * generator.normal()
        moods[i] = autocorrelation * moods[i - 1] + step
    moods += np.linspace(0, generator.normal() * 0.1, periods)
    if generator.random() < 0.25:
        moods[generator.integers(periods) :] += generator.normal() * 0.15
    arms: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for round_index in range(num_rounds):
        order = "ABBA" if generator.random() < 0.5 else "BAAB"
        prompts = generator.normal(size=(2, requests)) * 0.1
        found: dict[str, list[np.ndarray]] = {"A": [], "B": []}
        for index, letter in enumerate(order):
            own = generator.normal(size=requests) * 0.05
            held_up = (generator.random(requests) < 0.03) * generator.exponential(0.5, requests)
            values = 30 * np.exp(prompts[index // 2] + moods[round_index * 4 + index] + own) * (1 + held_up)
            found[letter].append(values * (ratio if letter == "B" else 1.0))
        arms[0].append(np.concatenate(found["A"]))
        arms[1].append(np.concatenate(found["B"]))
    return arms


def intervals(a: list[np.ndarray], b: list[np.ndarray], seed: int) -> dict[str, tuple[float, float]]:
    """Return the intervals of one experiment, and for comparison the plain percentile bootstrap of the mean."""
    weights = statistics.resample_weights(len(a), seed)
    x, y = Values(a), Values(b)
    found = {"mean": statistics.compare_means(x, y, weights)}
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95)):
        found[name] = statistics.compare_quantiles(x, y, q, weights)
    seconds = (np.array([v.sum() for v in a]), np.array([v.sum() for v in b]))
    amounts = (np.array([len(v) for v in a]), np.array([len(v) for v in b]))
    found["throughput"] = statistics.compare_rates((amounts[0], seconds[0]), (amounts[1], seconds[1]), weights)
    made = {name: e.interval for name, e in found.items() if e is not None and e.interval is not None}
    plain = np.quantile(y.mean(weights) / x.mean(weights), [0.025, 0.975])
    return made | {"mean (plain percentile bootstrap)": (float(plain[0]), float(plain[1]))}


def coverage(num_experiments: int, num_rounds: int, seed: int) -> dict[str, float]:
    """Return the share of A/A experiments whose 95% interval holds 1, for every statistic."""
    generator = np.random.default_rng(seed)
    hits: dict[str, list[bool]] = defaultdict(list)
    for experiment in range(num_experiments):
        a, b = simulate(generator, num_rounds)
        for name, (low, high) in intervals(a, b, experiment).items():
            hits[name].append(low <= 1 <= high)
    return {name: float(np.mean(held)) for name, held in hits.items()}


def sequential_coverage(num_experiments: int, precision: float, seed: int, limit: int = 60) -> tuple[float, float]:
    """Return (coverage, mean rounds) of the mean's interval when runs stop as soon as it is precise enough."""
    generator = np.random.default_rng(seed)
    held, rounds = [], []
    for experiment in range(num_experiments):
        a, b = simulate(generator, limit)
        for count in range(design.MIN_ROUNDS_TO_STOP, limit + 1):
            weights = statistics.resample_weights(count, experiment, 300)
            found = statistics.compare_means(Values(a[:count]), Values(b[:count]), weights)
            assert found is not None and found.interval is not None
            low, high = found.interval
            if (high - low) / 2 / found.ratio <= precision:
                break
        count = min(count + design.CONFIRMING_ROUNDS, limit)
        low, high = intervals(a[:count], b[:count], experiment)["mean"]
        held.append(low <= 1 <= high)
        rounds.append(count)
    return float(np.mean(held)), float(np.mean(rounds))


def power(num_experiments: int, effect: float, pilot_rounds: int, seed: int) -> tuple[float, float, float]:
    """Return (promised power, power found, mean rounds): plan from a pilot, then run that long with the effect."""
    generator = np.random.default_rng(seed)
    promised, found, rounds = [], [], []
    for experiment in range(num_experiments):
        pilot = simulate(generator, pilot_rounds)
        low, high = intervals(*pilot, experiment)["mean"]
        t = statistics.t_quantile(0.975, pilot_rounds - 1)
        spread = math.log(high / low) / 2 / t * math.sqrt(pilot_rounds)
        needed = statistics.rounds_needed(effect, spread, pilot_rounds)
        promised.append(statistics.power(effect, spread, needed, pilot_rounds))
        low, high = intervals(*simulate(generator, needed, 1 + effect), experiment)["mean"]
        found.append(not low <= 1 <= high)
        rounds.append(needed)
    return float(np.mean(promised)), float(np.mean(found)), float(np.mean(rounds))


def print_coverage(options: argparse.Namespace) -> None:
    print(f"{options.experiments} simulated A/A experiments each; share whose 95% interval holds 1")
    for num_rounds in options.rounds:
        found = coverage(options.experiments, num_rounds, options.seed)
        print(f"  {num_rounds:3} rounds: " + ", ".join(f"{name} {share:.1%}" for name, share in found.items()))
    for precision in (0.05, 0.03):
        share, rounds = sequential_coverage(options.experiments, precision, options.seed)
        print(f"  stopped at ±{precision:.0%} ({rounds:.1f} rounds on average): mean {share:.1%}")


def print_power(options: argparse.Namespace) -> None:
    for pilot_rounds in (6, 12):
        promised, found, rounds = power(options.experiments, 0.05, pilot_rounds, options.seed)
        print(
            f"pilot of {pilot_rounds} rounds: a 5% effect promised with {promised:.1%}, found in {found:.1%} of "
            f"{options.experiments} experiments ({rounds:.1f} rounds on average)"
        )


async def _measure_client(url: str, count: int, concurrency: int, tokens: int) -> list[client.Outcome]:
    async with client.open_session() as session:
        target = client.Target(url, "mock")
        await client.run_period(session, target, [Request(i, "warm up", 2) for i in range(concurrency)], concurrency)
        requests = [Request(i, "p", tokens) for i in range(count)]
        return await client.run_period(session, target, requests, concurrency)


def print_client(options: argparse.Namespace) -> None:
    print(f"aiohttp {version('aiohttp')}, Python {sys.version.split()[0]}")
    cases = ((50.0, 10.0, 20, 20, 1, True), (50.0, 10.0, 50, 20, 8, False), (0.0, 0.0, 3000, 2, 16, False))
    for ttft, itl, count, tokens, concurrency, exact in cases:
        command = [sys.executable, str(MOCK), "--ttft-ms", str(ttft), "--itl-ms", str(itl)]
        with subprocess.Popen([*command, *(["--exact"] if exact else [])], stderr=subprocess.PIPE, text=True) as mock:
            assert mock.stderr is not None
            url = mock.stderr.readline().split(" on ")[1].split()[0]
            begun, cpu = time.perf_counter(), time.process_time()
            outcomes = asyncio.run(_measure_client(url, count, concurrency, tokens))
            seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
            mock.kill()
        first = np.array([o.chunk_ns[0] - o.start_ns for o in outcomes]) / 1e6
        gap = np.array([(o.chunk_ns[-1] - o.chunk_ns[0]) / (tokens - 1) for o in outcomes]) / 1e6
        print(
            f"TTFT {ttft} ms, ITL {itl} ms, {concurrency} at once: measured TTFT {np.median(first):.3f} ms, "
            f"TPOT {np.median(gap):.3f} ms (medians of {count}); {count / seconds:.0f} requests/s, "
            f"{cpu / count * 1e3:.2f} ms of CPU a request"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["coverage", "power", "client"])
    parser.add_argument("--experiments", type=int, default=200)
    parser.add_argument("--rounds", type=int, nargs="*", default=[4, 6, 8, 12, 24])
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    {"coverage": print_coverage, "power": print_power, "client": print_client}[chosen.what](chosen)
