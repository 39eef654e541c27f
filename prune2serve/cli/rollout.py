"""`prune2serve rollout`: the files that hand a build and its parent to gateways and clusters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command("rollout")
@click.argument("directory", type=click.Path(path_type=Path), required=False)
@click.option("--output", type=click.Path(path_type=Path), default=Path("prune2serve-rollout"), show_default=True)
@click.option("--weight", type=int, default=10, show_default=True, help="Percentage of the traffic for the build.")
@click.option("--model-name", help="The public name clients ask for. [default: the parent's]")
@click.option("--baseline-uri", help="Where the cluster finds the parent's weights. [default: its hub id or path]")
@click.option("--candidate-uri", help="Where the cluster finds the build's weights. [default: its path]")
@click.option("--baseline-url", default="http://baseline:8000", show_default=True, help="The parent's endpoint.")
@click.option("--candidate-url", default="http://candidate:8000", show_default=True, help="The build's endpoint.")
@click.option("--comparison", type=click.Path(path_type=Path), help="What measure --json printed: sets the gates.")
@click.option("--namespace", default="default", show_default=True)
@click.option("--gateway", default="gateway", show_default=True, help="The Gateway API gateway's name.")
@click.option("--image", default="vllm/vllm-openai:v0.24.0", show_default=True)
@click.option("--num-gpus", type=click.IntRange(1), default=1, show_default=True, help="Of one replica on one node.")
@click.option("--num-nodes", type=click.IntRange(1), default=1, show_default=True, help="Of one replica.")
@click.option("--accelerator", help="Ray's name for the GPU, such as H100.")
@click.option("--prometheus", default="http://prometheus.monitoring:9090", show_default=True)
@click.option("--mirror-percent", type=click.IntRange(1, 100), default=10, show_default=True)
@click.option("--force", is_flag=True, help="Replace --output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(directory: Path | None, **options: Any) -> None:
    """Write rollout files for the build in DIRECTORY (default: the last build) and its parent."""
    from prune2serve.export.checkpoint import read_manifest
    from prune2serve.paths import DEFAULT_OUTPUT
    from prune2serve.serve.rollout import read_comparison, write_rollout

    directory = directory or DEFAULT_OUTPUT
    manifest = read_manifest(directory)
    comparison = read_comparison(options["comparison"]) if options["comparison"] else None
    settings = _settings(directory, manifest, options)
    files = write_rollout(settings, options["output"], comparison, force=options["force"])
    if as_json := options["as_json"]:
        click.echo(json.dumps({"output": str(options["output"]), "files": [file.name for file in files]}, indent=2))
    if not as_json:
        for file in files:
            click.echo(file)


def _settings(directory: Path, manifest: Any, options: dict[str, Any]) -> Any:
    from prune2serve.serve.rollout_settings import Arm, RolloutSettings, split_weight
    from prune2serve.serve.targets import arm_names

    base_weight, weight = split_weight(options["weight"])
    model, base_name, name = arm_names(manifest)
    baseline_uri = options["baseline_uri"] or manifest.model
    candidate_uri = options["candidate_uri"] or str(directory.resolve())
    return RolloutSettings(
        model=options["model_name"] or model,
        baseline=Arm("baseline", base_name, baseline_uri, options["baseline_url"].rstrip("/"), base_weight),
        candidate=Arm("candidate", name, candidate_uri, options["candidate_url"].rstrip("/"), weight),
        namespace=options["namespace"],
        gateway=options["gateway"],
        image=options["image"],
        num_gpus=options["num_gpus"],
        num_nodes=options["num_nodes"],
        accelerator=options["accelerator"],
        prometheus=options["prometheus"],
        mirror_percent=options["mirror_percent"],
    )
