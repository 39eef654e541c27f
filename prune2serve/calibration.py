"""A text file, a hub data set, or the parent's own samples -> three calibration sets that share no document.

`score` feeds the layer statistics, `search` is what selectors and refinement may look at, and `report` is
what quality is reported on. Documents, not windows, are dealt out, so no text is searched on and reported on.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from prune2serve.errors import MissingExtraError, Prune2ServeError
from prune2serve.records import CalibrationSet, Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SELF = "self"
WIKITEXT_TITLE = re.compile(r"^ = [^=].* = $", re.MULTILINE)

Tokens = list[int]


@dataclass(frozen=True)
class Sizes:
    """Windows a split, and tokens a window."""

    score: int = 16
    search: int = 8
    report: int = 8
    window: int = 512

    def __post_init__(self) -> None:
        if self.window < 2 or min(self.score, self.search, self.report) < 1:
            raise Prune2ServeError(
                f"{self.score}, {self.search} and {self.report} windows of {self.window} tokens cannot be measured on: "
                "give at least one window to each split and at least two tokens to a window"
            )

    @property
    def num_tokens(self) -> int:
        return (self.score + self.search + self.report) * self.window


@dataclass(frozen=True)
class Calibration:
    """The three splits."""

    score: CalibrationSet
    search: CalibrationSet
    report: CalibrationSet


def load_calibration(
    spec: str,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    sizes: Sizes,
    seed: int,
    load_parent: Callable[[], PreTrainedModel],
) -> Calibration:
    """Read or generate documents and deal them out.

    Args:
        spec: a path (text or JSONL), `hub:NAME[:config][:split]`, or `self`.
        load_parent: gives the parent model; called only when `self` samples are not in the cache.

    Raises:
        Prune2ServeError: nothing readable there, or fewer tokens than three windows hold.
    """
    if spec == SELF:
        from prune2serve.self_samples import self_samples

        documents = self_samples(checkpoint, tokenizer, sizes.num_tokens, sizes.window, seed, load_parent)
    else:
        texts = shuffled(_texts(spec), seed)
        documents = _tokenize_until(texts, tokenizer, sizes.num_tokens)
    return deal(documents, sizes, spec, seed, separator=tokenizer.eos_token_id)


def shuffled(texts: Sequence[str], seed: int) -> list[str]:
    """Return the texts in an order that depends on the seed alone."""
    order = list(texts)
    random.Random(seed).shuffle(order)
    return order


def read_documents(path: Path) -> list[str]:
    """Split a file into documents.

    JSONL: the `text` field of every line. Text: at WikiText titles (` = Title = `) when it has them, else at
    runs of two or more blank lines, else at blank lines, else every line is a document.

    Raises:
        Prune2ServeError: the file is missing, not UTF-8, empty, or a JSONL line has no text.
    """
    if not path.is_file():
        raise Prune2ServeError(
            f"no calibration text at {path}: give a text or JSONL file, hub:NAME[:config][:split], or {SELF!r}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Prune2ServeError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from None
    documents = list(_jsonl_texts(path, text)) if path.suffix in {".jsonl", ".ndjson"} else _split_text(text)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise Prune2ServeError(f"{path} holds no text: give a file with at least a few thousand words")
    return documents


def _split_text(text: str) -> list[str]:
    if WIKITEXT_TITLE.search(text):
        starts = [0, *(match.start() for match in WIKITEXT_TITLE.finditer(text)), len(text)]
        return [text[a:b] for a, b in pairwise(starts)]
    for separator in (r"\n(?:[ \t]*\n){2,}", r"\n[ \t]*\n", r"\n"):
        parts = re.split(separator, text)
        if len(parts) > 2:
            return parts
    return [text]


def _jsonl_texts(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Prune2ServeError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(item, dict) or not isinstance(item.get("text"), str):
            raise Prune2ServeError(f"{path} line {number} has no string field 'text': every line needs one")
        yield item["text"]


def _texts(spec: str) -> list[str]:
    return _hub_texts(spec) if spec.startswith("hub:") else read_documents(Path(spec).expanduser())


def _hub_texts(spec: str, limit: int = 20_000) -> list[str]:
    """The `text` column of a hub data set: `hub:NAME[:config][:split]`; the first `limit` rows, streamed."""
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtraError("a hub data set", "datasets", "hub")
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name, config, split = ([*spec.removeprefix("hub:").split(":"), "", ""])[:3]
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        texts = [row["text"] for row in rows.take(limit)]
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise Prune2ServeError(f"cannot read {spec}: {line}: expected hub:NAME[:config][:split]") from None
    except KeyError:
        raise Prune2ServeError(f"{spec} has no column 'text': choose a data set that has one") from None
    return [text for text in texts if isinstance(text, str) and text.strip()]


def _tokenize_until(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> list[Tokens]:
    """Tokenise documents until there is half as much again as is needed: dealing out needs some slack."""
    documents: list[Tokens] = []
    total = 0
    for text in texts:
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        documents.append(tokens)
        total += len(tokens) + 1
        if total >= 1.5 * num_tokens and len(documents) >= 12:
            break
    return documents


def deal(documents: Sequence[Tokens], sizes: Sizes, source: str, seed: int, separator: int | None) -> Calibration:
    """Deal documents to report, search and score, in this order, until each has its tokens.

    With too little text every split shrinks by the same factor, so that none starves.

    Raises:
        Prune2ServeError: fewer than three documents, or too few tokens for one window a split.
    """
    available = sum(len(document) + 1 for document in documents)
    if len(documents) < 3 or available < 3 * min(sizes.window, 64):
        raise Prune2ServeError(
            f"{source} holds {len(documents)} documents with {available} tokens: calibration needs at least 3 "
            f"documents and {3 * min(sizes.window, 64)} tokens, since its splits share no document"
        )
    shrink = min(1.0, available / sizes.num_tokens)
    remaining = list(documents)
    splits = {}
    for name, later in (("report", 2), ("search", 1), ("score", 0)):
        wanted = max(int(getattr(sizes, name) * sizes.window * shrink), 1)
        taken: list[Tokens] = []
        while remaining and len(remaining) > later and sum(len(d) + 1 for d in taken) < wanted:
            room = wanted - sum(len(d) + 1 for d in taken)
            taken.append(remaining.pop(0)[:room])  # what one document has beyond that is no other split's to use
        windows = min(getattr(sizes, name), -(-wanted // sizes.window))
        splits[name] = pack(taken, windows, sizes.window, source, seed, separator)
    return Calibration(**splits)


def pack(
    documents: Sequence[Tokens], num_windows: int, window: int, source: str, seed: int, separator: int | None
) -> CalibrationSet:
    """Join documents with the separator token and cut them into [num_windows, window], the last right-padded."""
    import torch

    stream: Tokens = []
    for document in documents:
        stream.extend(document)
        if separator is not None:
            stream.append(separator)
    stream = stream[: num_windows * window]
    num_windows = -(-len(stream) // window)
    input_ids = torch.full((num_windows, window), separator or 0, dtype=torch.int64)
    attention_mask = torch.zeros((num_windows, window), dtype=torch.int64)
    flat_ids, flat_mask = input_ids.view(-1), attention_mask.view(-1)
    flat_ids[: len(stream)] = torch.tensor(stream)
    flat_mask[: len(stream)] = 1
    digest = CalibrationSet.digest(input_ids, attention_mask)
    return CalibrationSet(input_ids, attention_mask, source, seed, digest)


def text_windows(
    path: Path, tokenizer: PreTrainedTokenizerBase, num_windows: int | None, window: int = 512
) -> CalibrationSet:
    """The first windows of a whole file, contiguous and unshuffled: the usual way to report perplexity on a text.

    Raises:
        Prune2ServeError: the file is missing, not UTF-8, or shorter than two tokens.
    """
    text = "\n\n".join(read_documents(path)) if path.suffix in {".jsonl", ".ndjson"} else _whole(path)
    if num_windows is not None:
        text = text[: num_windows * window * 16]  # no tokenizer in use averages 16 characters a token
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < 2:
        raise Prune2ServeError(f"{path} holds {len(tokens)} tokens: perplexity needs at least 2")
    windows = num_windows or -(-len(tokens) // window)
    return pack([tokens], windows, window, str(path), 0, None)


def _whole(path: Path) -> str:
    read_documents(path)
    return path.read_text(encoding="utf-8")
