"""Answers in OpenAI's shapes: completions and chat completions, whole and in chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prune2serve.serve.generation import Delta, TokenLogprob

TokenText = Callable[[int], str]


@dataclass
class Choice:
    """What one choice has gathered."""

    index: int
    prompt_ids: list[int]
    text: str = ""
    num_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.num_tokens += delta.num_tokens
        self.logprobs += delta.logprobs
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason


@dataclass(frozen=True)
class Answer:
    """What every part of one answer repeats."""

    kind: str
    """`text_completion` or `chat.completion`."""
    model: str
    token_text: TokenText
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""

    @staticmethod
    def new(kind: str, model: str, token_text: TokenText) -> Answer:
        prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
        return Answer(kind, model, token_text, id=f"{prefix}-{uuid.uuid4().hex}")

    def head(self, kind: str | None = None) -> dict[str, Any]:
        return {"id": self.id, "object": kind or self.kind, "created": self.created, "model": self.model}


def usage(choices: list[Choice], num_prompt_tokens: int) -> dict[str, int]:
    generated = sum(choice.num_tokens for choice in choices)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": num_prompt_tokens + generated,
    }


def completion(
    answer: Answer, choices: list[Choice], num_prompt_tokens: int, *, logprobs: int | None, echo: bool
) -> dict[str, Any]:
    """A whole text completion; with `echo`, the prompt stands before each choice's text."""
    rows = []
    for choice in choices:
        entries: list[TokenLogprob | None] = list(choice.logprobs)
        lead = ""
        if echo:
            lead = "".join(answer.token_text(token) for token in choice.prompt_ids)
            entries = [*(choice.prompt_logprobs or ()), *entries]
        block = None
        if logprobs is not None:
            prompt = choice.prompt_ids if echo else []
            block = completion_logprobs(entries, prompt, answer.token_text)
        rows.append(
            {
                "index": choice.index,
                "text": lead + choice.text,
                "logprobs": block,
                "finish_reason": choice.finish_reason,
                "stop_reason": None,
            }
        )
    return {**answer.head(), "choices": rows, "usage": usage(choices, num_prompt_tokens)}


def completion_logprobs(
    entries: list[TokenLogprob | None], prompt_ids: list[int], token_text: TokenText, offset: int = 0
) -> dict[str, Any]:
    """The completions API's parallel lists; the first token of a prompt has no log-probability."""
    tokens, values, tops, offsets = [], [], [], []
    for position, entry in enumerate(entries):
        text = token_text(entry.token_id if entry is not None else prompt_ids[position])
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        values.append(None if entry is None else entry.logprob)
        tops.append(None if entry is None else _top(entry, token_text))
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _top(entry: TokenLogprob, token_text: TokenText) -> dict[str, float]:
    best: dict[str, float] = {}
    for token, value in entry.top:
        # Two tokens may be spelled alike (parts of a character): the more likely one stands.
        best.setdefault(token_text(token), value)
    best.setdefault(token_text(entry.token_id), entry.logprob)
    return best


def completion_chunk(answer: Answer, index: int, delta: Delta, *, logprobs: int | None, offset: int) -> dict[str, Any]:
    block = None
    if logprobs is not None and delta.logprobs:
        block = completion_logprobs(list(delta.logprobs), [], answer.token_text, offset)
    choice = {"index": index, "text": delta.text, "logprobs": block, "finish_reason": delta.finish_reason}
    return {**answer.head(), "choices": [choice]}


def chat(answer: Answer, choices: list[Choice], num_prompt_tokens: int, *, logprobs: bool) -> dict[str, Any]:
    """A whole chat completion."""
    rows = [
        {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": chat_logprobs(choice.logprobs, answer.token_text) if logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for choice in choices
    ]
    return {**answer.head(), "choices": rows, "usage": usage(choices, num_prompt_tokens)}


def chat_logprobs(entries: list[TokenLogprob] | tuple[TokenLogprob, ...], token_text: TokenText) -> dict[str, Any]:
    def one(token: int, value: float) -> dict[str, Any]:
        text = token_text(token)
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    content = [
        {
            **one(entry.token_id, entry.logprob),
            "top_logprobs": [one(token, value) for token, value in entry.top],
        }
        for entry in entries
    ]
    return {"content": content}


def chat_chunk(answer: Answer, index: int, delta: Delta | None, *, logprobs: bool) -> dict[str, Any]:
    """A piece of a chat completion; `delta` None opens the choice with its role."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    block, reason = None, None
    if delta is not None:
        message = {"content": delta.text} if delta.text or delta.finish_reason is None else {}
        reason = delta.finish_reason
        if logprobs and delta.logprobs:
            block = chat_logprobs(delta.logprobs, answer.token_text)
    choice = {"index": index, "delta": message, "logprobs": block, "finish_reason": reason}
    return {**answer.head("chat.completion.chunk"), "choices": [choice]}


def usage_chunk(answer: Answer, choices: list[Choice], num_prompt_tokens: int) -> dict[str, Any]:
    kind = "chat.completion.chunk" if answer.kind == "chat.completion" else None
    return {**answer.head(kind), "choices": [], "usage": usage(choices, num_prompt_tokens)}


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
