"""Angular distance (arXiv 2403.17887): drop the run of layers whose ends point the same way."""

from __future__ import annotations

from prune2serve.methods.base import Selection, windows
from prune2serve.records import PruningPlan


def select(selection: Selection) -> PruningPlan:
    """The window j .. j + K - 1 minimising arccos(cos(X_j, X_{j+K})) / pi at each sample's last real token."""
    length = selection.num_remove

    def distance(run: tuple[int, ...]) -> float:
        return selection.scores.angle[run[0]][run[0] + length]

    ranked = sorted(windows(selection.candidates, length), key=distance)
    return selection.plan(
        ranked[0],
        "angular",
        f"the run of {length} layers with the smallest angle between its ends",
        angular_distance=distance(ranked[0]),
        runner_up=list(ranked[1]) if len(ranked) > 1 else None,
    )
