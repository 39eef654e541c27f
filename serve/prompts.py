"""Where prompts come from: the bundled list, a JSONL or ShareGPT file, lines of a text file, or random
tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prune2serve.errors import Prune2ServeError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BUNDLED = Path(__file__).parent / "templates" / "prompts.jsonl"
FIELDS = ("prompt", "text", "instruction", "question", "query", "content")
"""Names under which JSONL files keep a prompt, in order of preference."""


def bundled_prompts() -> tuple[str, ...]:
    """Return the prompts that come with the package: short user requests of everyday kinds."""
    return load_prompts(BUNDLED)


def load_prompts(path: Path) -> tuple[str, ...]:
    """Read prompts from a .jsonl or .json file (ShareGPT conversations, `turns`, or a text field).

    Raises:
        Prune2ServeError: the file is missing, is not JSON, or a line holds no prompt.
    """
    if not path.is_file():
        raise Prune2ServeError(f"no prompt file at {path}: name a .jsonl or .json file")
    text = path.read_text(encoding="utf-8")
    prompts = [_prompt_of(item, f"{path}:{number}") for number, item in _items(text, path)]
    if not prompts:
        raise Prune2ServeError(f"{path} holds no prompts")
    return tuple(prompts)


def _items(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    try:
        if text.lstrip().startswith("["):
            yield from enumerate(json.loads(text), 1)
            return
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield number, json.loads(line)
    except json.JSONDecodeError as error:
        raise Prune2ServeError(f"{path} is not JSON or JSONL: {error}") from None


def _prompt_of(item: Any, where: str) -> str:
    if isinstance(item, str) and item.strip():
        return item
    if isinstance(item, dict):
        turns = item.get("conversations") or item.get("conversation") or item.get("messages")
        if turns:
            first = next((turn for turn in turns if turn.get("from", turn.get("role")) in ("human", "user")), turns[0])
            return str(first.get("value") or first.get("content") or "")
        if item.get("turns"):
            return str(item["turns"][0])
        for name in FIELDS:
            if isinstance(item.get(name), str) and item[name].strip():
                return str(item[name])
    raise Prune2ServeError(
        f"{where} holds no prompt; expected one of {', '.join(FIELDS)}, turns, conversations or messages"
    )


def sonnet_prompts(path: Path, count: int, num_lines: int, seed: int) -> tuple[str, ...]:
    """Make prompts of `num_lines` lines drawn from a text file, as vLLM's sonnet data set does."""
    if not path.is_file():
        raise Prune2ServeError(f"no text file at {path}")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise Prune2ServeError(f"{path} holds no text")
    generator = np.random.default_rng(seed)
    return tuple(
        "Pick as many lines as you can from these poem lines:\n"
        + "\n".join(lines[int(i)] for i in generator.integers(len(lines), size=num_lines))
        for _ in range(count)
    )


def random_prompts(tokenizer: Tokenizer, count: int, num_tokens: int, seed: int) -> tuple[str, ...]:
    """Make prompts of random tokens. Decoding and encoding again may change the count; a `Fitter` restores
    it."""
    generator = np.random.default_rng(seed)
    special = set(tokenizer.get_added_tokens_decoder())
    usable = np.array([i for i in range(tokenizer.get_vocab_size()) if i not in special])
    return tuple(tokenizer.decode([int(i) for i in generator.choice(usable, size=num_tokens)]) for _ in range(count))


def choose_prompts(
    *,
    file: Path | None,
    sonnet: Path | None,
    random: bool,
    fitter: Fitter | None,
    num_tokens: int,
    seed: int,
    count: int = 256,
) -> tuple[str, tuple[str, ...]]:
    """Return (what to call the source, the prompts): from a file, a text's lines, random tokens, or the
    bundled.

    Raises:
        Prune2ServeError: more than one source was named, or random tokens without a tokenizer.
    """
    if sum((file is not None, sonnet is not None, random)) > 1:
        raise Prune2ServeError("--prompts, --sonnet and --random-prompts each name a source: choose one")
    if file is not None:
        return str(file), load_prompts(file)
    if sonnet is not None:
        # A line of verse is about ten tokens; the fitter makes the length exact.
        return str(sonnet), sonnet_prompts(sonnet, count, max(1, num_tokens // 10), seed)
    if random:
        if fitter is None:
            raise Prune2ServeError("--random-prompts needs a tokenizer: pass --tokenizer DIR (a model directory)")
        return "random tokens", random_prompts(fitter.tokenizer, count, num_tokens, seed)
    return "bundled prompts", bundled_prompts()


class Fitter:
    """Cuts a prompt, or repeats it, to a number of tokens."""

    def __init__(self, directory: Path) -> None:
        """Raises Prune2ServeError if `directory` has no tokenizer.json."""
        from tokenizers import Tokenizer

        path = directory / "tokenizer.json"
        if not path.is_file():
            raise Prune2ServeError(f"no tokenizer.json in {directory}: pass --tokenizer with a model directory")
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def __call__(self, prompt: str, num_tokens: int) -> str:
        """Return a text whose tokens, special ones included, number `num_tokens`, or within a few of it.

        A cut may fall inside a word, whose parts then encode otherwise: the cut is moved until the count is
        right.
        """
        text = prompt
        while len(self.tokenizer.encode(text).ids) < num_tokens:
            text = f"{text}\n{text}"
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        keep = num_tokens - self.tokenizer.num_special_tokens_to_add(False)
        best = text
        for extra in (0, 1, -1, 2, -2, 3, -3):
            best = self.tokenizer.decode(ids[: keep + extra], skip_special_tokens=False)
            if len(self.tokenizer.encode(best).ids) == num_tokens:
                break
        return best
