"""Export a checkpoint to an ONNX decoder with KV cache, through onnxruntime-genai's model builder.

An export directory holds the builder's own files (`model.onnx` and what onnxruntime-genai reads beside it)
and

- `model_serving.onnx`: the same graph over the same weights file, with one more input, `logits_indices`
  [num_logits]: the positions of the sequence whose logits are wanted. A prefill chunk then pays for one row
  of
  the language-model head instead of one a token, and prompt log-probabilities stay possible.
- `export.json`: what it was made from, so that a later call can tell whether it still belongs to the weights.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune2serve.errors import MissingExtraError, Prune2ServeError, near_match
from prune2serve.paths import MANIFEST_NAME, cache_dir
from prune2serve.progress import say
from prune2serve.staging import refuse_existing, staged_directory, write_text

if TYPE_CHECKING:
    import onnx

PRECISIONS = {"cpu": ("fp32", "int4"), "cuda": ("fp16", "bf16", "int4")}
"""Device -> what the builder can make for it; the first is the default."""

SERVING_GRAPH = "model_serving.onnx"
RECORD = "export.json"
LAYOUT = 1
"""Of this directory; a change makes older exports stale."""

OPTIONS = {
    "hf_token": "false",
    "hf_remote": "false",
    # Every layer keeps a full-length cache: one shared buffer serves them all.
    "windowed_kv_cache": "false",
}
INT4_OPTIONS = {
    # One layout for every layer: the mixed ones choose their 8-bit layers by position, so a pruned model and
    # its parent would be quantised differently and their comparison would measure that too.
    "algo_config": "default",
    "block_size": "32",
    "is_symmetric": "true",
}


def onnx_home(directory: Path) -> Path:
    """Return where exports of a model directory are kept: `onnx/` inside a build, the cache for any other."""
    if (directory / MANIFEST_NAME).is_file() and os.access(directory, os.W_OK):
        return directory / "onnx"
    from prune2serve.models import fingerprint

    return cache_dir() / "onnx" / fingerprint(directory)[:16]


def ensure_onnx(
    directory: Path,
    precision: str = "fp32",
    device: str = "cpu",
    *,
    cache: Path | None = None,
    force: bool = False,
) -> Path:
    """Return an ONNX export of the model in `directory`, made now unless one that fits is there.

    Args:
        directory: a Hugging Face model directory with its tokenizer.
        precision: one of `PRECISIONS[device]`.
        device: `cpu` or `cuda`, where the export will run.
        cache: keeps the export, as `<precision>-<device>`; `onnx/` inside `directory` when None.
        force: export again even when a fitting one is there.

    Raises:
        MissingExtraError: a package that the export needs is not installed.
        Prune2ServeError: the builder cannot export this model, or the disk refuses.
    """
    check_precision(precision, device)
    target = (cache or directory / "onnx") / f"{precision}-{device}"
    record = _describe(directory, precision, device)
    if not force and _belongs(target, record):
        return target
    check_packages()
    with _locked(target):
        if not force and _belongs(target, record):  # another process was faster
            return target
        stale = ", replacing one of other weights or an older version" if target.exists() else ""
        say(f"Exporting {directory} to ONNX {precision} for {device} into {target}{stale}")
        start = time.monotonic()
        refuse_existing(target, force=True)
        with staged_directory(target, force=True) as staging:
            _build(directory, staging, precision, device)
            _write_serving_graph(staging, precision)
            write_text(staging / RECORD, json.dumps(record, indent=2) + "\n")
        say(f"Exported in {time.monotonic() - start:.1f} s")
    return target


def check_precision(precision: str, device: str) -> None:
    """Raise unless the builder makes `precision` for `device`."""
    if device not in PRECISIONS:
        raise Prune2ServeError(f"no ONNX device {device!r}{near_match(device, PRECISIONS)}: choose cpu or cuda")
    if precision not in PRECISIONS[device]:
        raise Prune2ServeError(
            f"precision {precision!r} cannot be exported for {device}: choose {' or '.join(PRECISIONS[device])}"
        )


def check_packages() -> None:
    """Raise MissingExtraError for the first package that an export needs and that is not installed."""
    for package, module in (
        ("onnx", "onnx"),
        ("onnx-ir", "onnx_ir"),
        ("onnxruntime-genai", "onnxruntime_genai"),
    ):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError("exporting to ONNX", package, "onnx")


def _describe(directory: Path, precision: str, device: str) -> dict[str, Any]:
    from prune2serve.models import fingerprint

    return {
        "layout": LAYOUT,
        "fingerprint": fingerprint(directory),
        "precision": precision,
        "device": device,
        "versions": {name: _version(name) for name in ("onnxruntime-genai", "onnx")},
    }


def _version(package: str) -> str | None:
    names = (package, f"{package}-cuda", f"{package}-gpu")
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _belongs(target: Path, record: dict[str, Any]) -> bool:
    """Tell whether the export there was made from these weights, by any version of the packages."""
    try:
        found = json.loads((target / RECORD).read_text())
    except (OSError, ValueError):
        return False
    same = all(found.get(key) == record[key] for key in ("layout", "fingerprint", "precision", "device"))
    return same and (target / SERVING_GRAPH).is_file()


def _locked(target: Path) -> Any:
    """A lock between processes that would export the same thing at the same time."""
    import hashlib

    from filelock import FileLock

    folder = cache_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{hashlib.sha256(str(target.resolve()).encode()).hexdigest()[:16]}.lock")


def _build(directory: Path, output: Path, precision: str, device: str) -> None:
    """Run the builder in a process of its own: its memory goes back, and its chatter is shown only on
    failure."""
    options = OPTIONS | (INT4_OPTIONS if precision == "int4" else {})
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", str(directory), "-o", str(output), "-p", precision, "-e", device, "-c", scratch]
        command += ["--extra_options", *(f"{key}={value}" for key, value in options.items())]
        result = subprocess.run(
            command,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "ORT_DISABLE_TELEMETRY": "1",
                "TOKENIZERS_PARALLELISM": "false",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    if result.returncode != 0 or not (output / "model.onnx").is_file():
        lines = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        why = lines[-1].strip() if lines else f"exit status {result.returncode}"
        raise Prune2ServeError(
            f"onnxruntime-genai's builder cannot export {directory} as {precision} for {device}: {why}: "
            "try another precision, or serve with --engine vllm"
        )


def _write_serving_graph(directory: Path, precision: str) -> None:
    """Write `model_serving.onnx` beside `model.onnx`; both read the same external weights file."""
    import onnx

    model = onnx.load(str(directory / "model.onnx"), load_external_data=False)
    if precision == "int4":
        _check_uniform(model)
    _select_logits(model)
    onnx.save(model, str(directory / SERVING_GRAPH))


def _check_uniform(model: onnx.ModelProto) -> None:
    """Raise when the quantised matrices do not all have the same bits and block size."""
    layouts = set()
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            layouts.add((attributes.get("bits"), attributes.get("block_size")))
    if layouts != {(4, 32)}:
        raise Prune2ServeError(
            f"the int4 export has matrices of (bits, block size) {sorted(layouts)}, expected all (4, "
            "32): this version "
            "of onnxruntime-genai mixes precisions by layer position: use another version, or fp32"
        )


def _select_logits(model: onnx.ModelProto) -> None:
    """Gather the wanted positions of the last hidden states [batch, sequence, hidden] before the head."""
    from onnx import TensorProto, helper

    graph = model.graph
    producers = {output: node for node in graph.node for output in node.output}
    head = producers["logits"]
    # Scaling, soft-capping or a cast may stand between the head's matrix product and the logits.
    while head.op_type not in ("MatMul", "MatMulNBits", "Gemm", "FusedMatMul"):
        if head.input[0] not in producers:
            raise Prune2ServeError(
                f"the exported graph computes its logits with {head.op_type}, expected a matrix product "
                "at the end: "
                "this architecture cannot be served on ONNX Runtime here: use --engine vllm"
            )
        head = producers[head.input[0]]
    position = next(i for i, node in enumerate(graph.node) if node.name == head.name)
    gather = helper.make_node(
        "Gather",
        [head.input[0], "logits_indices"],
        ["selected_hidden_states"],
        name="/lm_head/Select",
        axis=1,
    )
    head.input[0] = "selected_hidden_states"
    graph.node.insert(position, gather)
    graph.input.append(helper.make_tensor_value_info("logits_indices", TensorProto.INT64, ["num_logits"]))
    logits = next(output for output in graph.output if output.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "num_logits"
    # Shapes noted inside the head speak of the whole sequence; the runtime infers them again.
    del graph.value_info[:]
