"""What a generation request asks for and what comes back, whichever way it arrived."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

    from prune2serve.serve.detokenize import TextStream

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop; the names and meanings are vLLM's."""

    max_tokens: int
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    logprobs: int | None = None
    """Alternatives to report for each generated token; None: no log-probabilities."""
    prompt_logprobs: int | None = None
    """The same for each prompt token but the first."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def shapes_logits(self) -> bool:
        """Whether the logits are changed before the choice."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1
            or self.logit_bias
            or self.min_tokens
        )


@dataclass(frozen=True)
class TokenLogprob:
    """A token with the log-probability (natural) that the unmodified model gave it."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most likely alternatives, best first."""


@dataclass(frozen=True)
class Delta:
    """What is new since the last one."""

    text: str = ""
    num_tokens: int = 0
    """Tokens generated since the last delta, whether or not they have text yet."""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """Only in the first delta of a request that asked for them; the first token has none."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    """With finish_reason `error`: what went wrong, for the client."""


@dataclass(eq=False)
class Sequence:
    """One prompt being continued. Owned by the engine's thread once submitted."""

    prompt_ids: list[int]
    params: SamplingParams
    emit: Callable[[Delta], None]
    """Called on the engine's thread; must not block."""
    stream: TextStream
    stop_ids: frozenset[int]
    """Token ids that end the text: the model's own unless ignored, and the request's."""
    random: np.random.Generator
    num_cached: int = 0
    """Tokens whose keys and values are in the cache."""
    output_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    cancelled: bool = False
    finished: bool = False
    arrival_s: float = field(default_factory=time.monotonic)
    scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)
