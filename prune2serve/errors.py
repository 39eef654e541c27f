"""The errors a user can cause; everything else is a bug and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Prune2ServeError(Exception):
    """A user's error: one line that says what was got, what was expected and what to do. Exit code 1."""

    exit_code = 1


class UnsupportedArchitectureError(Prune2ServeError):
    """The model's architecture cannot be pruned correctly; the message names it and the reason."""


class CorruptCheckpointError(Prune2ServeError):
    """The checkpoint on disk is incomplete, damaged or inconsistent."""


class MissingExtraError(Prune2ServeError):
    """A feature needs a package that is not installed; the message names the pip command."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs the package {package}, which is not installed: pip install 'prune2serve[{extra}]'"
        )


class GateFailedError(Prune2ServeError):
    """A quality or latency gate did not hold. Exit code 3."""

    exit_code = 3


def near_match(name: str, known: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
