"""Zero-shot task files: one JSON object a line, either multiple choice or a continuation to be written greedily.

    {"id": "...", "query": "...", "choices": [" a", " b"], "gold": 1}
    {"id": "...", "context": "...", "continuation": " word"}

A choice and a continuation are scored as they stand, with the space that separates them from the text before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prune2serve.errors import Prune2ServeError

Kind = Literal["multiple-choice", "continuation"]


@dataclass(frozen=True)
class Item:
    """One question: a text and the continuations to be scored after it."""

    context: str
    choices: tuple[str, ...]
    """Of a continuation task: the one continuation."""
    gold: int
    line: int
    """Where it stands in the file, from 1."""


@dataclass(frozen=True)
class Task:
    """The items of one file, all of one kind."""

    name: str
    """The file's name without its ending."""
    kind: Kind
    items: tuple[Item, ...]
    source: str


def read_tasks(paths: Iterable[Path], limit: int | None = None) -> tuple[Task, ...]:
    """Read every file, at most the first `limit` items of each.

    Raises:
        Prune2ServeError: as `read_task`, a limit below 2, or two files of one name.
    """
    if limit is not None and limit < 2:
        raise Prune2ServeError(f"{limit} items give no standard error: keep at least 2 of each task")
    tasks = tuple(read_task(path, limit) for path in paths)
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise Prune2ServeError(f"two task files are called {twice!r}: rename one, results go by that name")
    return tasks


def read_task(path: Path, limit: int | None = None) -> Task:
    """Read one file; blank lines are skipped.

    Raises:
        Prune2ServeError: the file is missing, not UTF-8, mixed, has fewer than two items, or a line does not fit;
            the message names the line.
    """
    if not path.is_file():
        raise Prune2ServeError(f"no task file at {path}: give a JSONL file with one item a line")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise Prune2ServeError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from None
    kind: Kind | None = None
    items: list[Item] = []
    for number, line in enumerate(lines, start=1):
        if limit is not None and len(items) == limit:
            break
        if not line.strip():
            continue
        where = f"{path} line {number}"
        found, item = _item(_object(line, where), where, number)
        if kind is not None and found != kind:
            raise Prune2ServeError(f"{where} is a {found} item in a {kind} file: keep one kind a file")
        kind = found
        items.append(item)
    if kind is None or len(items) < 2:
        raise Prune2ServeError(f"{path} holds {len(items)} items: a task needs at least 2")
    return Task(path.stem, kind, tuple(items), str(path))


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Prune2ServeError(f"{where} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Prune2ServeError(f"{where} is {type(found).__name__}, expected an object with `query` and `choices`")
    return found


def _item(fields: dict[str, Any], where: str, line: int) -> tuple[Kind, Item]:
    if "choices" in fields:
        return "multiple-choice", _multiple_choice(fields, where, line)
    if "continuation" in fields:
        context, continuation = (_text(fields, name, where) for name in ("context", "continuation"))
        if not continuation:
            raise Prune2ServeError(f"{where}: `continuation` is empty, expected the text to be written")
        return "continuation", Item(context, (continuation,), 0, line)
    raise Prune2ServeError(
        f"{where} has the fields {', '.join(map(repr, fields)) or 'none'}: expected `query`, `choices` and `gold`, or "
        "`context` and `continuation`"
    )


def _multiple_choice(fields: dict[str, Any], where: str, line: int) -> Item:
    query, choices, gold = _text(fields, "query", where), fields["choices"], fields.get("gold")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise Prune2ServeError(f"{where}: `choices` must be a list of at least 2 texts that are not empty")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise Prune2ServeError(f"{where}: `gold` is {gold!r}, expected the right choice, 0 to {len(choices) - 1}")
    return Item(query, tuple(choices), gold, line)


def _text(fields: dict[str, Any], name: str, where: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise Prune2ServeError(f"{where}: `{name}` is {value!r}, expected a text")
    return value
