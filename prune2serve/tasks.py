"""Zero-shot accuracy of a pruned model beside its parent, item by item.

| metric | an item is right when | tasks |
|---|---|---|
| `acc` | the right choice has the highest summed log-likelihood; of a continuation, greedy decoding writes it | all |
| `acc_norm` | the same, each sum divided by the choice's characters (as it stands in the file) | multiple choice |

These are lm-evaluation-harness's definitions. Both models answer the same items, so the difference is judged on
the items where only one of them is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np

from prune2serve.errors import Prune2ServeError
from prune2serve.loglikelihood import EncodedItem, ItemScore, encode_task, score_items
from prune2serve.records import Stability, TaskMetric, TaskResult
from prune2serve.task_files import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Z95 = 1.959963984540054
"""The normal distribution's 97.5% point."""
MAX_LOG_PERPLEXITY = 690.0
"""exp of more overflows a float."""


class ParentTasks:
    """The tasks in tokens with the parent's scores, computed once for any number of pruned models."""

    def __init__(self, parent: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]) -> None:
        self.tasks = tuple(tasks)
        self._items = [encode_task(task, tokenizer) for task in self.tasks]
        self._scores = [
            score(parent, task, items, "parent") for task, items in zip(self.tasks, self._items, strict=True)
        ]

    def compare(
        self,
        pruned: PreTrainedModel,
        as_pruned: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> tuple[TaskResult, ...]:
        """Score the pruned model; `as_pruned` is a context that prunes it in memory, where it is not already."""
        results = []
        with as_pruned():
            for task, items, parent in zip(self.tasks, self._items, self._scores, strict=True):
                results.append(summarise_task(task, items, parent, score(pruned, task, items, "pruned")))
        return tuple(results)


def score(model: PreTrainedModel, task: Task, items: Sequence[EncodedItem], who: str) -> list[ItemScore]:
    """Every item's log-likelihoods.

    Raises:
        Prune2ServeError: one is not finite.
    """
    scores = score_items(model, items, f"{task.name}, {who}")
    for item, found in zip(task.items, scores, strict=True):
        if not all(map(math.isfinite, found.loglikelihoods)):
            raise Prune2ServeError(
                f"{task.source} line {item.line}: the {who} model's log-likelihoods are {list(found.loglikelihoods)}: "
                "use --dtype float32"
            )
    return scores


def summarise_task(
    task: Task, items: Sequence[EncodedItem], parent: Sequence[ItemScore], pruned: Sequence[ItemScore]
) -> TaskResult:
    """Accuracies with their standard errors, and the paired interval of each difference."""
    rules = {"acc": right, "acc_norm": right_normalised} if task.kind == "multiple-choice" else {"acc": written}
    metrics = {
        name: compare_items(
            [rule(task, i, s) for i, s in enumerate(parent)], [rule(task, i, s) for i, s in enumerate(pruned)]
        )
        for name, rule in rules.items()
    }
    return TaskResult(
        name=task.name,
        source=task.source,
        kind=task.kind,
        num_items=len(task.items),
        chance=sum(1 / len(item.choices) for item in task.items) / len(task.items) if "acc_norm" in rules else 0.0,
        metrics=metrics,
        stability=_stability(task, items, parent, pruned) if task.kind == "multiple-choice" else None,
    )


def right(task: Task, index: int, score: ItemScore) -> bool:
    """The right choice has the highest sum; the first one among equals, as numpy's argmax."""
    return int(np.argmax(score.loglikelihoods)) == task.items[index].gold


def right_normalised(task: Task, index: int, score: ItemScore) -> bool:
    """The same with each sum divided by the choice's characters."""
    item = task.items[index]
    lengths = [len(choice) for choice in item.choices]
    return int(np.argmax(np.array(score.loglikelihoods) / lengths)) == item.gold


def written(_: Task, __: int, score: ItemScore) -> bool:
    """Greedy decoding writes the continuation."""
    return score.greedy[0]


def compare_items(parent: Sequence[bool], pruned: Sequence[bool]) -> TaskMetric:
    """Accuracy of both on the same items, at least two."""
    n = len(parent)
    lost = sum(a and not b for a, b in zip(parent, pruned, strict=True))
    gained = sum(b and not a for a, b in zip(parent, pruned, strict=True))
    a, b = sum(parent) / n, sum(pruned) / n
    return TaskMetric(
        parent=a,
        parent_standard_error=math.sqrt(a * (1 - a) / (n - 1)),
        pruned=b,
        pruned_standard_error=math.sqrt(b * (1 - b) / (n - 1)),
        difference=b - a,
        interval=paired_interval(gained, lost, n),
    )


def paired_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """95% interval of the difference of two proportions on the same n items.

    Bonett and Price (2012): a Wald interval with one item added to each kind of discordant pair. It keeps its
    coverage where few items or none changed, where the plain one shrinks to nothing.
    """
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z95 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return max(p - q - half, -1.0), min(p - q + half, 1.0)


def _stability(
    task: Task, items: Sequence[EncodedItem], parent: Sequence[ItemScore], pruned: Sequence[ItemScore]
) -> Stability:
    sigmas = [
        float(np.std([perplexity(s, len(c)) for s, c in zip(score.loglikelihoods, item.choices, strict=True)]))
        for score, item in zip(parent, items, strict=True)
    ]
    same = [right(task, i, a) == right(task, i, b) for i, (a, b) in enumerate(zip(parent, pruned, strict=True))]
    return stability(sigmas, same)


def perplexity(loglikelihood: float, num_tokens: int) -> float:
    """Of one choice: exp of the mean negative log-likelihood of its tokens, capped below a float's overflow."""
    return math.exp(min(-loglikelihood / num_tokens, MAX_LOG_PERPLEXITY / 2))


def stability(sigmas: Sequence[float], same: Sequence[bool]) -> Stability:
    """LLM-Streamline's stability (arXiv 2403.19135): sum_i w_i [parent right <=> pruned right], w = softmax(sigma).

    The authors' script adds up the first k weights, k the number of unchanged items; here each item brings its own.
    Perplexities are far apart, so that very few items carry the softmax: `effective_items` = 1 / sum_i w_i^2 says
    how many.

    Args:
        sigmas: per item, the (population) standard deviation of its choices' perplexities under the parent.
        same: per item, whether both models are right or both are wrong.
    """
    exponents = np.exp(np.array(sigmas) - max(sigmas))
    weights = exponents / exponents.sum()
    return Stability(
        value=float(weights[np.array(same)].sum()),
        effective_items=float(1 / np.square(weights).sum()),
        unchanged=sum(same) / len(same),
    )
