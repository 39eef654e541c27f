"""Is the pruned model still a language model? Several signs together, because each of them misses something.

Perplexity looks at text that people wrote and can stay fair while facts are gone; tasks can hold while free
generation loops; a loop can be the parent's own habit. So every sign is judged against the parent, one strong sign
is enough, and each one that speaks is named with its figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from prune2serve.records import QualityReport, TaskResult
from prune2serve.repetition import Repetition

Grade = Literal["ok", "degraded", "collapsed"]


@dataclass(frozen=True)
class Limits:
    """Where a sign starts to count as degraded and as collapsed."""

    degraded: float
    collapsed: float


PERPLEXITY_RATIO = Limits(1.5, 10.0)
"""x1.5 is 0.4 nats a token, about what halving a model family's size costs. x10 is 2.3 nats: more than everything
that training adds beyond the last few words of context."""

KL = Limits(0.5, 2.5)
"""Nats a token. Perplexity sees the one word that was written; KL sees the whole distribution, so that a model
which got luckier words by forgetting its parent's is still caught."""

TOP1_AGREEMENT = Limits(0.75, 0.25)
"""Below a quarter, what is left is mostly punctuation and the ends of words, which any n-gram model gets right."""

REPETITION = Limits(0.7, 0.15)
"""Distinct 4-grams of greedy text, as a share of the parent's. Small models loop over a sentence by themselves and
more so with three layers less (SmolLM2: 0.61 to 0.25, yet fluent); below 0.15 it is a loop of a few tokens."""

WRITTEN_TOKENS = Limits(0.5, 0.1)
"""Tokens written before an end of sequence, as a share of the parent's: a model that stops at once says nothing."""

RETAINED_SKILL = Limits(0.8, 0.1)
"""(pruned - chance) / (parent - chance) of a task, counted only when the paired interval of the loss excludes 0 and
the parent itself is clearly (3 standard errors) above chance: below a tenth, what the parent knew is gone."""

PARENT_ABOVE_CHANCE = 3.0
"""Standard errors: a task that the parent can only guess says nothing about its pruned copy."""


def judge(report: QualityReport, repetition: Repetition | None = None) -> QualityReport:
    """Return the report with its verdict, the reasons, and the repetition among its details."""
    signs = [_perplexity(report), _kl(report), _agreement(report)]
    if repetition is not None:
        signs += [_repetition(repetition), _length(repetition)]
    signs += [_skill(task) for task in report.tasks]
    found: dict[Grade, list[str]] = {"ok": [], "degraded": [], "collapsed": []}
    for grade, reason in signs:
        found[grade].append(reason)
    verdict: Grade = "collapsed" if found["collapsed"] else "degraded" if found["degraded"] else "ok"
    return replace(
        report,
        verdict=verdict,
        reasons=(*found["collapsed"], *found["degraded"]),
        details=report.details | ({"repetition": repetition.to_dict()} if repetition else {}),
    )


def grade_high(value: float, limits: Limits) -> Grade:
    """Grade a value that is worse the higher it is; one that is not finite is the worst."""
    if not math.isfinite(value) or value >= limits.collapsed:
        return "collapsed"
    return "degraded" if value >= limits.degraded else "ok"


def grade_low(value: float, limits: Limits) -> Grade:
    """Grade a value that is worse the lower it is."""
    return grade_high(-value, Limits(-limits.degraded, -limits.collapsed))


def _perplexity(report: QualityReport) -> tuple[Grade, str]:
    p = report.perplexity
    return grade_high(p.ratio, PERPLEXITY_RATIO), f"perplexity is {p.ratio:.3g} times the parent's"


def _kl(report: QualityReport) -> tuple[Grade, str]:
    return grade_high(report.kl, KL), f"KL to the parent is {report.kl:.2f} nats per token"


def _agreement(report: QualityReport) -> tuple[Grade, str]:
    share = report.top1_agreement
    return grade_low(share, TOP1_AGREEMENT), f"its most likely token is the parent's at {share:.0%} of positions"


def _repetition(found: Repetition) -> tuple[Grade, str]:
    grade = grade_low(_share(found.pruned, found.parent), REPETITION)
    return grade, f"{found.pruned:.0%} of the 4-grams it writes are distinct, the parent's {found.parent:.0%}"


def _length(found: Repetition) -> tuple[Grade, str]:
    pruned, parent = found.num_tokens["pruned"], found.num_tokens["parent"]
    return grade_low(
        _share(pruned, parent), WRITTEN_TOKENS
    ), f"it stops after {pruned} tokens, the parent after {parent}"


def _skill(task: TaskResult) -> tuple[Grade, str]:
    """Of acc_norm where there is one: long choices are not punished for their length."""
    name = "acc_norm" if "acc_norm" in task.metrics else "acc"
    metric = task.metrics[name]
    above = metric.parent - task.chance
    telling = above > PARENT_ABOVE_CHANCE * metric.parent_standard_error and metric.interval[1] < 0
    grade = grade_low((metric.pruned - task.chance) / above, RETAINED_SKILL) if telling else "ok"
    guess = f" (guessing gives {task.chance:.0%})" if task.chance else ""
    return grade, f"{task.name} {name} fell from {metric.parent:.0%} to {metric.pruned:.0%}{guess}"


def _share(value: float, whole: float) -> float:
    return value / whole if whole else 1.0
