"""Greedy continuations of a few fixed prompts, and how much they repeat themselves.

Likelihoods are taken on text that people wrote; a model can score it passably and still fall into a loop as soon
as it reads its own words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from prune2serve.generation import greedy
from prune2serve.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    "The history of the city begins in the early years of the twelfth century, when",
    "Scientists have discovered that the deep ocean is home to many animals which",
    "She opened the letter slowly, read the first line twice, and then",
    "To bake a simple loaf of bread at home you need flour, water and",
)
"""Narrative, exposition, fiction and instruction: all continue without a chat template."""

NUM_TOKENS = 64
NGRAM = 4


@dataclass(frozen=True)
class Repetition(Record):
    """Share of distinct 4-grams in greedy continuations, and what was written."""

    parent: float
    pruned: float
    num_tokens: dict[str, int]
    """Tokens written before an end of sequence, `parent` and `pruned`."""
    continuations: tuple[dict[str, str], ...]
    """`prompt`, `parent` and `pruned`."""


def continue_prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Continue all prompts greedily by NUM_TOKENS tokens; each ends before its first end-of-sequence token."""
    written = greedy(model, prompt_ids(tokenizer), NUM_TOKENS).tolist()
    ends = end_tokens(model, tokenizer)
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in written]


def prompt_ids(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """[B, T]: the prompts cut to the shortest one's tokens, so that one batch needs no padding."""
    rows = [tokenizer(prompt, verbose=False)["input_ids"] for prompt in PROMPTS]
    return torch.tensor([row[: min(map(len, rows))] for row in rows])


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends a sequence."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    found = configured if isinstance(configured, list) else [configured]
    return {token for token in (*found, tokenizer.eos_token_id) if token is not None}


def compare_repetition(
    tokenizer: PreTrainedTokenizerBase, parent: Sequence[Sequence[int]], pruned: Sequence[Sequence[int]]
) -> Repetition:
    prompts: list[list[int]] = prompt_ids(tokenizer).tolist()
    return Repetition(
        parent=distinct_share(parent),
        pruned=distinct_share(pruned),
        num_tokens={"parent": sum(map(len, parent)), "pruned": sum(map(len, pruned))},
        continuations=tuple(
            {
                name: str(tokenizer.decode(list(ids)))
                for name, ids in zip(("prompt", "parent", "pruned"), row, strict=True)
            }
            for row in zip(prompts, parent, pruned, strict=True)
        ),
    )


def distinct_share(rows: Sequence[Sequence[int]], n: int = NGRAM) -> float:
    """Distinct n-grams of each row over all its n-grams, pooled over the rows; 1 when there is none."""
    grams = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rows]
    total = sum(map(len, grams))
    return sum(len(set(row)) for row in grams) / total if total else 1.0
