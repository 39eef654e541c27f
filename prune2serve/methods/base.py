"""What every selector gets and gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prune2serve.errors import Prune2ServeError
from prune2serve.records import LayerScores, PruningPlan

if TYPE_CHECKING:
    from prune2serve.layer_sets import LayerSetSearch


@dataclass(frozen=True)
class Selection:
    """One question to a selector: which `num_remove` of the `candidates` go?"""

    scores: LayerScores
    num_remove: int
    candidates: tuple[int, ...]
    """Layers that may be removed; protected ones are not among them."""
    seed: int
    search: Callable[[], LayerSetSearch]
    """Gives perplexity and KL of layer sets on the search split; built when a selector first asks for it."""

    def __post_init__(self) -> None:
        if self.num_remove > len(self.candidates):
            raise Prune2ServeError(
                f"{self.num_remove} layers should go but only {len(self.candidates)} of {self.scores.num_layers} may: "
                "lower --ratio, or --protect-first and --protect-last"
            )

    def plan(self, removed: Sequence[int], method: str, why: str, **settings: Any) -> PruningPlan:
        return PruningPlan(
            num_layers=self.scores.num_layers,
            removed=tuple(sorted(removed)),
            method=method,
            settings=settings,
            why=why,
        )


Selector = Callable[[Selection], PruningPlan]


def num_layers_to_remove(ratio: float, num_layers: int) -> int:
    """K = floor(ratio * L + 0.5), at least 1, at most L - 1.

    Raises:
        Prune2ServeError: the ratio is not in (0, 1).
    """
    if not 0.0 < ratio < 1.0:
        raise Prune2ServeError(f"--ratio {ratio:g} removes nothing or everything: give a fraction between 0 and 1")
    return min(max(int(ratio * num_layers + 0.5), 1), num_layers - 1)


def lowest(values: Sequence[float], candidates: Sequence[int], num: int) -> tuple[int, ...]:
    """The `num` candidates of lowest value, the earlier layer first among equals; sorted."""
    return tuple(sorted(sorted(candidates, key=lambda layer: (values[layer], layer))[:num]))


def windows(candidates: Sequence[int], length: int) -> list[tuple[int, ...]]:
    """Every run of `length` neighbouring layers that are all candidates.

    Raises:
        Prune2ServeError: there is none.
    """
    allowed = set(candidates)
    runs = [tuple(range(start, start + length)) for start in sorted(allowed)]
    runs = [run for run in runs if allowed.issuperset(run)]
    if not runs:
        raise Prune2ServeError(
            f"no {length} neighbouring layers may be removed together: lower --ratio or protect fewer layers"
        )
    return runs
