"""What finished stages of an interrupted build left behind, so that `--resume` need not do them again.

Records lie in the cache under a hash of the parent and of every setting that decides them: a stage is reused
only by the build it belongs to.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TypeVar

from prune2serve.paths import cache_dir
from prune2serve.progress import say
from prune2serve.records import Record
from prune2serve.staging import write_text

R = TypeVar("R", bound=Record)


class StageStore:
    """Keeps one build's records by stage name."""

    def __init__(self, key: str, *, resume: bool) -> None:
        self.directory = cache_dir() / "builds" / key
        self._resume = resume

    def load(self, stage: str, kind: type[R]) -> R | None:
        """Return the stage's record, when resuming and it is there."""
        file = self.path(stage)
        if not self._resume or not file.is_file():
            return None
        say(f"Resuming: {stage} is done")
        return kind.from_json(file.read_bytes(), origin=str(file))

    def save(self, stage: str, record: Record) -> None:
        write_text(self.path(stage), record.to_json())

    def path(self, stage: str) -> Path:
        return self.directory / f"{stage}.json"

    def clear(self) -> None:
        """Forget everything: the build is done."""
        shutil.rmtree(self.directory, ignore_errors=True)
