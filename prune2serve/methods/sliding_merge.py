"""Sliding layer merging (arXiv 2502.19159): runs of neighbouring layers become one, while the model stays similar.

A window slides down from the layer before the last. It grows downwards while the model with the window merged into
one layer stays more similar to the parent than a threshold; then what fitted is merged and the window starts anew
from the layer below. The paper fixes the threshold; here it is bisected until exactly K layers are gone.

similarity = mean over samples of cos(flattened final hidden states of the parent, of the merged model), real tokens
only. The states are those the head reads, after the final norm: before it a few tokens with massive activations
would decide the flattened cosine alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from prune2serve.errors import Prune2ServeError
from prune2serve.methods.base import Selection
from prune2serve.progress import task
from prune2serve.records import Merge, MergeRule, PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Merges = tuple[Merge, ...]
Similarity = Callable[[Merges], float]

NUM_WINDOWS = 2
"""Windows of the search split that the similarity is measured on."""
THRESHOLD_STEP = 1e-3
"""Thresholds closer than this count as equal."""


def select(selection: Selection) -> PruningPlan:
    """Bisect the threshold until the merges remove exactly K layers; protected layers are neither removed nor changed.

    Raises:
        Prune2ServeError: fewer than K layers can be merged away.
    """
    from prune2serve.similarity import MergedSimilarity

    assert selection.model and selection.calibration
    model, rule = selection.model(), selection.options.merge_rule
    runs = mergeable_runs(model, selection.candidates)
    most = sum(len(run) - 1 for run in runs)
    if most < selection.num_remove:
        raise Prune2ServeError(
            f"{selection.num_remove} layers should go but only {most} can be merged into a neighbour: lower --ratio, "
            "or --protect-first and --protect-last"
        )
    measured = MergedSimilarity(model, selection.calibration().search, NUM_WINDOWS)
    with task("Merging layers", None) as bar:

        def similarity(merges: Merges) -> float:
            bar.advance()
            return measured(merges)

        merges, threshold = bisect_threshold(runs, selection.num_remove, rule, similarity)
        merges = trim(merges, selection.num_remove, similarity)
        final = similarity(merges)
    plan = selection.plan(
        [layer for merge in merges for layer in range(merge.low + 1, merge.high + 1)],
        "sliding-merge",
        f"{', '.join(f'{merge.low}-{merge.high}' for merge in merges)} merged ({rule}), similarity {final:.4f}",
        merge_rule=rule,
        threshold=threshold,
        similarity=final,
        num_plans=measured.num_measured,
    )
    return replace(plan, merges=merges)


def mergeable_runs(model: PreTrainedModel, candidates: Sequence[int]) -> list[range]:
    """Return the runs of neighbouring candidates whose tensors have the same names and shapes, highest first.

    The model's last layer is never merged.
    """
    from prune2serve.layers import decoder_layers

    layers = decoder_layers(model)
    shapes = [{name: (tensor.shape, tensor.dtype) for name, tensor in layer.state_dict().items()} for layer in layers]
    allowed = [layer for layer in sorted(candidates) if layer < len(layers) - 1]
    runs: list[range] = []
    for layer in allowed:
        if runs and runs[-1].stop == layer and shapes[layer - 1] == shapes[layer]:
            runs[-1] = range(runs[-1].start, layer + 1)
        else:
            runs.append(range(layer, layer + 1))
    return runs[::-1]


def slide(runs: Sequence[range], threshold: float, rule: MergeRule, similarity: Similarity) -> Merges:
    """One pass of the window over every run, from the top down, at a fixed threshold."""
    merges: Merges = ()
    for run in runs:
        high, low = run.stop - 1, run.stop - 2
        while low >= run.start:
            if similarity((*merges, Merge(low, high, rule))) > threshold:
                low -= 1
                continue
            merges += committed(low + 1, high, rule)
            high = low if low + 1 < high else high - 1
            low = high - 1
        merges += committed(low + 1, high, rule)
    return merges


def committed(low: int, high: int, rule: MergeRule) -> Merges:
    """The window as a merge, when it holds at least two layers."""
    return (Merge(low, high, rule),) if high > low else ()


def bisect_threshold(
    runs: Sequence[range], num_remove: int, rule: MergeRule, similarity: Similarity
) -> tuple[Merges, float]:
    """Return merges that remove `num_remove` layers, or a few more where no threshold gives just as many.

    Walks are cheap, since they share most of their measurements, so the bisection always goes on to the highest such
    threshold; of the exact answers on the way the most similar one wins.

    Returns:
        The merges and their threshold; at -1 each run becomes one layer.
    """
    lax, strict = -1.0, 1.0
    everything = tuple(merge for run in runs for merge in committed(run.start, run.stop - 1, rule))
    found = [(everything, lax)]
    while strict - lax > THRESHOLD_STEP:
        threshold = (lax + strict) / 2
        merges = slide(runs, threshold, rule, similarity)
        if num_removed(merges) >= num_remove:
            lax = threshold
            found.append((merges, threshold))
        else:
            strict = threshold
    exact = [answer for answer in found if num_removed(answer[0]) == num_remove]
    return max(exact, key=lambda answer: similarity(answer[0])) if exact else found[-1]


def trim(merges: Merges, num_remove: int, similarity: Similarity) -> Merges:
    """Take layers back out of the merges, one end at a time, where that leaves the most similar model."""
    while num_removed(merges) > num_remove:
        merges = max(shortened(merges), key=similarity)
    return merges


def shortened(merges: Merges) -> Iterator[Merges]:
    """Every way to take one layer out of one merge."""
    for place, merge in enumerate(merges):
        for low, high in ((merge.low + 1, merge.high), (merge.low, merge.high - 1)):
            yield (*merges[:place], *committed(low, high, merge.rule), *merges[place + 1 :])


def num_removed(merges: Merges) -> int:
    return sum(merge.high - merge.low for merge in merges)
