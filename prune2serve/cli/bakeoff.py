"""`prune2serve bakeoff`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prune2serve.cli.task_options import TasksCommand, task_options
from prune2serve.devices import DTYPES
from prune2serve.errors import Prune2ServeError

if TYPE_CHECKING:
    from prune2serve.bakeoff import Bakeoff

DEFAULT_METHODS = "simdiff,block-influence,angular,relative-magnitude"


@click.command(cls=TasksCommand, short_help="Compare several methods on one model: quality against size.")
@click.option("--model", default="sample", show_default=True, help="Directory, hub id, .gguf file, or `sample`.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option(
    "--methods", default=DEFAULT_METHODS, show_default=True, metavar="A,B+STAGE",
    help="Selectors, each with what follows it: +refine, +linear-fold, +auto (the fold where it helps).",
)  # fmt: skip
@click.option("--ratios", default="0.1,0.2,0.25", show_default=True, help="Fractions of the decoder layers to remove.")
@click.option("--refine", type=int, default=0, help="Layer sets that +refine may try.  [default: 100]")
@click.option("--refine-seconds", default=float("inf"), help="Time limit of each +refine.")
@click.option("--protect-first", default=1, show_default=True, help="First layers that are never removed.")
@click.option("--protect-last", default=1, show_default=True, help="Last layers that are never removed.")
@click.option("--calibration", default="self", show_default=True, metavar="TEXT", help="As in build.")
@click.option("--score-windows", default=16, show_default=True, help="Windows that the layers are scored on.")
@click.option("--search-windows", default=8, show_default=True, help="Windows that selectors may search on.")
@click.option("--report-windows", default=8, show_default=True, help="Windows that quality is reported on.")
@click.option("--window", default=512, show_default=True, help="Tokens a window.")
@click.option("--text", type=click.Path(path_type=Path), help="Report quality on this file instead.")
@click.option("--text-windows", type=int, help="Only its first windows.")
@task_options
@click.option("--output", type=click.Path(path_type=Path), default=Path("bakeoff"), show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--force", is_flag=True, help="Measure rows again that --output holds with other settings.")
@click.option("--trust-remote-code", is_flag=True, help="Let the model run code of its own. Off unless you say so.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(methods: str, ratios: str, output: Path, as_json: bool, quiet: bool, **chosen: Any) -> None:
    """Compare several methods on one model: perplexity, KL, tasks, time and memory against size.

    Writes bakeoff.json, bakeoff.html and the chart bakeoff.svg to --output. Rows that are done are saved there at
    once: run the same command again to continue, or with more methods and ratios to add to it.
    """
    names, fractions = split_list(methods, "--methods"), [fraction(part) for part in split_list(ratios, "--ratios")]
    from prune2serve.bakeoff import bakeoff
    from prune2serve.calibration import Sizes
    from prune2serve.options import BuildOptions
    from prune2serve.progress import set_quiet

    set_quiet(quiet)
    sizes = Sizes(*(chosen.pop(name) for name in ("score_windows", "search_windows", "report_windows", "window")))
    result = bakeoff(BuildOptions(sizes=sizes, **chosen), names, fractions, output)
    write_files(result, output)
    if as_json:
        click.echo(result.to_json(), nl=False)
        return
    print_table(result)
    click.echo(f"{output / 'bakeoff.html'}: the chart and this table")


def split_list(text: str, option: str) -> list[str]:
    """Parse `a,b,c` without repetitions.

    Raises:
        Prune2ServeError: it names nothing.
    """
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise Prune2ServeError(f"{option} {text!r} names nothing: give a list such as a,b,c")
    return parts


def fraction(text: str) -> float:
    """Parse one ratio.

    Raises:
        Prune2ServeError: it is no number.
    """
    try:
        return float(text)
    except ValueError:
        raise Prune2ServeError(f"--ratios: {text!r} is no number: give fractions such as 0.1,0.25") from None


def write_files(result: Bakeoff, output: Path) -> None:
    """JSON always; the chart and the page when at least one row was measured.

    Raises:
        Prune2ServeError: no method gave a model.
    """
    from prune2serve.bakeoff_report import chart, page
    from prune2serve.staging import write_text

    write_text(output / "bakeoff.json", result.to_json())
    if not any(row.quality for row in result.rows):
        raise Prune2ServeError(f"no method gave a model: {result.rows[0].method}: {result.rows[0].error}")
    write_text(output / "bakeoff.svg", str(chart(result)) + "\n")
    write_text(output / "bakeoff.html", page(result))


def print_table(result: Bakeoff) -> None:
    """On stdout, wide enough for every column; a star marks the Pareto front of KL against size."""
    from prune2serve.bakeoff_report import table

    header, cells = table(result)
    widths = [max(len(row[i]) for row in [header, *cells] if i != 3 or len(row[i]) < 40) for i in range(len(header))]
    for row in [header, *cells]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
