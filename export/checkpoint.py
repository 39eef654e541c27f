"""What makes a pruned checkpoint a deployable directory: its manifest and its model card."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

from prune2serve.errors import Prune2ServeError
from prune2serve.paths import MANIFEST_NAME
from prune2serve.records import Checkpoint, Manifest


def hash_files(directory: Path) -> dict[str, str]:
    """sha256 of every file below the directory but the manifest itself, by relative name."""
    hashes = {}
    for file in sorted(directory.rglob("*")):
        if file.is_file() and file.name != MANIFEST_NAME:
            with file.open("rb") as stream:
                hashes[file.relative_to(directory).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def read_manifest(directory: Path) -> Manifest:
    """Read prune2serve.json.

    Raises:
        Prune2ServeError: the directory is missing, is no build, or its manifest does not fit.
    """
    file = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise Prune2ServeError(f"no build at {directory}: run prune2serve build, or name the directory of one")
    if not file.is_file():
        raise Prune2ServeError(f"{directory} has no {MANIFEST_NAME}: it was not made by prune2serve build")
    return Manifest.from_json(file.read_bytes(), origin=str(file))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def write_model_card(directory: Path, parent: Checkpoint, manifest: Manifest) -> None:
    """README.md with front matter a hub accepts, and what was removed, how, and what it cost."""
    front = yaml.safe_dump(_front_matter(parent, manifest), sort_keys=False)
    (directory / "README.md").write_text(f"---\n{front}---\n\n{_body(parent, manifest)}", encoding="utf-8")


def parent_card(parent: Checkpoint) -> dict[str, Any]:
    """The front matter of the parent's own model card, or nothing."""
    card = parent.path / "README.md"
    if not card.is_file():
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return front if isinstance(front, dict) else {}


def _front_matter(parent: Checkpoint, manifest: Manifest) -> dict[str, Any]:
    card = parent_card(parent)
    name, licence = _hub_name(parent), card.get("license")
    if parent.source == "sample":
        licence = "apache-2.0"
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if isinstance(licence, str):
        front["license"] = licence
        for key in ("license_name", "license_link"):
            if key in card:
                front[key] = card[key]
    if name:
        front |= {"base_model": name, "base_model_relation": "finetune"}
    if card.get("language"):
        front["language"] = card["language"]
    front["tags"] = ["prune2serve", "pruned", "depth-pruning", manifest.plan.method]
    return front


def _hub_name(parent: Checkpoint) -> str | None:
    """The parent's id on the hub; a local path is nobody else's business and stays out of the card."""
    if parent.source == "sample":
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return None if Path(parent.source).exists() else parent.source


def _body(parent: Checkpoint, manifest: Manifest) -> str:
    plan, parameters = manifest.plan, manifest.num_parameters
    name = _hub_name(parent) or Path(parent.source).name
    lines = [
        f"# {name.split('/')[-1]} with {len(plan.kept)} of {plan.num_layers} decoder layers",
        "",
        f"Made from `{name}` by [prune2serve](https://pypi.org/project/prune2serve/) {manifest.prune2serve_version}: "
        f"{len(plan.removed)} decoder layers removed, {parameters['parent'] / 1e6:.1f}M parameters down to "
        f"{parameters['pruned'] / 1e6:.1f}M.",
        "",
        f"- **Removed layers** (the parent's numbering, from 0): {', '.join(map(str, plan.removed)) or 'none'}",
        f"- **Chosen by** `{plan.method}`{': ' + plan.why if plan.why else ''}",
    ]
    for merge in plan.merges:
        lines.append(f"- **Merged** layers {merge.low} to {merge.high} into one ({merge.rule})")
    for replacement in plan.replacements:
        lines.append(f"- **Replaced** tensors of layer {replacement.layer} ({replacement.kind})")
    if manifest.healing:
        lines.append(f"- **Healed** by {manifest.healing.get('method', 'a fine-tune')}")
    lines += ["", *_quality(manifest), "", *_usage()]
    return "\n".join(lines) + "\n"


def _quality(manifest: Manifest) -> list[str]:
    quality = manifest.quality
    if quality is None:
        return ["The quality of this model was not measured."]
    perplexity = quality.perplexity
    lines = [
        "## What it cost",
        "",
        "| | parent | pruned |",
        "|---|---|---|",
        f"| perplexity | {perplexity.parent:.2f} | {perplexity.pruned:.2f} ± {perplexity.standard_error:.2f} |",
        f"| KL to the parent (nats per token) | 0 | {quality.kl:.3f} ± {quality.kl_standard_error:.3f} |",
        f"| same most likely token | 100 % | {100 * quality.top1_agreement:.1f} % |",
        *(
            f"| {task.name} {name} ({task.num_items} items) | {100 * m.parent:.1f} % | "
            f"{100 * m.pruned:.1f} ± {100 * m.pruned_standard_error:.1f} % |"
            for task in quality.tasks
            for name, m in task.metrics.items()
        ),
        "",
        f"Measured on {quality.num_tokens} tokens of held-out text ({Path(quality.text).name}).",
    ]
    if quality.verdict:
        reasons = f": {'; '.join(quality.reasons)}" if quality.reasons else ""
        lines += ["", f"Verdict: **{quality.verdict}**{reasons}."]
    failed = [name for name, gate in manifest.gates.items() if not gate.get("passed", True)]
    if failed:
        lines.append(f"**This build failed its gate: {', '.join(failed)}.**")
    return lines


def _usage() -> list[str]:
    return [
        "## Use",
        "",
        "A stock model directory: transformers, vLLM and ONNX Runtime load it as it is.",
        "",
        f"`{MANIFEST_NAME}` holds the plan, the layer scores, every file's hash and the command that made it.",
    ]


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Check every file's hash.

    Raises:
        Prune2ServeError: a file is missing or differs.
    """
    for name, expected in manifest.files.items():
        file = directory / name
        if not file.is_file():
            raise Prune2ServeError(f"{file} is missing: the build is damaged, run prune2serve build again")
        with file.open("rb") as stream:
            got = hashlib.file_digest(stream, "sha256").hexdigest()
        if got != expected:
            raise Prune2ServeError(f"{file} has sha256 {got}, its manifest says {expected}: the build was changed")
