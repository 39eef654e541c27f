"""What `serve` serves, under which name, and on which engine and device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prune2serve.errors import Prune2ServeError
from prune2serve.paths import MANIFEST_NAME
from prune2serve.records import Manifest


@dataclass(frozen=True)
class Target:
    """A model directory and the name that clients know it by."""

    directory: Path
    name: str


def choose_target(directory: Path, *, baseline: bool = False, force: bool = False) -> Target:
    """Find the model to serve: a build, with `baseline` its unpruned parent, or any model directory.

    The arms of a comparison get names that tell them apart: `PARENT@base` and `PARENT@pruned-22L`.

    Raises:
        Prune2ServeError: nothing is there, a plain directory has no parent, or the build's quality collapsed
        and
            `force` was not given.
    """
    from prune2serve.models import open_checkpoint

    if not directory.is_dir():
        raise Prune2ServeError(
            f"no model directory at {directory}: run `prune2serve build` first, or name one: prune2serve serve DIR"
        )
    manifest_file = directory / MANIFEST_NAME
    if not manifest_file.is_file():
        if baseline:
            raise Prune2ServeError(f"{directory} has no {MANIFEST_NAME}, so no parent is known: drop --baseline")
        checkpoint = open_checkpoint(str(directory))
        return Target(checkpoint.path, checkpoint.path.resolve().name)
    manifest = Manifest.from_json(manifest_file.read_bytes(), origin=str(manifest_file))
    _, base_name, name = arm_names(manifest)
    if baseline:
        return Target(open_checkpoint(manifest.model, revision=manifest.revision).path, base_name)
    if manifest.quality is not None and manifest.quality.verdict == "collapsed" and not force:
        why = f" ({'; '.join(manifest.quality.reasons)})" if manifest.quality.reasons else ""
        raise Prune2ServeError(
            f"the quality of {directory} has collapsed{why}: build with a smaller --ratio or heal it, or "
            "serve it "
            "all the same with --force"
        )
    open_checkpoint(str(directory))
    return Target(directory, name)


def choose_engine(asked: str, vllm_python: str | None) -> str:
    """Resolve `auto`: vLLM where a CUDA GPU and vLLM are there, else ONNX Runtime."""
    from prune2serve.serve.vllm_engine import find_vllm_python

    if asked != "auto":
        return asked
    if cuda_is_there() and find_vllm_python(vllm_python) is not None:
        return "vllm"
    return "onnxruntime"


def choose_device(asked: str) -> str:
    """Resolve `auto` for ONNX Runtime: CUDA where its provider and a GPU are there."""
    if asked != "auto":
        return asked
    try:
        import onnxruntime
    except ImportError:
        return "cpu"
    return "cuda" if "CUDAExecutionProvider" in onnxruntime.get_available_providers() and cuda_is_there() else "cpu"


def cuda_is_there() -> bool:
    """Whether torch sees a CUDA GPU."""
    import torch

    return torch.cuda.is_available()


def arm_names(manifest: Manifest) -> tuple[str, str, str]:
    """Return the parent's own name, and the served names of the parent and of the build."""
    name = _parent_name(manifest)
    return name, f"{name}@base", f"{name}@pruned-{len(manifest.plan.kept)}L"


def _parent_name(manifest: Manifest) -> str:
    """The parent's own name: the last part of a hub id or path."""
    if manifest.model == "sample":
        return "SmolLM2-135M-Instruct"
    return manifest.model.rstrip("/").split("/")[-1].removesuffix(".gguf") or "model"
