"""`prune2serve build`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prune2serve.cli.task_options import TasksCommand, task_lines, task_options, verdict_line
from prune2serve.devices import DTYPES
from prune2serve.errors import GateFailedError, Prune2ServeError
from prune2serve.paths import DEFAULT_OUTPUT

if TYPE_CHECKING:
    from prune2serve.records import Manifest

SIZES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "b": 1, "": 1}


def layer_list(text: str | None) -> tuple[int, ...] | None:
    """Parse `3,4,5` or `12-17,25`.

    Raises:
        Prune2ServeError: something that is neither a number nor a range.
    """
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        try:
            run = range(int(low), int(high if dash else low) + 1)
            if not run:
                raise ValueError
            layers.extend(run)
        except ValueError:
            raise Prune2ServeError(
                f"--remove {text}: {part!r} is no layer: expected a list such as 3,4,5 or 12-17,25"
            ) from None
    if not layers:
        raise Prune2ServeError(f"--remove {text!r} names no layer: expected a list such as 3,4,5")
    return tuple(layers)


def byte_size(text: str) -> int:
    """Parse `5GB`, `500MB` or a number of bytes.

    Raises:
        Prune2ServeError: anything else.
    """
    number = text.strip().lower()
    unit = number.lstrip("0123456789.")
    try:
        size = int(float(number[: len(number) - len(unit)]) * SIZES[unit.strip()])
    except (ValueError, KeyError):
        raise Prune2ServeError(
            f"--max-shard-size {text}: expected a size such as 5GB, 500MB or a number of bytes"
        ) from None
    return size


@click.command(cls=TasksCommand, short_help="Prune a model into a deployable directory.")
@click.option("--model", default="sample", show_default=True, help="Directory, hub id, .gguf file, or `sample`.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--ratio", type=float, help="Fraction of the decoder layers to remove.  [default: 0.25]")
@click.option("--num-layers", type=int, help="Decoder layers the pruned model shall have.")
@click.option("--remove", metavar="LIST", help="Remove exactly these layers, such as 3,4,5 or 12-17,25.")
@click.option("--method", default="simdiff", show_default=True, help="Selector.")
@click.option("--refine", default=0, show_default=True, help="Layer sets a local search may try after the selector.")
@click.option("--refine-seconds", default=float("inf"), help="Time limit of that search.")
@click.option(
    "--compensate",
    default="auto",
    show_default=True,
    help="linear-fold, none, or auto: where it is valid and helps.",
)
@click.option(
    "--merge-rule",
    default="telescoped",
    show_default=True,
    help="How sliding-merge merges: telescoped, delta-sum or average.",
)
@click.option("--replacement", default="layer", show_default=True, help="What streamline trains: layer or mlp.")
@click.option(
    "--replacement-loss", default="mse", show_default=True, help="What streamline minimises: mse or llm-loss."
)
@click.option("--replacement-steps", default=96, show_default=True, help="Training steps of streamline.")
@click.option("--protect-first", default=1, show_default=True, help="First layers that are never removed.")
@click.option("--protect-last", default=1, show_default=True, help="Last layers that are never removed.")
@click.option(
    "--calibration", default="self", show_default=True, metavar="TEXT",
    help="Text or JSONL file, hub:NAME[:config][:split], or `self`: the parent's own samples.",
)  # fmt: skip
@click.option("--score-windows", default=16, show_default=True, help="Windows that the layers are scored on.")
@click.option("--search-windows", default=8, show_default=True, help="Windows that selectors may search on.")
@click.option("--report-windows", default=8, show_default=True, help="Windows that quality is reported on.")
@click.option("--window", default=512, show_default=True, help="Tokens a window.")
@click.option("--text", type=click.Path(path_type=Path), help="Report quality on this file instead.")
@click.option("--text-windows", type=int, help="Only its first windows.")
@task_options
@click.option("--format", "formats", default="safetensors", show_default=True, help="safetensors, or safetensors,onnx.")
@click.option("--precision", help="Of the ONNX export.  [default: fp32 on a CPU, fp16 on a GPU]")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weight file.")
@click.option("--max-perplexity-ratio", type=float, help="Gate: exit 3 when pruned / parent perplexity is above.")
@click.option("--output", type=click.Path(path_type=Path), default=DEFAULT_OUTPUT, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    show_default=True,
)
@click.option("--seed", default=0, show_default=True)
@click.option("--surgery-only", is_flag=True, help="With --remove: write the directory, measure nothing.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--resume", is_flag=True, help="Continue an interrupted build with the same settings.")
@click.option("--force", is_flag=True, help="Replace the output directory when it exists.")
@click.option("--trust-remote-code", is_flag=True, help="Let the model run code of its own. Off unless you say so.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(
    as_json: bool,
    quiet: bool,
    dry_run: bool,
    remove: str | None,
    formats: str,
    max_shard_size: str,
    **chosen: Any,
) -> None:
    """Prune a model into a deployable directory.

    Scores the decoder layers on calibration text, removes some, writes a stock Hugging Face directory, proves
    that it loads, and measures what it cost.
    """
    removed, shard_size = layer_list(remove), byte_size(max_shard_size)
    from prune2serve.calibration import Sizes
    from prune2serve.methods.base import SelectorOptions
    from prune2serve.options import BuildOptions
    from prune2serve.pipeline import build, plan_only
    from prune2serve.progress import set_quiet

    set_quiet(quiet)
    sizes = Sizes(*(chosen.pop(name) for name in ("score_windows", "search_windows", "report_windows", "window")))
    selector = SelectorOptions(
        *(chosen.pop(name) for name in ("merge_rule", "replacement", "replacement_loss", "replacement_steps"))
    )
    options = BuildOptions(
        selector=selector,
        remove=removed,
        formats=tuple(formats.split(",")),
        max_shard_size=shard_size,
        sizes=sizes,
        **chosen,
    )
    if dry_run:
        click.echo(plan_only(options).to_json(), nl=False)
        return
    manifest = build(options)
    click.echo(json.dumps(answer(manifest, options.output), indent=2) if as_json else summary(manifest, options.output))
    for name, gate in manifest.gates.items():
        if not gate["passed"]:
            raise GateFailedError(
                f"{name} is {gate['value']:.3f}, above {gate['limit']:g}: {options.output} is kept and marked as failed"
            )


def answer(manifest: Manifest, output: Path) -> dict[str, Any]:
    """What `build --json` prints."""
    plan, quality = manifest.plan, manifest.quality
    return {
        "output": str(output),
        "model": manifest.model,
        "num_layers": {"parent": plan.num_layers, "pruned": len(plan.kept)},
        "removed": list(plan.removed),
        "method": {"name": plan.method, "why": plan.why, **plan.settings},
        "quality": quality.to_dict() if quality else None,
        "num_parameters": manifest.num_parameters,
        "reload_proof": manifest.reload_proof,
        "engines": manifest.engines,
        "onnx": manifest.onnx,
        "gates": manifest.gates,
        "seconds": manifest.seconds,
        "peak_rss_bytes": manifest.peak_rss_bytes,
    }


def summary(manifest: Manifest, output: Path) -> str:
    """The same for a person."""
    plan, parameters = manifest.plan, manifest.num_parameters
    lines = [
        f"{output}: {len(plan.kept)} of {plan.num_layers} decoder layers, {parameters['pruned'] / 1e6:.1f}M of "
        f"{parameters['parent'] / 1e6:.1f}M parameters",
        f"  removed      {', '.join(map(str, plan.removed))}",
        f"  method       {plan.method}: {plan.why}",
    ]
    if quality := manifest.quality:
        p = quality.perplexity
        lines += [
            f"  perplexity   {p.parent:.2f} -> {p.pruned:.2f} ± {p.standard_error:.2f}  "
            f"(x{p.ratio:.2f} ± {p.ratio_standard_error:.2f}, {quality.num_tokens} tokens)",
            f"  KL           {quality.kl:.3f} ± {quality.kl_standard_error:.3f} nats per token",
            f"  same top-1   {100 * quality.top1_agreement:.1f} %",
        ]
        lines += [f"  {line}" for line in task_lines(quality)]
        if quality.verdict:
            lines.append(f"  verdict      {verdict_line(quality)}")
    if proof := manifest.reload_proof:
        lines.append(
            f"  reload proof logits differ by {proof['max_logit_difference']:.2g}, {proof['greedy_equal']} of "
            f"{proof['greedy_tokens']} greedy tokens equal"
        )
    for precision, parity in manifest.onnx.items():
        lines.append(
            f"  onnx {precision:<8}logits differ by {parity['max_logit_difference']:.2g}, {parity['greedy_equal']} of "
            f"{parity['greedy_tokens']} greedy tokens equal"
        )
    stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in manifest.seconds.items())
    lines.append(f"  seconds      {stages}; peak memory {manifest.peak_rss_bytes / 2**30:.2f} GiB")
    return "\n".join(lines)
