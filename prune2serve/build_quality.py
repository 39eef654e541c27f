"""Measure a finished build again: open it and its parent from the manifest."""

from __future__ import annotations

from pathlib import Path

from prune2serve.calibration import Sizes
from prune2serve.errors import Prune2ServeError
from prune2serve.export.checkpoint import read_manifest
from prune2serve.models import open_checkpoint
from prune2serve.options import BuildOptions
from prune2serve.records import Checkpoint, Manifest, QualityReport
from prune2serve.workbench import Workbench


def evaluate_build(
    directory: Path,
    *,
    text: Path | None = None,
    text_windows: int | None = None,
    tasks: tuple[Path, ...] = (),
    tasks_limit: int | None = None,
    window: int = 512,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> QualityReport:
    """Quality of a build against its parent, on `text` or on the report split the build used, and on tasks.

    Raises:
        Prune2ServeError: no build there, or its parent has changed since.
    """
    manifest = read_manifest(directory)
    parent = open_parent(manifest)
    calibration = manifest.calibration
    if text is None and not calibration:
        raise Prune2ServeError(f"{directory} was built without calibration text: name a text with --text FILE")
    sizes = Sizes(**calibration["sizes"]) if text is None else Sizes(window=window)
    options = BuildOptions(
        model=manifest.model,
        calibration=calibration.get("source", "self"),
        sizes=sizes,
        seed=manifest.seed,
        text=text,
        text_windows=text_windows,
        tasks=tasks,
        tasks_limit=tasks_limit,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    bench = Workbench(parent, options)
    bench.check_inputs()
    expected = calibration.get("report_split_sha256")
    if text is None and expected and bench.calibration.report.sha256 != expected:
        raise Prune2ServeError(
            f"the calibration text {options.calibration} no longer gives the windows that {directory} was reported on: "
            "name a text with --text FILE"
        )
    return bench.measure(bench.load(open_checkpoint(str(directory))))


def open_parent(manifest: Manifest) -> Checkpoint:
    """Open the unpruned model a build was made from.

    Raises:
        Prune2ServeError: it is gone, or it is another model now.
    """
    parent = open_checkpoint(manifest.model, revision=manifest.revision)
    if parent.fingerprint != manifest.parent_fingerprint:
        raise Prune2ServeError(
            f"{manifest.model} is not the model this build was made from (its fingerprint is "
            f"{parent.fingerprint[:12]}, the manifest says {manifest.parent_fingerprint[:12]}): build again"
        )
    return parent
