"""What is sent: prompts, output lengths and arrival times, the same for both arms of a period.

A `Workload` says how requests are made; `requests_for` makes those of one half round, from a seed, so that
both arms get identical prompts, lengths and schedule, and no two half rounds share a prompt's beginning
(prefix caches help nobody unless `share_prefixes` is set).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from prune2serve.errors import Prune2ServeError
from prune2serve.serve.prompts import Fitter


@dataclass(frozen=True)
class Request:
    """One request of a period."""

    index: int
    prompt: str
    output_tokens: int
    offset_s: float | None = None
    """Send time after the period's start; None in a closed loop."""


@dataclass(frozen=True)
class Lengths:
    """Token counts: always `mean`, or uniform within +- spread of it (0.5 = from half to one and a half
    times)."""

    mean: int
    spread: float = 0.0

    def sample(self, count: int, generator: np.random.Generator) -> list[int]:
        low, high = round(self.mean * (1 - self.spread)), round(self.mean * (1 + self.spread))
        return [int(n) for n in generator.integers(max(low, 2), max(high, 2) + 1, size=count)]


@dataclass(frozen=True)
class Arrival:
    """When requests go out."""

    kind: Literal["closed", "poisson", "gamma", "replay"] = "closed"
    concurrency: int | None = 1
    """Workers of the closed loop; the most in flight at once in an open one (None: no limit)."""
    rate: float = 0.0
    """Requests per second, for `poisson` and `gamma`."""
    burstiness: float = 1.0
    """Shape of the gamma distribution: 1 is Poisson, below 1 burstier, above 1 more even (vLLM's meaning)."""
    timestamps_s: tuple[float, ...] = ()
    """For `replay`: send times in seconds; a period takes the next ones, shifted to start at 0."""

    def offsets(self, count: int, skip: int, generator: np.random.Generator) -> Sequence[float | None]:
        """Return `count` send times; `skip` requests have gone before (for `replay`)."""
        if self.kind == "closed":
            return [None] * count
        if self.kind == "replay":
            times = [self.timestamps_s[(skip + i) % len(self.timestamps_s)] for i in range(count)]
            gaps = np.maximum(np.diff(times, prepend=times[0]), 0.0)
            return [float(t) for t in np.cumsum(gaps)]
        shape = self.burstiness if self.kind == "gamma" else 1.0
        gaps = generator.gamma(shape, 1 / (self.rate * shape), size=count)
        gaps[0] = 0.0
        return [float(t) for t in np.cumsum(gaps)]


def load_timestamps(path: Path) -> tuple[float, ...]:
    """Read send times in seconds, one a line, rising.

    Raises:
        Prune2ServeError: the file is missing, a line is no number, or the times fall.
    """
    if not path.is_file():
        raise Prune2ServeError(f"no file of send times at {path}")
    times: list[float] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            times += [float(line)] if line.strip() else []
        except ValueError:
            raise Prune2ServeError(f"{path}:{number} is {line.strip()[:40]!r}; expected seconds") from None
        if len(times) > 1 and times[-1] < times[-2]:
            raise Prune2ServeError(f"{path}:{number}: {times[-1]} comes before {times[-2]}; sort the times")
    if not times:
        raise Prune2ServeError(f"{path} holds no send times")
    return tuple(times)


@dataclass(frozen=True)
class Workload:
    """How to make requests."""

    prompts: tuple[str, ...]
    source: str
    output: Lengths
    arrival: Arrival
    num_requests: int
    """Per period."""
    input: Lengths | None = None
    """Prompt lengths in tokens; None leaves the prompts as they are."""
    fitter: Fitter | None = None
    """Cuts and fills prompts to a number of tokens; needed for `input`."""
    share_prefixes: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise Prune2ServeError(f"{self.source} holds no prompts: name a file with at least one")
        if self.input is not None and self.fitter is None:
            raise Prune2ServeError("--input-tokens needs a tokenizer: pass --tokenizer DIR (a model directory)")


def requests_for(workload: Workload, half_round: int, salt: int = 0) -> list[Request]:
    """Return the requests of half round `half_round` (from 0; -1 and below for warm-up).

    `salt` is 0 unless both arms are one and the same server: then the second arm takes another, so that its
    prompts begin differently (and have the same length) and its prefix cache gains nothing from the first.
    """
    generator = np.random.default_rng([workload.seed, half_round + 1_000_000])
    count = workload.num_requests
    outputs = workload.output.sample(count, generator)
    inputs = workload.input.sample(count, generator) if workload.input else [0] * count
    offsets = workload.arrival.offsets(count, max(half_round, 0) * count, generator)
    picks = _picks(workload, half_round)
    marks = generator.integers(100_000, 1_000_000, size=count)
    made = []
    for i in range(count):
        prompt = workload.prompts[picks[i]]
        if not workload.share_prefixes:
            # Six digits are as many tokens as any other six, in every common tokenizer.
            prompt = f"[{(int(marks[i]) + 7919 * salt - 100_000) % 900_000 + 100_000}] {prompt}"
        if workload.input and workload.fitter:
            prompt = workload.fitter(prompt, inputs[i])
        made.append(Request(i, prompt, outputs[i], offsets[i]))
    return made


def _picks(workload: Workload, half_round: int) -> list[int]:
    """Walk through the prompts in a fixed shuffled order, so that each is used before any is used twice."""
    total, count = len(workload.prompts), workload.num_requests
    first = (half_round + 1_000_000) * count
    picks = []
    for position in range(first, first + count):
        lap, place = divmod(position, total)
        picks.append(int(np.random.default_rng([workload.seed, lap]).permutation(total)[place]))
    return picks
