"""Local search over layer sets: swap a removed layer for a kept one while the model comes closer to its parent.

The objective is mean KL(parent || pruned) on the search split, which quality is never reported on. Searches of this
kind beat every scoring rule in the literature (EvoPress, arXiv 2410.14649). Swaps are tried in the order of a cheap
guess (re-add the removed layer, drop the kept one, of lowest block influence, or a neighbour of the cut), then at
random; a candidate that falls behind the best set on the first windows is abandoned.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from prune2serve.progress import task
from prune2serve.records import LayerScores, PruningPlan

if TYPE_CHECKING:
    from prune2serve.layer_sets import LayerSetSearch

Swap = tuple[int, int]
"""(layer put back, layer taken out)."""


def refine(
    plan: PruningPlan,
    search: LayerSetSearch,
    candidates: Sequence[int],
    *,
    budget: int,
    seed: int = 0,
    time_limit_s: float = float("inf"),
    scores: LayerScores | None = None,
) -> PruningPlan:
    """Return the best plan found within `budget` layer sets tried; never one that is worse on the search split.

    Args:
        plan: removes layers only; merges and replacements are made after refinement.
        candidates: the layers that may be removed.
        scores: of the same model; without them swaps are tried at random from the start.
    """
    start = time.monotonic()
    best, tried, history = plan.removed, {plan.removed}, []
    first = quality = search.evaluate_removed(best)
    rebase(search, plan, best)
    rng = random.Random(seed)
    with task(f"Refining (KL {quality.kl:.3f})", budget) as bar:
        swaps = ordered_swaps(best, candidates, scores, rng)
        for _ in range(budget):
            removed = next((s for s in (swapped(best, swap) for swap in swaps) if s not in tried), None)
            if removed is None or time.monotonic() - start > time_limit_s:
                break
            tried.add(removed)
            found = search.rival(removed, quality)
            bar.advance()
            if found is not None and found.kl < quality.kl:
                best, quality = removed, found
                history.append({"sets_tried": len(tried), "removed": list(best), "search_kl": quality.kl})
                bar.describe(f"Refining (KL {quality.kl:.3f})")
                rebase(search, plan, best)
                swaps = ordered_swaps(best, candidates, scores, rng)
    settings = {
        **plan.settings,
        "refinement": {
            "sets_tried": len(tried),
            "search_kl": {"before": first.kl, "after": quality.kl},
            "from": list(plan.removed),
            "steps": history,
        },
    }
    why = f"{plan.why}; refined over {len(tried)} layer sets, search KL {first.kl:.3f} to {quality.kl:.3f}"
    return replace(plan, removed=best, settings=settings, why=why)


def rebase(search: LayerSetSearch, plan: PruningPlan, removed: Sequence[int]) -> None:
    """Keep the hidden states along the best set, whose neighbours are tried next."""
    search.rebase([layer for layer in range(plan.num_layers) if layer not in set(removed)])


def swapped(removed: Sequence[int], swap: Swap) -> tuple[int, ...]:
    back, out = swap
    return tuple(sorted({*removed, out} - {back}))


def ordered_swaps(
    removed: Sequence[int], candidates: Sequence[int], scores: LayerScores | None, rng: random.Random
) -> Iterator[Swap]:
    """Every swap once: likely ones first, the rest shuffled.

    Likely: put back a removed layer of high block influence, take out a kept one of low block influence or right
    beside a removed one (a longer run costs less than one more cut).
    """
    kept = [layer for layer in candidates if layer not in set(removed)]
    swaps = [(back, out) for back in removed for out in kept]
    rng.shuffle(swaps)
    if scores is None:
        return iter(swaps)
    influence = scores.metrics["block_influence"]
    beside = {layer + step for layer in removed for step in (-1, 1)}

    def gain(swap: Swap) -> float:
        back, out = swap
        return influence[out] * (0.7 if out in beside else 1.0) / max(influence[back], 1e-12)

    likely = sorted(swaps, key=gain)[: max(len(swaps) // 4, 1)]
    rest = [swap for swap in swaps if swap not in set(likely)]
    # Alternate, so that a misleading guess does not use up the budget.
    return (swap for pair in _interleave(likely, rest) for swap in pair)


def _interleave(first: Sequence[Swap], second: Sequence[Swap]) -> Iterator[Sequence[Swap]]:
    for index in range(max(len(first), len(second))):
        yield [*first[index : index + 1], *second[index : index + 1]]
