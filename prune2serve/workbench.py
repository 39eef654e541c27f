"""The parent and what is derived from it, each loaded or computed when a stage first asks, and then kept."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from prune2serve.calibration import Calibration, load_calibration, text_windows
from prune2serve.devices import resolve_device, resolve_dtype
from prune2serve.models import load_model, load_tokenizer
from prune2serve.options import BuildOptions
from prune2serve.records import CalibrationSet, Checkpoint, QualityReport
from prune2serve.task_files import Task, read_tasks

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prune2serve.layer_sets import LayerSetSearch


class Workbench:
    """Holds one parent for the stages of one build."""

    def __init__(self, parent: Checkpoint, options: BuildOptions) -> None:
        self.parent = parent
        self.options = options

    @cached_property
    def device(self) -> str:
        return resolve_device(self.options.device)

    @cached_property
    def dtype(self) -> torch.dtype:
        return resolve_dtype(self.options.dtype, self.device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.parent, trust_remote_code=self.options.trust_remote_code)

    @cached_property
    def model(self) -> PreTrainedModel:
        return self.load(self.parent)

    def load(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """Load any checkpoint the way the parent is loaded."""
        return load_model(
            checkpoint, dtype=self.dtype, device=self.device, trust_remote_code=self.options.trust_remote_code
        )

    @cached_property
    def calibration(self) -> Calibration:
        options = self.options
        return load_calibration(
            options.calibration, self.parent, self.tokenizer, options.sizes, options.seed, lambda: self.model
        )

    def check_inputs(self) -> None:
        """Read what the user named and check what is made last, before any long work."""
        _ = self.tasks
        if self.options.text is not None:
            _ = self.report_windows
        if "onnx" in self.options.formats:
            from prune2serve.export.onnx_graph import check_packages, check_precision

            check_precision(*self.onnx_target)
            check_packages()

    @property
    def onnx_target(self) -> tuple[str, str]:
        """Precision and device of the ONNX export; the device's first precision unless one was named."""
        from prune2serve.export.onnx_graph import PRECISIONS

        device = "cuda" if self.device.startswith("cuda") else "cpu"
        return self.options.precision or PRECISIONS[device][0], device

    def prepare_calibration(self) -> None:
        """Read or generate the calibration text now, so that its time is not counted as another stage's."""
        _ = self.calibration

    @cached_property
    def report_windows(self) -> CalibrationSet:
        """What quality is reported on: `--text` where it is given, else the calibration's report split."""
        options = self.options
        if options.text is None:
            return self.calibration.report
        return text_windows(options.text, self.tokenizer, options.text_windows, options.sizes.window)

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        return read_tasks(self.options.tasks, self.options.tasks_limit)

    def measure(self, pruned: PreTrainedModel) -> QualityReport:
        """Quality of a pruned model beside this parent, with a verdict."""
        from prune2serve.quality import ParentQuality

        return ParentQuality(self.model, self.tokenizer, self.report_windows, self.tasks).measure(pruned)

    @cached_property
    def search(self) -> LayerSetSearch:
        """Layer sets judged on the search split."""
        from prune2serve.layer_sets import LayerSetSearch

        return LayerSetSearch(self.model, self.calibration.search)
