"""Quality of a pruned model beside its parent: perplexity, KL to the parent, top-1 agreement."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from prune2serve.activations import batches
from prune2serve.errors import Prune2ServeError
from prune2serve.progress import track
from prune2serve.records import CalibrationSet, Perplexity, QualityReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_TOKENS = 64
"""Positions whose float32 logits are alive at once: a chunk fits the processor's cache."""


@dataclass(frozen=True)
class WindowSums:
    """Sums over the predicted tokens of each window, [N] each, float64."""

    num_tokens: torch.Tensor
    parent_nll: torch.Tensor
    pruned_nll: torch.Tensor
    kl: torch.Tensor
    agree: torch.Tensor


class TeacherLogits:
    """Keeps the parent's logits of each window, [1, T - 1, V], as long as there is room; the rest is run again."""

    def __init__(self, budget_bytes: int) -> None:
        self._room = budget_bytes
        self._kept: dict[int, torch.Tensor] = {}

    def __call__(self, index: int, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the kept logits of window `index`, or compute them."""
        if index in self._kept:
            return self._kept[index]
        logits = compute()
        size = logits.numel() * logits.element_size()
        if size <= self._room:
            self._room -= size
            self._kept[index] = logits.clone()
        return logits


def evaluate(
    parent: PreTrainedModel,
    pruned: PreTrainedModel,
    windows: CalibrationSet,
    *,
    as_pruned: Callable[[], AbstractContextManager[object]] = nullcontext,
    teacher_logits: TeacherLogits | None = None,
    description: str = "Evaluating",
) -> QualityReport:
    """Run both models over the same windows.

    Args:
        parent, pruned: may be the same object when `as_pruned` is a context that prunes it in memory.
        windows: [N, T]; padding is not predicted, nor is a window's first token.
        teacher_logits: the parent's logits of these windows, kept from one pruned model to the next.
    """
    rows = []
    with torch.inference_mode():
        for index, (input_ids, mask) in enumerate(track(list(batches(windows, 1)), description)):
            compute = partial(next_token_logits, parent, input_ids, mask)
            teacher = compute() if teacher_logits is None else teacher_logits(index, compute)
            with as_pruned():
                student = next_token_logits(pruned, input_ids, mask)
            rows.append(_window_sums(teacher, student, input_ids, mask))
    sums = torch.stack(rows).T
    return summarise(WindowSums(*sums), windows.source)


def next_token_logits(model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return [B, T - 1, V] logits of tokens 1 .. T - 1, in the model's dtype and on its device."""
    attention_mask = None if bool(mask.all()) else mask.to(model.device)
    out = model(input_ids=input_ids.to(model.device), attention_mask=attention_mask, use_cache=False)
    logits: torch.Tensor = out.logits[:, :-1]
    return logits


def _window_sums(
    teacher: torch.Tensor, student: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """[1, T - 1, V] logits of both -> the five sums of WindowSums, [5] float64."""
    real = mask[0, 1:].bool().to(teacher.device)
    labels = input_ids[0, 1:].to(teacher.device)[real]
    total = torch.zeros(5, dtype=torch.float64)
    total[0] = len(labels)
    pairs = zip(
        teacher[0][real].split(CHUNK_TOKENS),
        student[0][real].split(CHUNK_TOKENS),
        labels.split(CHUNK_TOKENS),
        strict=True,
    )
    for teacher_chunk, student_chunk, label in pairs:
        p, q = teacher_chunk.float().log_softmax(-1), student_chunk.float().log_softmax(-1)
        total[1] -= p.gather(-1, label[:, None]).sum(dtype=torch.float64).cpu()
        total[2] -= q.gather(-1, label[:, None]).sum(dtype=torch.float64).cpu()
        total[3] += (p.exp() * (p - q)).sum(dtype=torch.float64).cpu()
        total[4] += (p.argmax(-1) == q.argmax(-1)).sum().cpu()
    return total


def summarise(sums: WindowSums, text: str) -> QualityReport:
    """Means over tokens, standard errors over windows (tokens of one window are not independent).

    Raises:
        Prune2ServeError: no token to predict, or a model's logits are not finite.
    """
    num_tokens = float(sums.num_tokens.sum())
    if num_tokens == 0:
        raise Prune2ServeError(f"{text} has no token to predict: give a longer text")
    parent, pruned = float(sums.parent_nll.sum()) / num_tokens, float(sums.pruned_nll.sum()) / num_tokens
    kl = float(sums.kl.sum()) / num_tokens
    if not all(math.isfinite(value) for value in (parent, pruned, kl)):
        raise Prune2ServeError(
            f"the log-likelihood of {text} is not finite (parent {parent}, pruned {pruned}): use --dtype float32"
        )
    return QualityReport(
        text=text,
        num_windows=len(sums.num_tokens),
        num_tokens=int(num_tokens),
        perplexity=Perplexity(
            parent=_exp(parent),
            pruned=_exp(pruned),
            ratio=_exp(pruned - parent),
            standard_error=_exp(pruned) * mean_standard_error(sums.pruned_nll, sums.num_tokens),
            ratio_standard_error=_exp(pruned - parent)
            * mean_standard_error(sums.pruned_nll - sums.parent_nll, sums.num_tokens),
        ),
        kl=kl,
        kl_standard_error=mean_standard_error(sums.kl, sums.num_tokens),
        top1_agreement=float(sums.agree.sum()) / num_tokens,
    )


def mean_standard_error(sums: torch.Tensor, counts: torch.Tensor) -> float:
    """Standard error of sum(sums) / sum(counts) over windows (ratio estimator); 0 for a single window."""
    n = len(sums)
    if n < 2:
        return 0.0
    mean = sums.sum() / counts.sum()
    residual = sums - mean * counts
    return float(torch.sqrt(residual.square().sum() * n / (n - 1)) / counts.sum())


def _exp(nll: float) -> float:
    """exp, capped where a float would overflow: a perplexity of 1e300 is as dead as any."""
    return math.exp(min(nll, 690.0))
