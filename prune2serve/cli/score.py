"""`prune2serve score`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prune2serve.devices import DTYPES

if TYPE_CHECKING:
    from prune2serve.records import LayerScores

BAR = 16


@click.command(short_help="Score the decoder layers: a table and a chart.")
@click.option("--model", default="sample", show_default=True, help="Directory, hub id, .gguf file, or `sample`.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--calibration", default="self", show_default=True, metavar="TEXT", help="As in build.")
@click.option("--score-windows", default=16, show_default=True, help="Windows that the layers are scored on.")
@click.option("--window", default=512, show_default=True, help="Tokens a window.")
@click.option("--chart", default="block_influence", show_default=True, help="Metric that is drawn.")
@click.option("--output", type=click.Path(path_type=Path), help="Also write the scores as JSON to this file.")
@click.option("--device", default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--force", is_flag=True, help="Replace the output file when it exists.")
@click.option("--trust-remote-code", is_flag=True)
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(
    score_windows: int,
    window: int,
    chart: str,
    output: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **chosen: Any,
) -> None:
    """Score the decoder layers of a model; higher = keep."""
    from prune2serve.calibration import Sizes
    from prune2serve.models import open_checkpoint
    from prune2serve.options import BuildOptions
    from prune2serve.pipeline import check_checkpoint
    from prune2serve.planning import score
    from prune2serve.progress import set_quiet
    from prune2serve.staging import refuse_existing, write_text
    from prune2serve.workbench import Workbench

    set_quiet(quiet)
    if output:
        refuse_existing(output, force=force)
    options = BuildOptions(sizes=Sizes(score=score_windows, search=1, report=1, window=window), **chosen)
    parent = open_checkpoint(options.model, revision=options.revision)
    check_checkpoint(parent)
    scores = score(Workbench(parent, options))
    if output:
        write_text(output, scores.to_json())
    if as_json:
        click.echo(scores.to_json(), nl=False)
    else:
        print_table(scores, chart)


def print_table(scores: LayerScores, chart: str) -> None:
    """One row a layer, the chosen metric drawn on a logarithmic scale."""
    import math

    from rich.console import Console
    from rich.table import Table

    from prune2serve.errors import Prune2ServeError, near_match

    if chart not in scores.metrics:
        raise Prune2ServeError(
            f"no metric {chart!r}{near_match(chart, scores.metrics)} Known metrics: {', '.join(scores.metrics)}"
        )
    values = [math.log(max(value, 1e-12)) for value in scores.metrics[chart]]
    low, span = min(values), (max(values) - min(values)) or 1.0
    title = f"{scores.tokens} tokens; higher = keep; the chart is log {chart}"
    table = Table("layer", *scores.metrics, "chart", title=title)
    for layer, value in enumerate(values):
        bar = "█" * (1 + round((BAR - 1) * (value - low) / span))
        table.add_row(str(layer), *(f"{metric[layer]:.4g}" for metric in scores.metrics.values()), bar)
    Console().print(table)
