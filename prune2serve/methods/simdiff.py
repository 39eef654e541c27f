"""SimDiff (arXiv 2604.19520): cosine similarity and successive difference, mixed by a searched weight.

    importance_l = alpha * diff_l + (1 - alpha) * sim_l

sim is block influence, diff is MSSD or MASD, each normalised to [0, 1] across layers; the K least important
layers go in one shot. The paper's normalisation is not public, and massive activations make it matter: on
SmolLM2 MSSD runs from 0.9 to 2008, so min-max leaves all layers but one near 0. The normalisation is
therefore searched too. Only distinct layer sets cost a perplexity evaluation: along alpha every recipe gives
a short list of sets, which is searched ternarily between its two pure ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from prune2serve.methods.base import Selection, lowest
from prune2serve.records import PruningPlan

ALPHAS = np.linspace(0.0, 1.0, 401)
DIFFERENCES = ("mssd", "masd")


@dataclass(frozen=True)
class Candidate:
    """A layer set and one recipe that gives it."""

    removed: tuple[int, ...]
    difference: str
    normalisation: str
    alpha: float


def select(selection: Selection) -> PruningPlan:
    """Search {MSSD, MASD} x normalisation x alpha for the lowest perplexity on the search split."""
    found: dict[tuple[int, ...], tuple[float, Candidate]] = {}
    search = selection.search()

    def perplexity(candidate: Candidate) -> float:
        if candidate.removed not in found:
            found[candidate.removed] = (search.evaluate_removed(candidate.removed).perplexity, candidate)
        return found[candidate.removed][0]

    for difference in DIFFERENCES:
        for normalisation in NORMALISATIONS:
            ternary_search(along_alpha(selection, difference, normalisation), perplexity)
    ranked = sorted(found.values(), key=lambda item: (item[0], item[1].removed))
    best = ranked[0][1]
    return selection.plan(
        best.removed,
        "simdiff",
        f"lowest search perplexity of {len(found)} layer sets: {best.difference}, {best.normalisation} normalisation, "
        f"alpha {best.alpha:.3g}",
        winner=_describe(*ranked[0]),
        runner_up=_describe(*ranked[1]) if len(ranked) > 1 else None,
        num_sets=len(found),
    )


def _describe(perplexity: float, candidate: Candidate) -> dict[str, object]:
    return {
        "alpha": candidate.alpha,
        "difference": candidate.difference,
        "normalisation": candidate.normalisation,
        "removed": list(candidate.removed),
        "search_perplexity": perplexity,
    }


def along_alpha(selection: Selection, difference: str, normalisation: str) -> list[Candidate]:
    """The distinct layer sets as alpha goes from 0 (similarity alone) to 1 (difference alone), in order."""
    normalise = NORMALISATIONS[normalisation]
    similarity = normalise(np.array(selection.scores.metrics["block_influence"]))
    successive = normalise(np.array(selection.scores.metrics[difference]))
    path: list[Candidate] = []
    for alpha in ALPHAS:
        importance = (alpha * successive + (1 - alpha) * similarity).tolist()
        removed = lowest(importance, selection.candidates, selection.num_remove)
        if not path or path[-1].removed != removed:
            path.append(Candidate(removed, difference, normalisation, float(alpha)))
    return path


def ternary_search(path: Sequence[Candidate], cost: Callable[[Candidate], float]) -> Candidate:
    """The cheapest candidate of a path taken to fall and then rise; both ends are always tried."""
    low, high = 0, len(path) - 1
    while high - low > 2:
        left, right = low + (high - low) // 3, high - (high - low) // 3
        if cost(path[left]) <= cost(path[right]):
            high = right - 1
        else:
            low = left + 1
    tried = {*range(low, high + 1), 0, len(path) - 1}
    return min((path[i] for i in sorted(tried)), key=cost)


def _min_max(values: np.ndarray) -> np.ndarray:
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else np.zeros_like(values)


def _log(values: np.ndarray) -> np.ndarray:
    floor = max(float(values.max()) * 1e-12, np.finfo(np.float64).tiny)
    return _min_max(np.log(np.maximum(values, floor)))


def _rank(values: np.ndarray) -> np.ndarray:
    return _min_max(values.argsort(kind="stable").argsort(kind="stable").astype(np.float64))


NORMALISATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "min-max": _min_max,
    "log": _log,
    "rank": _rank,
}
"""Each maps one value a layer to [0, 1], keeping the order."""
