"""Text to token ids and back, and the model's chat template."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from prune2serve.errors import CorruptCheckpointError

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a request leaves out is taken from the model's generation_config.json, as vLLM does."""


class ChatTemplateError(ValueError):
    """The model has no chat template, or its template refuses these messages."""


class TextModel:
    """A model directory's tokenizer with what its configs say about ending and sampling. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CorruptCheckpointError(
                f"no usable tokenizer in {directory} ({line}): put the parent's tokenizer files beside config.json"
            ) from error
        self._lock = threading.Lock()
        config, generation = _read(directory / "config.json"), _read(directory / "generation_config.json")
        self.eos_ids = _eos_ids(generation, config, self._tokenizer)
        self.defaults = {key: generation[key] for key in SAMPLING_DEFAULTS if generation.get(key) is not None}
        self.context_length = int(config.get("max_position_embeddings") or 0) or None
        self.vocab_size = len(self._tokenizer)
        self.longest_token = max((len(token) for token in self._tokenizer.get_vocab()), default=1)
        """In characters: no text of n * longest_token characters has fewer than n tokens."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        with self._lock:
            ids = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return [int(i) for i in ids]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def token_text(self, token: int) -> str:
        return self.decode([token], skip_special_tokens=False)

    def render_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True, **extra: Any) -> str:
        """Apply the model's chat template.

        Raises:
            ChatTemplateError: there is none, or it raises on these messages.
        """
        import jinja2

        if not self._tokenizer.chat_template:
            raise ChatTemplateError("this model has no chat template: use /v1/completions")
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **extra
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ChatTemplateError(f"the model's chat template refuses these messages: {error}") from error
        return text


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _eos_ids(generation: dict[str, Any], config: dict[str, Any], tokenizer: Any) -> frozenset[int]:
    ids: set[int] = set()
    for named in (generation.get("eos_token_id", config.get("eos_token_id")), tokenizer.eos_token_id):
        ids.update(named if isinstance(named, list) else [] if named is None else [named])
    return frozenset(int(i) for i in ids)
