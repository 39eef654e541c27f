"""The order in which two arms are measured, and when to stop.

Time goes in rounds of four periods, A B B A or B A A B, drawn at random: whatever drifts linearly (heat,
other load) hits both arms alike, and the random order makes the rounds' errors uncorrelated even where the
machine's mood is not. Periods 0 and 1 of a round use the same requests, and so do periods 2 and 3; both arms
see exactly the same prompts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

Arm = Literal["baseline", "candidate"]
ARMS: tuple[Arm, Arm] = ("baseline", "candidate")
PERIODS_PER_ROUND = 4
MIN_ROUNDS = 3
"""A time limit does not end a run before this: two rounds give an interval too wide to use, one gives none."""
MIN_ROUNDS_TO_STOP = 6
"""Fewer rounds are never called precise enough: their own spread is hardly known."""
CONFIRMING_ROUNDS = 2
"""Run after the precision is reached: a run that stops at once stops where its spread happens to look small, and its
interval is too narrow (about 91% coverage instead of 95%; with these two rounds about 93%)."""


@dataclass(frozen=True)
class Period:
    """One stretch of time in which one arm is loaded."""

    round: int
    index: int
    """0 to 3 within the round."""
    arm: Arm

    @property
    def half_round(self) -> int:
        """Number of the request set, shared by two neighbouring periods."""
        return 2 * self.round + self.index // 2


def periods_of_round(round_index: int, seed: int) -> tuple[Period, ...]:
    """Return the four periods of a round, in order; `seed` draws which arm begins."""
    flipped = bool(np.random.default_rng([seed, 7, round_index]).integers(2))
    order = "BAAB" if flipped else "ABBA"
    return tuple(Period(round_index, i, ARMS["AB".index(letter)]) for i, letter in enumerate(order))


@dataclass(frozen=True)
class StoppingRule:
    """When a run ends: at a number of rounds, at a precision, or at a time limit, whichever comes first.

    The precision is the half width of the 95% interval of the ratio, of every metric that is watched. The
    rule looks at the width alone, never at the ratio, so it does not stop because a difference has just
    appeared. What optional stopping still costs in coverage is measured by `benchmarks/measure.py coverage
    --sequential`.
    """

    max_rounds: int | None = None
    precision: float | None = None
    time_limit_s: float | None = None

    def rounds(self) -> Iterator[int]:
        """Count the rounds that may begin: none that would end after the time limit, but always `MIN_ROUNDS`."""
        start, index = time.monotonic(), 0
        while self.max_rounds is None or index < self.max_rounds:
            elapsed = time.monotonic() - start
            limit = self.time_limit_s if self.time_limit_s is not None else float("inf")
            if index >= MIN_ROUNDS and elapsed * (index + 1) / index > limit:
                return
            yield index
            index += 1

    def precise(self, num_rounds: int, half_widths: list[float | None]) -> bool:
        """True when every watched interval is as tight as asked."""
        if self.precision is None or num_rounds < MIN_ROUNDS_TO_STOP:
            return False
        return all(width is not None and width <= self.precision for width in half_widths)
