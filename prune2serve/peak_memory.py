"""The most memory used since a moment."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Starts counting now. On a GPU it counts the device's allocations, elsewhere the process's resident memory.

    Where the system cannot start anew (it is Linux that can), the peak is the process's since its start.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._cuda = device.startswith("cuda")
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats(device)
            self._device = device
            return
        try:
            RESET.write_text("5")  # 5 resets the resident set's high-water mark (man 5 proc)
        except OSError:
            return

    def peak_bytes(self) -> int:
        if self._cuda:
            import torch

            return int(torch.cuda.max_memory_allocated(self._device))
        try:
            lines = STATUS.read_text().splitlines()
        except OSError:
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
