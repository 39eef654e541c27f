"""`prune2serve evaluate`."""

from __future__ import annotations

from pathlib import Path

import click

from prune2serve.cli.task_options import TasksCommand, task_lines, task_options, verdict_line
from prune2serve.devices import DTYPES
from prune2serve.paths import DEFAULT_OUTPUT


@click.command(cls=TasksCommand, short_help="Measure the quality of a build against its parent.")
@click.argument("directory", type=click.Path(path_type=Path), default=DEFAULT_OUTPUT)
@click.option("--text", type=click.Path(path_type=Path), help="Text to measure on  [default: the build's report split]")
@click.option("--text-windows", type=int, help="Only its first windows.")
@task_options
@click.option("--window", default=512, show_default=True, help="Tokens a window.")
@click.option("--device", default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--trust-remote-code", is_flag=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(
    directory: Path,
    text: Path | None,
    text_windows: int | None,
    tasks: tuple[Path, ...],
    tasks_limit: int | None,
    window: int,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure the quality of the build in DIRECTORY against its parent: perplexity, KL, top-1 agreement, repetition
    in what it writes, and zero-shot tasks."""
    from prune2serve.build_quality import evaluate_build
    from prune2serve.progress import set_quiet

    set_quiet(quiet)
    report = evaluate_build(
        directory,
        text=text,
        text_windows=text_windows,
        tasks=tasks,
        tasks_limit=tasks_limit,
        window=window,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        click.echo(report.to_json(), nl=False)
        return
    perplexity = report.perplexity
    click.echo(
        f"{report.text}: {report.num_tokens} tokens in {report.num_windows} windows\n"
        f"  perplexity  {perplexity.parent:.2f} -> {perplexity.pruned:.2f} ± {perplexity.standard_error:.2f}  "
        f"(x{perplexity.ratio:.2f} ± {perplexity.ratio_standard_error:.2f})\n"
        f"  KL          {report.kl:.3f} ± {report.kl_standard_error:.3f} nats per token\n"
        f"  same top-1  {100 * report.top1_agreement:.1f} %"
    )
    for line in task_lines(report):
        click.echo(f"  {line}")
    click.echo(f"  verdict     {verdict_line(report)}")
