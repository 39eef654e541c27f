"""Selectors: which layers go. One a file; a new one is its file and a line here."""

from __future__ import annotations

from prune2serve.errors import Prune2ServeError, near_match
from prune2serve.methods import (
    angular,
    baselines,
    block_influence,
    perplexity,
    relative_magnitude,
    simdiff,
    sliding_merge,
    streamline,
    successive_difference,
)
from prune2serve.methods.base import Selection, Selector
from prune2serve.records import PruningPlan

SELECTORS: dict[str, Selector] = {
    "simdiff": simdiff.select,
    "block-influence": block_influence.select,
    "angular": angular.select,
    "perplexity": perplexity.select,
    "sliding-merge": sliding_merge.select,
    "streamline": streamline.select,
    "relative-magnitude": relative_magnitude.select,
    "mssd": successive_difference.select_mssd,
    "masd": successive_difference.select_masd,
    "last": baselines.select_last,
    "random": baselines.select_random,
}


def check_method(name: str) -> None:
    """Raise Prune2ServeError, with the nearest known name, when there is no such selector."""
    if name not in SELECTORS:
        raise Prune2ServeError(f"no method {name!r}{near_match(name, SELECTORS)} Known methods: {', '.join(SELECTORS)}")


def select(name: str, selection: Selection) -> PruningPlan:
    """Ask the named selector."""
    check_method(name)
    return SELECTORS[name](selection)
