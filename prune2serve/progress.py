"""What the user sees on stderr while something runs: a bar on a terminal, a line per stage elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")

console = Console(stderr=True, highlight=False)
"""Everything that is not a result goes here; stdout is for results."""


def set_quiet(quiet: bool) -> None:
    """Silence progress and log lines; errors and results still print."""
    console.quiet = quiet


def say(message: str) -> None:
    """Print one log line on stderr."""
    console.print(message, soft_wrap=True, markup=False)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal or console.quiet,
    )


class Task:
    """A running bar: `advance` moves it, `describe` says what it is doing now."""

    def __init__(self, progress: Progress, task_id: int) -> None:
        self._progress = progress
        self._task_id = task_id

    def advance(self, steps: float = 1) -> None:
        self._progress.advance(self._task_id, steps)  # type: ignore[arg-type]

    def describe(self, description: str) -> None:
        self._progress.update(self._task_id, description=description)  # type: ignore[arg-type]


@contextmanager
def task(description: str, total: float | None) -> Iterator[Task]:
    """A bar for work whose steps the caller counts; a line with the time it took where there is no terminal."""
    start = time.monotonic()
    with _bar() as progress:
        yield Task(progress, progress.add_task(description, total=total))
    if not console.is_terminal:
        say(f"{description}: {time.monotonic() - start:.1f} s")


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items with a bar."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with task(description, total) as bar:
        for item in items:
            yield item
            bar.advance()
