"""Everything that is measured of a pruned model beside its parent, and the verdict over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import psutil
import torch

from prune2serve.activations import batches
from prune2serve.evaluation import TeacherLogits, evaluate, next_token_logits
from prune2serve.progress import track
from prune2serve.records import CalibrationSet, QualityReport
from prune2serve.repetition import compare_repetition, continue_prompts
from prune2serve.task_files import Task
from prune2serve.tasks import ParentTasks
from prune2serve.verdict import judge

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ParentQuality:
    """The parent's side of the measurement: computed when first needed, then shared by every pruned model."""

    def __init__(
        self,
        parent: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        windows: CalibrationSet,
        tasks: Sequence[Task] = (),
        *,
        keep_logits: bool = False,
    ) -> None:
        """`keep_logits`: for more than one pruned model; up to a quarter of the memory that is free now."""
        self.parent = parent
        self.tokenizer = tokenizer
        self.windows = windows
        self._tasks = tasks
        self._logits = TeacherLogits(free_bytes(parent.device) // 4) if keep_logits else None

    @cached_property
    def tasks(self) -> ParentTasks:
        return ParentTasks(self.parent, self.tokenizer, self._tasks)

    @cached_property
    def continuations(self) -> list[list[int]]:
        return continue_prompts(self.parent, self.tokenizer)

    def prepare(self) -> None:
        """Compute the parent's side now."""
        _ = self.tasks, self.continuations
        if self._logits is None:
            return
        with torch.inference_mode():
            for index, (input_ids, mask) in enumerate(track(list(batches(self.windows, 1)), "Measuring the parent")):
                self._logits(index, partial(next_token_logits, self.parent, input_ids, mask))

    def measure(
        self,
        pruned: PreTrainedModel,
        as_pruned: Callable[[], AbstractContextManager[object]] = nullcontext,
        description: str = "Measuring quality",
    ) -> QualityReport:
        """Measure and judge; `pruned` may be the parent where `as_pruned` is a context that prunes it in memory."""
        # The parent's own part comes first: inside the context it may be the parent no more.
        tasks, before = self.tasks, self.continuations
        report = evaluate(
            self.parent,
            pruned,
            self.windows,
            as_pruned=as_pruned,
            teacher_logits=self._logits,
            description=description,
        )
        with as_pruned():
            after = continue_prompts(pruned, self.tokenizer)
            results = tasks.compare(pruned)
        return judge(replace(report, tasks=results), compare_repetition(self.tokenizer, before, after))


def free_bytes(device: torch.device) -> int:
    """Memory that is free where the model lies."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
