"""SimDiff's two difference measures alone (arXiv 2604.19520): drop the layers that add least to the hidden state."""

from __future__ import annotations

from prune2serve.methods.base import Selection, lowest
from prune2serve.records import PruningPlan


def select_mssd(selection: Selection) -> PruningPlan:
    """mean F^2 with F = X_{l+1} - X_l: sensitive to outliers; the K lowest go."""
    removed = lowest(selection.scores.metrics["mssd"], selection.candidates, selection.num_remove)
    return selection.plan(removed, "mssd", "smallest mean squared successive difference")


def select_masd(selection: Selection) -> PruningPlan:
    """mean |F| with F = X_{l+1} - X_l: robust; the K lowest go."""
    removed = lowest(selection.scores.metrics["masd"], selection.candidates, selection.num_remove)
    return selection.plan(removed, "masd", "smallest mean absolute successive difference")
