"""`--tasks` and how its results are printed, for every command that measures quality."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from prune2serve.records import QualityReport

F = TypeVar("F", bound=Callable[..., Any])

ENDINGS = (".jsonl", ".ndjson")


class TasksCommand(click.Command):
    """Lets `--tasks` take several files, as a shell's wildcard gives them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_one_file_an_option(args)))


def _one_file_an_option(args: list[str]) -> Iterator[str]:
    """`--tasks a.jsonl b.jsonl` -> `--tasks a.jsonl --tasks b.jsonl`."""
    listing = False
    for i, argument in enumerate(args):
        first = i > 0 and args[i - 1] == "--tasks"
        listing = first or (listing and argument.endswith(ENDINGS))
        if listing and not first:
            yield "--tasks"
        yield argument


def task_options(command: F) -> F:
    """Add --tasks (a tuple of paths) and --tasks-limit."""
    command = click.option(
        "--tasks-limit", "--limit", type=int, metavar="N", help="Only the first items of each task file."
    )(command)
    return click.option(
        "--tasks", multiple=True, type=click.Path(path_type=Path), metavar="FILE.jsonl ...",
        help="Zero-shot tasks: items with query, choices and gold, or context and continuation.",
    )(command)  # fmt: skip


def task_lines(report: QualityReport) -> list[str]:
    """One line a task and metric: both models, and the difference with its 95% interval."""
    width = max((len(task.name) for task in report.tasks), default=0)
    lines = []
    for task in report.tasks:
        for name, m in task.metrics.items():
            low, high = (100 * bound for bound in m.interval)
            lines.append(
                f"{task.name:<{width}}  {name:<8}  {100 * m.parent:5.1f} ± {100 * m.parent_standard_error:.1f} % -> "
                f"{100 * m.pruned:5.1f} ± {100 * m.pruned_standard_error:.1f} %  "
                f"({100 * m.difference:+.1f}, 95% interval {low:+.1f} to {high:+.1f}, {task.num_items} items)"
            )
        if found := task.stability:
            lines.append(
                f"{task.name:<{width}}  stability {found.value:.3f} "
                f"({100 * found.unchanged:.1f} % of answers unchanged; {found.effective_items:.1f} items weigh)"
            )
    return lines


def verdict_line(report: QualityReport) -> str:
    """`collapsed: reason; reason`."""
    return f"{report.verdict}{': ' + '; '.join(report.reasons) if report.reasons else ''}"
