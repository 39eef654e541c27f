"""`prune2serve export`: an existing model directory to ONNX, checked against the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("export")
@click.argument("directory", type=click.Path(path_type=Path), required=False)
@click.option(
    "--precision",
    multiple=True,
    help="fp32 or int4 (cpu); fp16, bf16 or int4 (cuda); more than once for several. [default: the first]",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--force", is_flag=True, help="Export again even when an export of these weights is there.")
@click.option("--parity/--no-parity", default=True, show_default=True, help="Compare with transformers afterwards.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(
    directory: Path | None,
    precision: tuple[str, ...],
    device: str,
    force: bool,
    parity: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Export the model in DIRECTORY (default: the last build) to DIRECTORY/onnx/PRECISION-DEVICE."""
    from prune2serve.errors import Prune2ServeError
    from prune2serve.export.onnx_graph import PRECISIONS, check_precision, ensure_onnx
    from prune2serve.export.parity import check_parity, require_parity
    from prune2serve.paths import DEFAULT_OUTPUT
    from prune2serve.progress import say, set_quiet

    set_quiet(quiet)
    directory = directory or DEFAULT_OUTPUT
    if not (directory / "config.json").is_file():
        raise Prune2ServeError(
            f"no model directory at {directory}: run `prune2serve build` first, or name a directory with config.json"
        )
    wanted = precision or (PRECISIONS[device][0],)
    for one in wanted:
        check_precision(one, device)
    results = []
    for one in wanted:
        target = ensure_onnx(directory, one, device, force=force)
        result = {"output": str(target), "precision": one, "device": device, "parity": None}
        if parity:
            say(f"Comparing {target} with transformers")
            result["parity"] = found = check_parity(directory, target)
            require_parity(found)
        results.append(result)
    if as_json:
        click.echo(json.dumps({"exports": results}, indent=2))
        return
    for result in results:
        click.echo(_line(result))


def _line(result: dict) -> str:
    parity = result["parity"]
    if parity is None:
        return f"{result['output']}"
    judged = "judged" if parity["passed"] else "reported, not judged"
    return (
        f"{result['output']}: largest logit difference {parity['max_logit_difference']:.2g} over a range of "
        f"{parity['logit_range']:.3g}, {parity['greedy_equal']}/{parity['greedy_tokens']} greedy tokens "
        "equal to "
        f"transformers' ({judged})"
    )
