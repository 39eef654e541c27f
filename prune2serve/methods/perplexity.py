"""SLEB (arXiv 2402.09025): one layer at a time, drop the one whose removal leaves the lowest perplexity.

The answer is the naive loop's, at a fraction of its cost. Every trial starts from the kept hidden states of the
layers before the removed one (`LayerSetSearch`), and a step is searched best first: the trial with the smallest
negative log-likelihood so far is the one that sees its next window. A window can only add to that sum, so the first
trial to come out of the queue with all windows seen is the best there is, and the others stop where they stand.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prune2serve.methods.base import Selection
from prune2serve.progress import task
from prune2serve.records import PruningPlan

if TYPE_CHECKING:
    from prune2serve.layer_sets import LayerSetSearch


def select(selection: Selection) -> PruningPlan:
    """Greedy removal, judged on the search split; the earlier layer goes among equals."""
    search = selection.search()
    kept = list(range(selection.scores.num_layers))
    order: list[int] = []
    perplexities: list[float] = []
    with task("Removing layers one at a time", selection.num_remove) as bar:
        for _ in range(selection.num_remove):
            search.rebase(kept)
            layer, nll = cheapest_removal(search, kept, [layer for layer in selection.candidates if layer in kept])
            kept.remove(layer)
            order.append(layer)
            perplexities.append(math.exp(min(nll / search.num_tokens, 690.0)))
            bar.advance()
    return selection.plan(
        order,
        "perplexity",
        f"removed one at a time for the lowest perplexity, {perplexities[-1]:.4g} on the search split at the end",
        order=order,
        search_perplexities=perplexities,
    )


def cheapest_removal(search: LayerSetSearch, kept: Sequence[int], candidates: Sequence[int]) -> tuple[int, float]:
    """Return the candidate without which `kept` has the lowest summed NLL on the search split, and that sum."""
    queue = [(0.0, layer, 0) for layer in sorted(candidates)]
    while True:
        total, layer, seen = heapq.heappop(queue)
        if seen == search.num_windows:
            return layer, total
        nll = search.window_nll([other for other in kept if other != layer], seen)
        heapq.heappush(queue, (total + (nll if math.isfinite(nll) else math.inf), layer, seen + 1))
