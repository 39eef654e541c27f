"""Choose the next token from a row of logits.

The order is vLLM's: log-probabilities of the unmodified model, then bias and penalties, temperature, min_p,
top_k, top_p, and one draw. Each sequence draws from its own generator, so a seed gives the same tokens
whatever else is in the batch.
"""

from __future__ import annotations

import numpy as np

from prune2serve.serve.generation import SamplingParams, Sequence, TokenLogprob

FIRST_CANDIDATES = 1024
"""top_p sorts this many of the most likely tokens first; a flat distribution needs more and gets them."""


class NotFiniteError(Exception):
    """The model's logits hold NaN: nothing can be chosen."""


def choose(logits: np.ndarray, sequence: Sequence) -> tuple[int, TokenLogprob | None]:
    """Choose from float32 logits [vocab]; the row may be changed.

    Returns:
        the token and, when the request asked for it, its log-probability.

    Raises:
        NotFiniteError: the logits hold NaN.
    """
    params = sequence.params
    best = int(logits.argmax())
    if np.isnan(logits[best]):  # argmax stops at the first NaN
        raise NotFiniteError("the model returned NaN logits")
    table = log_softmax(logits) if params.logprobs is not None else None
    if params.shapes_logits:
        _shape(logits, sequence)
        best = int(logits.argmax())
    token = best if params.greedy else _draw(logits, params, sequence.random)
    if table is None:
        return token, None
    return token, describe(table, token, params.logprobs or 0)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis, float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def describe(table: np.ndarray, token: int, num_top: int) -> TokenLogprob:
    """Look up a token and the `num_top` best ones in log-probabilities [vocab]."""
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        ids = _largest(table, min(num_top, len(table)))
        top = tuple((int(i), float(table[i])) for i in ids)
    return TokenLogprob(token, float(table[token]), top)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest values, largest first, ties by index."""
    if count >= len(values):
        ids = np.arange(len(values))
    else:
        ids = np.sort(np.argpartition(values, len(values) - count)[len(values) - count :])
    order: np.ndarray = ids[np.argsort(-values[ids], kind="stable")]
    return order


def _shape(logits: np.ndarray, sequence: Sequence) -> None:
    params, output = sequence.params, sequence.output_ids
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if len(output) < params.min_tokens and sequence.stop_ids:
        logits[list(sequence.stop_ids)] = -np.inf
    if params.repetition_penalty != 1:
        seen = np.unique(np.array(sequence.prompt_ids + output, dtype=np.int64))
        values = logits[seen]
        scale = params.repetition_penalty
        logits[seen] = np.where(values > 0, values / scale, values * scale)
    if output and (params.frequency_penalty or params.presence_penalty):
        tokens, counts = np.unique(np.array(output, dtype=np.int64), return_counts=True)
        logits[tokens] -= params.frequency_penalty * counts + params.presence_penalty


def _draw(logits: np.ndarray, params: SamplingParams, random: np.random.Generator) -> int:
    # At most 0, so that a tiny temperature takes the others to -inf and never to NaN.
    with np.errstate(over="ignore"):
        scaled = (logits - logits.max()).astype(np.float64) / params.temperature
    ids: np.ndarray | None = None
    if params.min_p > 0:
        scaled[scaled < np.log(params.min_p)] = -np.inf
    if 0 < params.top_k < len(scaled):
        ids = _largest(scaled, params.top_k)
        scaled = scaled[ids]
    weights = np.exp(scaled)
    if params.top_p < 1:
        kept = _nucleus(weights, params.top_p)
        ids = kept if ids is None else ids[kept]
        weights = weights[kept]
    total = np.cumsum(weights)
    at = int(np.searchsorted(total, random.random() * total[-1], side="right"))
    at = min(at, len(total) - 1)
    return at if ids is None else int(ids[at])


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Indices of the smallest set of the largest weights that holds `top_p` of the sum, largest first."""
    wanted = top_p * weights.sum()
    count = FIRST_CANDIDATES
    while True:
        ids = _largest(weights, min(count, len(weights)))
        mass = np.cumsum(weights[ids])
        if mass[-1] >= wanted or count >= len(weights):
            size = int(np.searchsorted(mass, wanted)) + 1
            return ids[:size]
        count *= 8
