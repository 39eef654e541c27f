"""What any selector has to beat: the last layers, and random ones."""

from __future__ import annotations

import random

from prune2serve.methods.base import Selection
from prune2serve.records import PruningPlan


def select_last(selection: Selection) -> PruningPlan:
    """The last K layers that may go."""
    removed = sorted(selection.candidates)[-selection.num_remove :]
    return selection.plan(removed, "last", "the last layers that are not protected")


def select_random(selection: Selection) -> PruningPlan:
    """K layers drawn with the seed."""
    removed = random.Random(selection.seed).sample(sorted(selection.candidates), selection.num_remove)
    return selection.plan(removed, "random", f"drawn with seed {selection.seed}", seed=selection.seed)
