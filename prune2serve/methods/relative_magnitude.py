"""Relative magnitude: drop the layers whose update is smallest beside the hidden state it is added to."""

from __future__ import annotations

from prune2serve.methods.base import Selection, lowest
from prune2serve.records import PruningPlan


def select(selection: Selection) -> PruningPlan:
    """mean_t norm(X_{l+1} - X_l) / norm(X_l); the K lowest go."""
    removed = lowest(selection.scores.metrics["relative_magnitude"], selection.candidates, selection.num_remove)
    return selection.plan(removed, "relative-magnitude", "smallest update relative to the hidden state")
