"""Log-likelihood of continuations after a context, computed once for what several of them share.

The choices of one item have one context: its keys and values are computed once and read by every choice. Items
of similar length share a batch, and the head sees the continuations' positions alone. The sums are those of one
forward pass a choice over context + continuation, which is what lm-evaluation-harness computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from prune2serve.errors import Prune2ServeError
from prune2serve.evaluation import CHUNK_TOKENS
from prune2serve.progress import task as bar
from prune2serve.task_files import Item, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = {"cpu": 256, "other": 8192}
"""Padded tokens of one forward pass by device: enough to fill it, and no more, since a larger batch is padded more.
A pass of one item may be longer."""
BATCH_LOGITS = 2**27
"""Logits of one forward pass (half a gigabyte in float32)."""

Tokens = list[int]


@dataclass(frozen=True)
class EncodedItem:
    """An item in tokens."""

    context: Tokens
    choices: tuple[Tokens, ...]


@dataclass(frozen=True)
class ItemScore:
    """What a model says of one item's choices."""

    loglikelihoods: tuple[float, ...]
    """Summed over each choice's tokens, nats."""
    greedy: tuple[bool, ...]
    """Whether greedy decoding after the context would write the choice."""


def encode_task(task: Task, tokenizer: PreTrainedTokenizerBase) -> list[EncodedItem]:
    """Split every item into context and continuation tokens.

    Raises:
        Prune2ServeError: a continuation has no token of its own; the message names the line.
    """
    return [_encode_item(item, task.source, tokenizer) for item in task.items]


def _encode_item(item: Item, source: str, tokenizer: PreTrainedTokenizerBase) -> EncodedItem:
    pairs = [encode_pair(tokenizer, item.context, choice) for choice in item.choices]
    for (_, tokens), choice in zip(pairs, item.choices, strict=True):
        if not tokens:
            raise Prune2ServeError(
                f"{source} line {item.line}: {choice!r} adds no token to its context, so it has no likelihood: begin "
                "it with the space that separates them"
            )
    return EncodedItem(pairs[0][0], tuple(tokens for _, tokens in pairs))


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[Tokens, Tokens]:
    """Tokens of the context, and what the continuation adds to them, as lm-evaluation-harness cuts them.

    Both are tokenised as one text, and the continuation is what follows as many tokens as the context alone has.
    Spaces that end the context move to the continuation, where most vocabularies keep them. An empty context is
    the beginning-of-sequence token, or the end-of-sequence token where there is none.
    """
    num_spaces = len(context) - len(context.rstrip())
    if num_spaces:
        continuation, context = context[-num_spaces:] + continuation, context[:-num_spaces]
    if not context:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        tokens = encode_text(tokenizer, continuation, special=False)
        return [start], tokens[1:] if tokens[:1] == [start] else tokens
    before = encode_text(tokenizer, context)
    return before, encode_text(tokenizer, context + continuation)[len(before) :]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> Tokens:
    """With the special tokens that the tokenizer adds by itself, unless the text begins with one in writing."""
    begins = tokenizer.bos_token or tokenizer.eos_token
    special = special and not (begins and text.startswith(begins))
    tokens: Tokens = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return tokens


def score_items(model: PreTrainedModel, items: Sequence[EncodedItem], description: str = "Scoring") -> list[ItemScore]:
    """Score every choice of every item, in the items' order.

    A sequence longer than the model's positions loses tokens at its start.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    shared = [i for i, item in enumerate(items) if _may_share(item, limit)]
    apart = [(i, j) for i in sorted(set(range(len(items))) - set(shared)) for j in range(len(items[i].choices))]
    found: dict[tuple[int, int], tuple[float, bool]] = {}
    with torch.inference_mode(), bar(description, sum(len(item.choices) for item in items)) as progress:
        for batch in _batches([_shared_shape(i, items[i]) for i in shared], model):
            keys = [(i, j) for i in batch for j in range(len(items[i].choices))]
            found |= zip(keys, _score_shared(model, [items[i] for i in batch]), strict=True)
            progress.advance(len(keys))
        rows = [_row(items[i].context, items[i].choices[j], limit) for i, j in apart]
        for batch in _batches([_Shape(k, len(row), 1, len(choice)) for k, (row, choice) in enumerate(rows)], model):
            found |= zip([apart[k] for k in batch], _score_rows(model, [rows[k] for k in batch]), strict=True)
            progress.advance(len(batch))
    return [
        ItemScore(*zip(*(found[i, j] for j in range(len(item.choices))), strict=True)) for i, item in enumerate(items)
    ]


def _may_share(item: EncodedItem, limit: int) -> bool:
    """One choice has nothing to share; a context of one token is its choices' first input anyway."""
    longest = len(item.context) + max(map(len, item.choices)) - 1
    return len(item.choices) > 1 and len(item.context) > 1 and longest <= limit


@dataclass(frozen=True)
class _Shape:
    """What an entry of a batch costs: a pass over `context` tokens, and `rows` rows of `step` logits."""

    index: int
    context: int
    rows: int
    step: int


def _shared_shape(index: int, item: EncodedItem) -> _Shape:
    return _Shape(index, len(item.context) - 1, len(item.choices), max(map(len, item.choices)))


def _batches(shapes: Sequence[_Shape], model: PreTrainedModel) -> list[list[int]]:
    """Indices of neighbours in length whose padded passes fit the limits, in the order that pads least."""
    orders = [
        sorted(shapes, key=key, reverse=True)
        for key in (lambda s: (s.context, s.step), lambda s: (s.step, s.context), lambda s: s.context + s.rows * s.step)
    ]
    cut = [_cut(order, model) for order in orders]
    best = min(cut, key=lambda batches: sum(sum(_padded_sizes(batch)) for batch in batches))
    return [[shape.index for shape in batch] for batch in best]


def _cut(order: Sequence[_Shape], model: PreTrainedModel) -> list[list[_Shape]]:
    most = BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["other"])
    vocabulary = model.config.get_text_config().vocab_size
    batches: list[list[_Shape]] = []
    for shape in order:
        context, choices = _padded_sizes([*batches[-1], shape]) if batches else (0, 0)
        if not batches or max(context, choices) > most or choices * vocabulary > BATCH_LOGITS:
            batches.append([])
        batches[-1].append(shape)
    return batches


def _padded_sizes(batch: Sequence[_Shape]) -> tuple[int, int]:
    """Tokens of the pass over the contexts, and of the pass over the choices."""
    contexts = len(batch) * max(shape.context for shape in batch)
    return contexts, sum(shape.rows for shape in batch) * max(shape.step for shape in batch)


def _score_shared(model: PreTrainedModel, items: Sequence[EncodedItem]) -> Iterator[tuple[float, bool]]:
    """Run the contexts but their last token, then every choice after a copy of its context's keys and values."""
    prefix, prefix_mask = _padded([item.context[:-1] for item in items], left=True)
    keys_values = _forward(model, prefix, prefix_mask, _positions(prefix_mask), keep=1, use_cache=True).past_key_values
    repeats = torch.tensor([len(item.choices) for item in items])
    keys_values.batch_select_indices(torch.arange(len(items)).repeat_interleave(repeats).to(model.device))
    choices = [(item.context[-1:] + choice[:-1], choice) for item in items for choice in item.choices]
    inputs, mask = _padded([row for row, _ in choices], left=False)
    whole = torch.cat([prefix_mask.repeat_interleave(repeats, 0), mask], 1)
    positions = _positions(whole)[:, prefix.shape[1] :]
    logits = _forward(model, inputs, whole, positions, use_cache=True, past_key_values=keys_values).logits
    for row, (_, choice) in zip(logits, choices, strict=True):
        yield _sum(row[: len(choice)], choice)


def _row(context: Tokens, choice: Tokens, limit: int) -> tuple[Tokens, Tokens]:
    """The inputs that predict the choice, and the part of it that they can predict."""
    inputs = (context + choice)[-(limit + 1) :][:-1]
    return inputs, choice[-len(inputs) :]


def _score_rows(model: PreTrainedModel, rows: Sequence[tuple[Tokens, Tokens]]) -> Iterator[tuple[float, bool]]:
    """Run whole rows, padded on the left so that their last positions are the choices'."""
    inputs, mask = _padded([row for row, _ in rows], left=True)
    keep = max(len(choice) for _, choice in rows)
    logits = _forward(model, inputs, mask, _positions(mask), keep=keep).logits
    for row, (_, choice) in zip(logits, rows, strict=True):
        yield _sum(row[-len(choice) :], choice)


def _sum(logits: torch.Tensor, choice: Tokens) -> tuple[float, bool]:
    """[tokens, V] logits of a choice -> its summed log-likelihood, and whether each token is the most likely."""
    labels = torch.tensor(choice, device=logits.device)
    total, greedy = 0.0, True
    for z, label in zip(logits.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True):
        z = z.float()
        chosen = z.gather(-1, label[:, None])[:, 0]
        total += float((chosen - z.logsumexp(-1)).sum(dtype=torch.float64))
        greedy = greedy and bool((z.argmax(-1) == label).all())
    return total, greedy


def _forward(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor | None,
    *,
    keep: int = 0,
    use_cache: bool = False,
    **more: Any,
) -> Any:
    """[B, T] ids, [B, past + T] mask, [B, T] positions; `keep` last positions get logits, 0 for all."""
    if positions is not None and _takes_positions(type(model)):
        more["position_ids"] = positions.to(model.device)
    return model(
        input_ids=input_ids.to(model.device),
        attention_mask=None if bool(mask.all()) else mask.to(model.device),
        use_cache=use_cache,
        logits_to_keep=keep,
        **more,
    )


def _takes_positions(kind: type) -> bool:
    """Models with linear biases (BLOOM) know a position from the mask alone."""
    return "position_ids" in inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Count real tokens from 0, so that padding on the left shifts nothing."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def _padded(rows: Sequence[Tokens], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] ids and mask."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return ids, mask
