"""Several methods on one model: the model is loaded once, the layers scored once, the parent measured once.

Each row is planned like a build and measured in memory, so that nothing but its record is written; a record is
saved as soon as its row is done, and a later run with the same settings takes it up.

A method is a selector and what follows it, such as `simdiff`, `simdiff+refine` or `simdiff+refine+linear-fold`.
Without a suffix nothing follows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune2serve import versions
from prune2serve.clock import Clock
from prune2serve.errors import Prune2ServeError, near_match
from prune2serve.methods import check_method
from prune2serve.methods.base import num_layers_to_remove
from prune2serve.models import open_checkpoint
from prune2serve.options import BuildOptions
from prune2serve.peak_memory import PeakMemory
from prune2serve.pipeline import check_checkpoint
from prune2serve.planning import make_plan, score
from prune2serve.progress import say, task
from prune2serve.records import LayerScores, PruningPlan, QualityReport, Record
from prune2serve.stage_store import StageStore
from prune2serve.staging import write_text
from prune2serve.workbench import Workbench

if TYPE_CHECKING:
    from prune2serve.quality import ParentQuality
    from prune2serve.records import Checkpoint

DEFAULT_REFINE = 100
"""Layer sets that `+refine` may try."""

STAGES: dict[str, Callable[[BuildOptions], BuildOptions]] = {
    "refine": lambda options: replace(options, refine=options.refine or DEFAULT_REFINE),
    "linear-fold": lambda options: replace(options, compensate="linear-fold"),
    "auto": lambda options: replace(options, compensate="auto"),
}
"""What may follow a selector: suffix -> the build's options with that stage on."""


@dataclass(frozen=True)
class BakeoffRow(Record):
    """One method at one ratio."""

    method: str
    ratio: float
    removed: tuple[int, ...]
    num_layers: int
    """Decoder layers left."""
    num_parameters: int
    quality: QualityReport | None
    seconds: dict[str, float]
    """Stage -> wall time. A layer set that an earlier row had judged on the search split is not judged again."""
    peak_memory_bytes: int
    """Of the process during the row, the parent and its kept logits included; on a GPU, of the device."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the selector and the stages after it found."""
    error: str | None = None
    """Why this method gives no model here."""
    key: str = ""
    """Hash of every setting behind the row."""


@dataclass(frozen=True)
class Bakeoff(Record):
    """The whole table."""

    model: str
    num_layers: int
    num_parameters: int
    """The parent's."""
    text: str
    rows: tuple[BakeoffRow, ...]
    versions: dict[str, str] = field(default_factory=dict)


def bakeoff(options: BuildOptions, methods: Sequence[str], ratios: Sequence[float], output: Path) -> Bakeoff:
    """Measure every method at every ratio; rows that `output` already holds are not measured again.

    Args:
        options: what all rows share; `method`, `ratio` and `compensate` are each row's own, `refine` is the budget of
            `+refine`.

    Raises:
        Prune2ServeError: an unknown method or stage, a ratio outside (0, 1), or `output` holds rows made with other
            settings (`options.force` replaces them).
    """
    parent = open_checkpoint(options.model, revision=options.revision)
    num_layers = check_checkpoint(parent).num_layers
    wanted = row_options(options, methods, ratios, num_layers)
    bench = Workbench(parent, options)
    bench.check_inputs()
    files = {name: output / "rows" / f"{name[0]}-{name[1]:g}.json" for name in wanted}
    keys = {name: row_key(parent, chosen) for name, chosen in wanted.items()}
    rows = {name: load_row(files[name], keys[name], force=options.force) for name in wanted}
    oven = Oven(bench, num_layers)
    with task("Bake-off", len(wanted)) as bar:
        for name, chosen in wanted.items():
            bar.describe(f"Bake-off: {name[0]} at {name[1]:g}")
            if rows[name] is None:
                rows[name] = row = replace(oven.bake(name[0], name[1], chosen), key=keys[name])
                if row.error is None:
                    write_text(files[name], row.to_json())
            bar.advance()
    return Bakeoff(
        model=parent.source,
        num_layers=num_layers,
        num_parameters=parent_parameters(parent),
        text=str(options.text or options.calibration),
        rows=tuple(row for row in rows.values() if row is not None),
        versions=versions.installed(),
    )


def row_options(
    options: BuildOptions, methods: Sequence[str], ratios: Sequence[float], num_layers: int
) -> dict[tuple[str, float], BuildOptions]:
    """(method, ratio) -> that row's build, in the order of the ratios and then of the methods."""
    found = {}
    for ratio in ratios:
        num_layers_to_remove(ratio, num_layers)
        for method in methods:
            selector, *stages = method.split("+")
            check_method(selector)
            chosen = replace(options, method=selector, ratio=ratio, refine=0, compensate="none")
            for stage in stages:
                if stage not in STAGES:
                    raise Prune2ServeError(
                        f"no stage {stage!r} in {method!r}{near_match(stage, STAGES)}: after a selector may follow "
                        f"{', '.join('+' + name for name in STAGES)}"
                    )
                budget = options.refine if stage == "refine" else chosen.refine
                chosen = STAGES[stage](replace(chosen, refine=budget))
            found[method, ratio] = chosen
    return found


def row_key(parent: Checkpoint, options: BuildOptions) -> str:
    """Hash of the plan's settings and of the very text and items that quality is reported on."""
    named = [options.text, *options.tasks]
    if (calibration := Path(options.calibration)).is_file():
        named.append(calibration)
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in named if file is not None and file.is_file()]
    settings = [options.selection_key(parent.fingerprint), options.text_windows, options.tasks_limit, contents]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]


def load_row(file: Path, key: str, *, force: bool) -> BakeoffRow | None:
    """Return a row that is done.

    Raises:
        Prune2ServeError: it was made with other settings, and `force` does not say to replace it.
    """
    if not file.is_file():
        return None
    row = BakeoffRow.from_json(file.read_bytes(), origin=str(file))
    if row.key == key:
        return row
    if force:
        return None
    raise Prune2ServeError(
        f"{file} was made with other settings (model, calibration, text, tasks or seed): choose another --output, or "
        "measure it again with --force"
    )


def parent_parameters(parent: Checkpoint) -> int:
    """Values in the parent's weight files."""
    from prune2serve.tensors import read_index

    return sum(math.prod(entry.shape) for entry in read_index(parent.path).entries.values())


class SharedScores(StageStore):
    """A build's store that finds the layers already scored, and keeps its plan for an interrupted row."""

    def __init__(self, key: str, scores: LayerScores) -> None:
        super().__init__(key, resume=True)
        self._scores = scores

    def load(self, stage: str, kind: type[Any]) -> Any:
        return self._scores if stage == "scores" else super().load(stage, kind)


class Oven:
    """What the rows share, made when the first of them needs it."""

    def __init__(self, bench: Workbench, num_layers: int) -> None:
        self.bench = bench
        self.num_layers = num_layers
        self._scores: LayerScores | None = None
        self._parent: ParentQuality | None = None

    def bake(self, method: str, ratio: float, options: BuildOptions) -> BakeoffRow:
        """Plan and measure one row. A method that cannot do it here gives a row that says why."""
        scores, parent = self.scores(), self.parent()
        clock, memory = Clock(), PeakMemory(self.bench.device)
        self.bench.options = options
        store = SharedScores(f"bakeoff-{row_key(self.bench.parent, options)}", scores)
        try:
            _, plan = make_plan(self.bench, self.num_layers, store, clock)
            num_parameters, quality = self.measure(plan, parent, clock)
        except Prune2ServeError as error:
            say(f"{method} at {ratio:g}: {error}")
            return BakeoffRow(method, ratio, (), self.num_layers, 0, None, clock.seconds, 0, error=str(error))
        store.clear()
        return BakeoffRow(
            method=method,
            ratio=ratio,
            removed=plan.removed,
            num_layers=len(plan.kept),
            num_parameters=num_parameters,
            quality=quality,
            seconds=clock.seconds,
            peak_memory_bytes=memory.peak_bytes(),
            settings={"why": plan.why, **plan.settings},
        )

    def measure(self, plan: PruningPlan, parent: ParentQuality, clock: Clock) -> tuple[int, QualityReport]:
        """Quality of the plan carried out in memory, and its parameters."""
        from prune2serve.layers import planned_layers, spliced

        model = self.bench.model
        modules = planned_layers(model, plan)
        with spliced(model, modules, plan.kept):
            num_parameters = sum(parameter.numel() for parameter in model.parameters())
        with clock("quality"):
            quality = parent.measure(model, lambda: spliced(model, modules, plan.kept), f"{plan.method}, quality")
        return num_parameters, quality

    def scores(self) -> LayerScores:
        if self._scores is None:
            self.bench.prepare_calibration()
            self._scores = score(self.bench)
        return self._scores

    def parent(self) -> ParentQuality:
        """The parent's own figures, not counted as any row's time."""
        from prune2serve.quality import ParentQuality

        if self._parent is None:
            bench = self.bench
            self._parent = ParentQuality(
                bench.model, bench.tokenizer, bench.report_windows, bench.tasks, keep_logits=True
            )
            self._parent.prepare()
        return self._parent
