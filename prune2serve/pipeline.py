"""`build`: the stages in order. Reads like a table of contents."""

from __future__ import annotations

import resource
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune2serve import __version__, versions
from prune2serve.architectures import Architecture, architecture_of
from prune2serve.clock import Clock
from prune2serve.errors import Prune2ServeError
from prune2serve.export.checkpoint import hash_files, write_manifest, write_model_card
from prune2serve.lint import lint
from prune2serve.methods import check_method
from prune2serve.models import open_checkpoint
from prune2serve.options import BuildOptions
from prune2serve.planning import make_plan
from prune2serve.progress import say
from prune2serve.records import Checkpoint, Manifest, PruningPlan, QualityReport
from prune2serve.stage_store import StageStore
from prune2serve.staging import refuse_existing, staged_directory
from prune2serve.surgery import write_pruned
from prune2serve.tensors import check_finite, is_float, read_index, torch_dtype
from prune2serve.workbench import Workbench

if TYPE_CHECKING:
    import torch


def build(options: BuildOptions) -> Manifest:
    """Prune the model and write a deployable directory at `options.output`.

    Raises:
        Prune2ServeError: anything a user can mend; nothing is left at the output then.
    """
    check_method(options.method)
    refuse_existing(options.output, force=options.force)
    clock = Clock()
    with clock("open"):
        parent = open_checkpoint(options.model, revision=options.revision)
        refuse_overwriting_parent(parent, options.output)
        architecture = check_checkpoint(parent)
    bench = Workbench(parent, options)
    bench.check_inputs()
    store = StageStore(options.selection_key(parent.fingerprint), resume=options.resume)
    scores, plan = make_plan(bench, architecture.num_layers, store, clock)
    say(f"Removing layers {', '.join(map(str, plan.removed))} of {plan.num_layers} ({plan.method})")
    with staged_directory(options.output, force=options.force) as staging:
        with clock("surgery"):
            result = write_pruned(parent, plan, staging, max_shard_size=options.max_shard_size)
        manifest = Manifest(
            prune2serve_version=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model=parent.source,
            revision=parent.revision,
            parent_fingerprint=parent.fingerprint,
            plan=portable(plan),
            scores=scores,
            files={},
            num_parameters={"parent": result.num_parameters_parent, "pruned": result.num_parameters_pruned},
            seed=options.seed,
            engines=engine_verdicts(staging),
            **({} if options.surgery_only else prove_and_measure(bench, plan, staging, clock)),
            versions=versions.installed(),
            command=tuple(sys.argv[1:]),
        )
        manifest = finish(manifest, bench, staging, clock)
    store.clear()
    return manifest


def refuse_overwriting_parent(parent: Checkpoint, output: Path) -> None:
    """Raise when the output would replace the model it is made from, which --force must never do."""
    target, source = output.resolve(), parent.path.resolve()
    if source == target or target in source.parents:
        raise Prune2ServeError(f"--output {output} holds the model itself ({parent.source}): choose another --output")


def plan_only(options: BuildOptions) -> PruningPlan:
    """What `build` would do; nothing is written."""
    check_method(options.method)
    parent = open_checkpoint(options.model, revision=options.revision)
    architecture = check_checkpoint(parent)
    store = StageStore(options.selection_key(parent.fingerprint), resume=options.resume)
    try:
        plan = make_plan(Workbench(parent, options), architecture.num_layers, store, Clock())[1]
    finally:
        store.clear()
    return portable(plan)


def check_checkpoint(parent: Checkpoint) -> Architecture:
    """Read the index and every weight once: damage and unknown architectures are named before any long work."""
    index = read_index(parent.path)
    architecture = architecture_of(parent.config, index.entries)
    check_finite(index)
    return architecture


def prove_and_measure(bench: Workbench, plan: PruningPlan, staging: Path, clock: Clock) -> dict[str, Any]:
    """Reload what was written with stock transformers, prove it, and measure its quality."""
    from prune2serve.proof import prove_reload

    with clock("proof"):
        pruned = bench.load(open_checkpoint(str(staging)))
        proof = prove_reload(bench.model, pruned, plan, stored_dtype(bench.parent))
    with clock("quality"):
        quality = bench.measure(pruned)
    calibration = {
        "source": bench.options.calibration,
        "sizes": vars(bench.options.sizes),
        "report_split_sha256": bench.calibration.report.sha256 if bench.options.text is None else None,
        "dtype": proof["dtype"],
    }
    return {
        "reload_proof": proof,
        "quality": quality,
        "calibration": calibration,
        "gates": gates(bench.options, quality),
    }


def stored_dtype(parent: Checkpoint) -> torch.dtype:
    """The dtype of the parent's weights on disk."""
    entries = read_index(parent.path).entries.values()
    return torch_dtype(max((entry for entry in entries if is_float(entry)), key=lambda entry: entry.size_bytes))


def engine_verdicts(staging: Path) -> dict[str, dict[str, str]]:
    """Ask, engine by engine, whether the pruned config will be served as it is meant; say where it will not."""
    config = open_checkpoint(str(staging)).config
    verdicts: dict[str, dict[str, str]] = {
        finding.engine: {"verdict": finding.verdict, "why": finding.why} for finding in lint(config)
    }
    for engine, found in verdicts.items():
        if found["verdict"] in ("wrong", "refused"):
            say(f"Do not serve this on {engine} ({found['verdict']}): {found['why']}")
    return verdicts


def portable(plan: PruningPlan) -> PruningPlan:
    """The plan without this machine's paths: what a replacement's file held is in the weights now."""
    named = tuple(replace(replacement, path=Path(replacement.path).name) for replacement in plan.replacements)
    return replace(plan, replacements=named)


def gates(options: BuildOptions, quality: QualityReport) -> dict[str, Any]:
    """Judge the gates the user set; a failed one marks the artifact and ends the command with exit code 3."""
    if options.max_perplexity_ratio is None:
        return {}
    ratio, limit = quality.perplexity.ratio, options.max_perplexity_ratio
    return {"max_perplexity_ratio": {"limit": limit, "value": ratio, "passed": ratio <= limit}}


def finish(manifest: Manifest, bench: Workbench, staging: Path, clock: Clock) -> Manifest:
    """Export to ONNX where asked, then write the model card and the manifest over everything there is."""
    if "onnx" in bench.options.formats:
        with clock("onnx"):
            manifest = replace(manifest, onnx=export_onnx(bench, staging))
    manifest = replace(
        manifest,
        seconds=clock.seconds,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    write_model_card(staging, bench.parent, manifest)
    manifest = replace(manifest, files=hash_files(staging))
    write_manifest(staging, manifest)
    return manifest


def export_onnx(bench: Workbench, staging: Path) -> dict[str, Any]:
    """Export and compare with transformers; a judged export that differs is an error."""
    from prune2serve.export.onnx_graph import ensure_onnx
    from prune2serve.export.parity import check_parity, require_parity

    precision, device = bench.onnx_target
    result = check_parity(staging, ensure_onnx(staging, precision, device))
    require_parity(result)
    return {precision: result}
