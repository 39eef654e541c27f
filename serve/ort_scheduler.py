"""Which sequence gets which row of the KV buffer, and what the next step computes.

Rows 0 .. n - 1 are the sequences being decoded, without holes, so one step advances them all; row n belongs
to the one sequence whose prompt is being read. When a row in the middle is freed, the last one moves into it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from prune2serve.serve.generation import Sequence


@dataclass(frozen=True)
class Move:
    """Copy the first `length` positions of row `source` over row `target`."""

    source: int
    target: int
    length: int


@dataclass
class Scheduler:
    """Sequences waiting, reading their prompt, and running. Not thread-safe."""

    num_rows: int
    waiting: deque[Sequence] = field(default_factory=deque)
    prefilling: Sequence | None = None
    running: list[Sequence] = field(default_factory=list)
    """The index is the row."""

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.prefilling or self.running)

    @property
    def num_active(self) -> int:
        return len(self.running) + (self.prefilling is not None)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def next_prefill(self) -> tuple[Sequence, int] | None:
        """Return the sequence whose prompt is to be read on and its row; admits a waiting one to a free
        row."""
        if self.prefilling is None and self.waiting and len(self.running) < self.num_rows:
            self.prefilling = self.waiting.popleft()
        if self.prefilling is None:
            return None
        return self.prefilling, len(self.running)

    def promote(self) -> None:
        """The prompt has been read: its sequence decodes from now on, in the row it has."""
        assert self.prefilling is not None
        self.running.append(self.prefilling)
        self.prefilling = None

    def release(self, sequence: Sequence) -> list[Move]:
        """Forget a sequence wherever it is; return the copies that close the hole, to be made in order."""
        if sequence is self.prefilling:
            self.prefilling = None
            return []
        if sequence not in self.running:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            return []
        row, last = self.running.index(sequence), len(self.running) - 1
        moves = []
        if row != last:
            self.running[row] = self.running[last]
            moves.append(Move(last, row, self.running[row].num_cached))
        self.running.pop()
        if self.prefilling is not None and self.prefilling.num_cached:
            moves.append(Move(last + 1, last, self.prefilling.num_cached))
        return moves

    def clear(self) -> list[Sequence]:
        """Forget everything; return what was there, oldest first."""
        everything = [*self.running, *([self.prefilling] if self.prefilling else []), *self.waiting]
        self.waiting.clear()
        self.prefilling = None
        self.running.clear()
        return everything
