"""What this machine can run: devices, engines, package versions, and what is missing for the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass, field

from prune2serve.records import Record

PACKAGES = {
    "core": ("torch", "transformers", "safetensors", "tokenizers", "accelerate", "huggingface-hub"),
    "onnx": ("onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai", "prometheus-client", "starlette", "uvicorn"),
    "gguf": ("gguf",),
    "hub": ("datasets",),
    "measure": ("httpx",),
}
"""Extra -> its packages. `core` comes with prune2serve itself."""

VARIANTS = {
    "onnxruntime": ("onnxruntime-gpu",),
    "onnxruntime-genai": ("onnxruntime-genai-cuda",),
}
"""Distributions that provide the same module."""


@dataclass(frozen=True)
class EngineStatus(Record):
    """Whether an engine can serve here."""

    name: str
    ready: bool
    detail: str
    """Version and provider, or what is missing."""
    fix: str | None = None
    """The command that makes it ready."""


@dataclass(frozen=True)
class Diagnosis(Record):
    """The whole answer of `prune2serve doctor`."""

    python: str
    platform: str
    num_cores: int
    memory_bytes: int
    cpu_flags: tuple[str, ...]
    """Instruction sets that matter for speed, of those the CPU has."""
    gpus: tuple[str, ...]
    packages: dict[str, dict[str, str | None]]
    """Extra -> package -> version, None where it is not installed."""
    engines: tuple[EngineStatus, ...]
    engine: str
    """What `serve --engine auto` takes here."""
    missing: dict[str, str] = field(default_factory=dict)
    """Extra -> the pip command that installs what it lacks."""


def diagnose(vllm_python: str | None = None) -> Diagnosis:
    """Look at this machine; nothing is downloaded or started but vLLM's Python, to ask for its version."""
    import psutil

    gpus = _gpus()
    packages = {extra: {name: _version(name) for name in names} for extra, names in PACKAGES.items()}
    engines = (_onnxruntime(packages["onnx"], bool(gpus)), _vllm(vllm_python, bool(gpus)))
    missing = {
        extra: f"pip install 'prune2serve[{extra}]'"
        for extra, found in packages.items()
        if extra != "core" and None in found.values()
    }
    auto = "vllm" if gpus and engines[1].ready else "onnxruntime"
    return Diagnosis(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=int(psutil.virtual_memory().total),
        cpu_flags=_cpu_flags(),
        gpus=gpus,
        packages=packages,
        engines=engines,
        engine=auto,
        missing=missing,
    )


def _version(package: str) -> str | None:
    for name in (package, *VARIANTS.get(package, ())):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return found if name == package else f"{found} ({name})"
    return None


def _gpus() -> tuple[str, ...]:
    try:
        import torch
    except ImportError:
        return ()
    if not torch.cuda.is_available():
        return ()
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in found)


def _cpu_flags() -> tuple[str, ...]:
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            line = next((line for line in stream if line.startswith("flags")), "")
    except OSError:
        return ()
    there = set(line.split())
    return tuple(flag for flag in wanted if flag in there)


def _onnxruntime(packages: dict[str, str | None], has_gpu: bool) -> EngineStatus:
    lacking = [name for name, version in packages.items() if version is None]
    if lacking:
        return EngineStatus("onnxruntime", False, f"missing {', '.join(lacking)}", "pip install 'prune2serve[onnx]'")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    used = next((name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in providers), "none")
    detail = f"onnxruntime {packages['onnxruntime']}, {used}"
    if has_gpu and used != "CUDAExecutionProvider":
        fix = "pip uninstall onnxruntime onnxruntime-genai && pip install 'prune2serve[onnx-gpu]'"
        return EngineStatus("onnxruntime", True, f"{detail}; the GPU stays unused", fix)
    return EngineStatus("onnxruntime", True, detail)


def _vllm(named: str | None, has_gpu: bool) -> EngineStatus:
    from prune2serve.serve.vllm_engine import PYTHON_VARIABLE, find_vllm_python, vllm_version

    python = find_vllm_python(named)
    version = vllm_version(python) if python else None
    if version is not None:
        where = "this environment" if python == sys.executable else python
        return EngineStatus("vllm", True, f"{version} in {where}")
    fix = "pip install 'prune2serve[vllm]'" if has_gpu else "make venv-vllm"
    why = f"{python} has no vllm" if python else f"no .venv-vllm, no --vllm-python, no {PYTHON_VARIABLE}"
    return EngineStatus("vllm", False, why, fix)
