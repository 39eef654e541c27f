"""What a measurement ran on, for its report."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prune2serve.versions import installed


def environment() -> dict[str, Any]:
    """Return the machine, the versions and the command line, without any key."""
    import psutil

    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["prune2serve", *sys.argv[1:]],
        "processor": _processor(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
        "devices": _gpus(),
        "versions": installed(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
