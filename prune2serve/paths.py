"""Where things are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT_OUTPUT = Path("prune2serve-build")
"""What `build` writes and `serve`, `measure` and `evaluate` read unless told otherwise."""

MANIFEST_NAME = "prune2serve.json"


def cache_dir() -> Path:
    """Return PRUNE2SERVE_CACHE, or prune2serve under XDG_CACHE_HOME or ~/.cache; not created."""
    chosen = os.environ.get("PRUNE2SERVE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prune2serve"
