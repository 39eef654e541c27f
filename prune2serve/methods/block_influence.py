"""ShortGPT's block influence (arXiv 2403.03853): drop the layers that change the hidden state's direction least."""

from __future__ import annotations

from prune2serve.methods.base import Selection, lowest
from prune2serve.records import PruningPlan


def select(selection: Selection) -> PruningPlan:
    """BI_l = 1 - mean_t cos(X_l[t], X_{l+1}[t]); the K lowest go, in one shot."""
    removed = lowest(selection.scores.metrics["block_influence"], selection.candidates, selection.num_remove)
    return selection.plan(removed, "block-influence", "lowest 1 - cos(input, output) on the calibration set")
