"""Versions of what a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "prune2serve", "torch", "transformers", "safetensors", "tokenizers", "onnx", "onnxruntime", "onnxruntime-gpu",
    "onnxruntime-genai", "vllm",
)  # fmt: skip


def installed() -> dict[str, str]:
    """Package -> version of those that are installed, and Python's."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
