"""Between HTTP and the engine: requests checked against the model, choices started, deltas gathered."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from prune2serve.serve.exposition import EngineMetrics
from prune2serve.serve.generation import Delta, SamplingParams, Sequence
from prune2serve.serve.http_guard import ApiError
from prune2serve.serve.ort_engine import EngineUnavailableError, OrtEngine, QueueFullError
from prune2serve.serve.protocol import (
    MAX_CHOICES,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from prune2serve.serve.tokenization import ChatTemplateError, TextModel

DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True)
class ServiceLimits:
    """What one request may cost."""

    max_body_bytes: int = 8 * 2**20
    request_timeout_s: float = 600.0


@dataclass
class Service:
    """One served model."""

    text: TextModel
    engine: OrtEngine
    names: tuple[str, ...]
    metrics: EngineMetrics
    limits: ServiceLimits = field(default_factory=ServiceLimits)
    created: int = 0
    # One thread: tokenizing is short, and a burst of long prompts must not take every core from the engine.
    _tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenize"))

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist; served is {self.names[0]!r}",
                code="model_not_found",
            )

    async def completion_prompts(self, request: CompletionRequest) -> list[list[int]]:
        """Tokenize the prompts and check that they fit."""
        prompts = request.prompts()
        if len(prompts) * (request.n or 1) > MAX_CHOICES:
            raise ApiError(
                400,
                f"{len(prompts)} prompts with n={request.n} are more than {MAX_CHOICES} choices",
                param="prompt",
            )
        ids = []
        for prompt in prompts:
            if isinstance(prompt, str):
                prompt = await self._encode(prompt, add_special_tokens=request.add_special_tokens)
            self._check_prompt(prompt)
            ids.append(prompt)
        return ids

    async def chat_prompt(self, request: ChatCompletionRequest) -> list[int]:
        """Render the messages with the model's template, tokenize, and check that they fit."""
        messages = [message.as_template_input() for message in request.messages]
        try:
            text = self.text.render_chat(
                messages,
                add_generation_prompt=request.add_generation_prompt,
                **(request.chat_template_kwargs or {}),
            )
        except ChatTemplateError as error:
            raise ApiError(400, str(error), param="messages") from None
        # The template has written the special tokens itself.
        ids = await self._encode(text, add_special_tokens=False)
        self._check_prompt(ids)
        return ids

    def sampling(
        self,
        request: GenerationRequest,
        prompts: list[list[int]],
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """Check what is asked for against the model; `max_tokens` None: all the room there is."""
        longest = max(len(prompt) for prompt in prompts)
        room = self.engine.max_length - longest
        if max_tokens is not None and max_tokens > room:
            raise ApiError(
                400,
                f"the model's maximum context length is {self.engine.max_length} tokens: {longest} in "
                "the prompt and "
                f"max_tokens {max_tokens} are {longest + max_tokens - self.engine.max_length} too many",
                code="context_length_exceeded",
                param="max_tokens",
            )
        try:
            return request.sampling(
                self.text.defaults,
                self.engine.runner.vocab_size,
                room if max_tokens is None else max_tokens,
                logprobs,
                prompt_logprobs,
            )
        except ValueError as error:
            raise ApiError(400, str(error)) from None

    async def generate(
        self, prompts: list[list[int]], params: SamplingParams, n: int
    ) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (choice, delta) as they come; choice = prompt * n + i. Closing it frees the rows.

        Raises:
            ApiError: the engine has no room (429), is not there (503), failed (500), or took too long (504).
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Delta]]()
        sequences: list[Sequence] = []

        def emit_to(index: int) -> Any:
            return lambda delta: loop.call_soon_threadsafe(queue.put_nowait, (index, delta))

        try:
            for index in range(len(prompts) * n):
                sequences.append(self._submit(prompts[index // n], _seeded(params, index % n), emit_to(index)))
            left = len(sequences)
            async with asyncio.timeout(self.limits.request_timeout_s):
                while left:
                    index, delta = await queue.get()
                    if delta.finish_reason == "error":
                        status = 503 if self.engine.state != "ready" else 500
                        raise ApiError(status, delta.error or "the engine failed")
                    left -= delta.finish_reason is not None
                    yield index, delta
        except TimeoutError:
            raise ApiError(
                504, f"the request took longer than {self.limits.request_timeout_s:g} s", code="timeout"
            ) from None
        finally:
            for sequence in sequences:
                self.engine.cancel(sequence)

    def _submit(self, prompt: list[int], params: SamplingParams, emit: Any) -> Sequence:
        try:
            return self.engine.submit(prompt, params, emit)
        except QueueFullError as error:
            wait_s = min(max(math.ceil(self.metrics.mean_e2e_s), 1), 60)
            raise ApiError(
                429, f"{error}: try again later", code="queue_full", headers={"Retry-After": str(wait_s)}
            ) from None
        except EngineUnavailableError as error:
            raise ApiError(503, str(error), code="engine_unavailable", headers={"Retry-After": "5"}) from None

    async def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) > self.engine.max_length * self.text.longest_token:
            raise self._too_long(f"more than {self.engine.max_length}")
        return await asyncio.get_running_loop().run_in_executor(
            self._tokenizing, lambda: self.text.encode(text, add_special_tokens=add_special_tokens)
        )

    def _check_prompt(self, ids: list[int]) -> None:
        if not ids:
            raise ApiError(400, "the prompt is empty: give at least one token", param="prompt")
        if len(ids) >= self.engine.max_length:
            raise self._too_long(str(len(ids)))
        if max(ids) >= self.engine.runner.vocab_size:
            raise ApiError(
                400,
                f"token id {max(ids)} is outside of the vocabulary of {self.engine.runner.vocab_size}",
                param="prompt",
            )

    def _too_long(self, count: str) -> ApiError:
        return ApiError(
            400,
            f"the model's maximum context length is {self.engine.max_length} tokens and the prompt has "
            f"{count}: "
            "shorten it",
            code="context_length_exceeded",
            param="prompt",
        )


def _seeded(params: SamplingParams, choice: int) -> SamplingParams:
    """Give the n choices of one prompt a seed each."""
    from dataclasses import replace

    if params.seed is None or choice == 0:
        return params
    return replace(params, seed=(params.seed + choice) % 2**64)
