"""The parent's own samples as calibration text, when the user has none (self-calibration, arXiv 2410.17170).

Generated in batches with a seed, kept only when they are not degenerate repetition, never twice the same,
and cached by the model's fingerprint and every setting.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune2serve.errors import Prune2ServeError
from prune2serve.paths import cache_dir
from prune2serve.progress import task
from prune2serve.records import Checkpoint
from prune2serve.staging import write_text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Tokens = list[int]


@dataclass(frozen=True)
class Sampling:
    """How the parent is sampled. The first tokens are drawn hotter: they decide what a sample is about."""

    temperature: float = 0.9
    first_temperature: float = 1.5
    num_first: int = 8
    top_k: int = 200
    batch_size: int = 64
    max_length: int = 256
    """Tokens a sample: twice as many samples of half the length cost half the steps, and vary more."""
    min_distinct: float = 0.4
    """Smallest share of distinct 4-grams that is not called degenerate."""


def self_samples(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    max_length: int,
    seed: int,
    load_parent: Callable[[], PreTrainedModel],
    sampling: Sampling | None = None,
) -> list[Tokens]:
    """Return documents (token lists) the parent wrote, at least `num_tokens` together, from the cache or new.

    Raises:
        Prune2ServeError: the model keeps producing degenerate or identical text.
    """
    sampling = sampling or Sampling()
    settings = {**asdict(sampling), "tokens": num_tokens, "length": min(max_length, sampling.max_length), "seed": seed}
    key = hashlib.sha256(json.dumps([checkpoint.fingerprint, settings]).encode()).hexdigest()[:24]
    cached = cache_dir() / "self" / f"{key}.jsonl"
    if cached.is_file():
        return [json.loads(line)["input_ids"] for line in cached.read_text().splitlines()]
    documents = _write(load_parent(), tokenizer, checkpoint.source, settings, sampling)
    _save(cached, documents, tokenizer)
    return documents


def _write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, settings: dict[str, Any], sampling: Sampling
) -> list[Tokens]:
    """Sample batch after batch, each opening in turn and none larger than what is missing, until there is enough."""
    num_tokens, length = settings["tokens"], settings["length"]
    openings = _openings(tokenizer, model)
    documents: list[Tokens] = []
    seen: set[tuple[int, ...]] = set()
    rejected = batch = total = 0
    with task("Writing calibration text with the parent", num_tokens) as bar:
        while total < num_tokens or len(documents) < 3:
            share = max(num_tokens - total, 0) / max(len(openings) - batch, 1)
            rows = min(max(math.ceil(1.5 * share / length), 4), sampling.batch_size)
            opening = openings[batch % len(openings)]
            for sample in _batch(model, tokenizer, opening, rows, settings, batch, sampling):
                start = tuple(sample[len(opening) :][:32])
                if degenerate(sample, sampling.min_distinct) or start in seen:
                    rejected += 1
                    continue
                seen.add(start)
                documents.append(sample)
                total += len(sample) + 1
                bar.advance(len(sample) + 1)
            batch += 1
            if rejected > 4 * len(documents) + 2 * sampling.batch_size:
                raise Prune2ServeError(
                    f"{name} writes degenerate text ({rejected} of {rejected + len(documents)} samples rejected): "
                    "give real text with --calibration PATH"
                )
    return documents


def degenerate(tokens: Tokens, min_distinct: float) -> bool:
    """True for a sample too short to use, or whose 4-grams mostly repeat."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return len(tokens) < 16 or len(set(grams)) < min_distinct * len(grams)


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    opening: Tokens,
    rows: int,
    settings: dict[str, Any],
    batch: int,
    sampling: Sampling,
) -> list[Tokens]:
    """One batch, from a seed of its own."""
    import torch

    generator = torch.Generator(model.device).manual_seed(settings["seed"] * 10_007 + batch)
    start = torch.tensor([opening] * rows, device=model.device)
    tokens = generate(model, start, settings["length"], generator, sampling, tokenizer.eos_token_id)
    return [_until_end(row, len(opening), tokenizer.eos_token_id) for row in tokens.tolist()]


def _openings(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[Tokens]:
    """What a sample starts from: the beginning-of-text token, and the chat template up to the user's first word."""
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    plain = [bos if bos is not None else 0]
    if not tokenizer.chat_template:
        return [plain]
    mark = "\x00"
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    before, found, _ = str(text).partition(mark)
    chat = tokenizer(before, add_special_tokens=False)["input_ids"] if found else []
    return [plain, chat] if chat else [plain]


def generate(
    model: PreTrainedModel,
    start: torch.Tensor,
    max_length: int,
    generator: torch.Generator,
    sampling: Sampling,
    eos: int | None,
) -> torch.Tensor:
    """Sample [B, max_length] tokens with a KV cache; a row that ended is filled with its end token."""
    import torch

    tokens, cache, step = start, None, start
    ended = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    with torch.inference_mode():
        for position in range(max_length - start.shape[1]):
            out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            hot = position < sampling.num_first
            logits = out.logits[:, -1].float() / (sampling.first_temperature if hot else sampling.temperature)
            top, index = logits.topk(min(sampling.top_k, logits.shape[-1]))
            drawn = torch.multinomial(top.softmax(-1), 1, generator=generator)
            step = index.gather(-1, drawn)
            if eos is not None:
                step = torch.where(ended[:, None], torch.full_like(step, eos), step)
                ended |= step[:, 0] == eos
            tokens = torch.cat([tokens, step], dim=-1)
            if eos is not None and bool(ended.all()):
                break
    return tokens


def _until_end(row: Tokens, prompt_length: int, eos: int | None) -> Tokens:
    """Cut after the first end token that the model itself wrote."""
    for i in range(prompt_length, len(row)):
        if row[i] == eos:
            return row[:i]
    return row


def _save(path: Path, documents: list[Tokens], tokenizer: PreTrainedTokenizerBase) -> None:
    lines = (json.dumps({"text": tokenizer.decode(tokens), "input_ids": tokens}) for tokens in documents)
    write_text(path, "\n".join(lines) + "\n")
