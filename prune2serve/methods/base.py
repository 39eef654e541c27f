"""What every selector gets and gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from prune2serve.errors import Prune2ServeError
from prune2serve.records import LayerScores, MergeRule, PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prune2serve.calibration import Calibration
    from prune2serve.layer_sets import LayerSetSearch

ReplacementKind = Literal["layer", "mlp"]
ReplacementLoss = Literal["mse", "llm-loss"]


@dataclass(frozen=True)
class SelectorOptions:
    """Choices that only some selectors know."""

    merge_rule: MergeRule = "telescoped"
    """Of `sliding-merge`; see `prune2serve.merging`."""
    replacement: ReplacementKind = "layer"
    """Of `streamline`: a whole decoder layer, or one whose attention adds nothing."""
    replacement_loss: ReplacementLoss = "mse"
    replacement_steps: int = 96
    """Training steps of `streamline`, one window each."""

    def __post_init__(self) -> None:
        known = {"merge_rule": MergeRule, "replacement": ReplacementKind, "replacement_loss": ReplacementLoss}
        for name, kind in known.items():
            if getattr(self, name) not in get_args(kind):
                raise Prune2ServeError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)!r}: choose among {', '.join(get_args(kind))}"
                )
        if self.replacement_steps < 0:
            raise Prune2ServeError(f"--replacement-steps is {self.replacement_steps}: give 0 or more")


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
    model: Callable[[], PreTrainedModel] | None = None
    """Gives the parent."""
    calibration: Callable[[], Calibration] | None = None
    """Gives the splits; selectors look at `score` and `search` only."""
    work: Path | None = None
    """Where a selector may leave files that its plan names, such as a trained layer's weights."""
    options: SelectorOptions = field(default_factory=SelectorOptions)

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
