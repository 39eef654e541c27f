"""Which device and dtype the models run in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune2serve.errors import Prune2ServeError

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")


def resolve_device(name: str) -> str:
    """Turn `auto` into cuda or cpu; check that a named device is there.

    Raises:
        Prune2ServeError: the named device cannot be used here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("mps"):
        raise Prune2ServeError("--device mps has no float64, in which every mean is accumulated: use cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0]
        raise Prune2ServeError(f"--device {name} cannot be used here ({line}): use auto or cpu") from None
    return name


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """Turn `auto` into bfloat16 where it is fast (accelerators, CPUs with AMX or AVX512-BF16), else float32.

    Every mean is accumulated in float32 or float64 all the same.
    """
    import torch

    if name == "auto":
        return torch.bfloat16 if device != "cpu" or _cpu_has_bfloat16() else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _cpu_has_bfloat16() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            flags = stream.read(8192)
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
