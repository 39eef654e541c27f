"""Peak memory of scoring with 1x and 4x the samples: the statistics are running sums, so it must be the same.

    python benchmarks/scoring_memory.py --calibration TEXT [--model sample] [--windows 8] [--rounds 2]

Each run is `prune2serve score` in a process of its own; its peak resident size is what the kernel recorded.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys


def peak_rss_bytes(command: list[str]) -> int:
    """Run a command to its end and return the largest resident size it had."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--model", default="sample")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    chosen = parser.parse_args()
    score = [sys.executable, "-m", "prune2serve", "score", "--quiet", "--json"]
    score += ["--model", chosen.model, "--calibration", chosen.calibration]
    peaks: dict[int, list[int]] = {chosen.windows: [], 4 * chosen.windows: []}
    for _ in range(chosen.rounds):
        for windows, seen in peaks.items():
            seen.append(peak_rss_bytes([*score, "--score-windows", str(windows)]))
    for windows, seen in peaks.items():
        print(f"{windows:4d} windows of 512 tokens: peak {', '.join(f'{peak / 2**20:.0f}' for peak in seen)} MiB")
    few, many = (sum(seen) / len(seen) for seen in peaks.values())
    print(f"4x the samples: {many / few:.3f}x the peak memory")


if __name__ == "__main__":
    main()
