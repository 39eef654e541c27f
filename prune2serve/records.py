"""The nouns: what the stages of a build hand to each other, and what is kept on disk.

Read this file first. Every stage is a function from noun to noun:

    Checkpoint -> CalibrationSet -> LayerScores -> PruningPlan -> (pruned checkpoint) -> QualityReport -> Manifest

All but the first two are JSON that a person can read and edit: `to_json` writes it, `from_json` checks every
field and refuses what does not fit in one line. Layers are counted from 0, in the parent's numbering.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from prune2serve.errors import Prune2ServeError

if TYPE_CHECKING:
    import torch


class Record:
    """Gives a frozen dataclass an exact JSON form."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def to_json(self) -> str:
        """Return indented JSON. Raises ValueError on NaN or infinity: a record holds None instead."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, origin: str = "text") -> Self:
        """Check and read JSON written by `to_json` or by hand. `origin` names it in the error."""
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole"
            raise Prune2ServeError(f"{origin} is not a {cls.__name__}: {where}: {first['msg']}") from None


@dataclass(frozen=True)
class Checkpoint:
    """A stock Hugging Face model directory on local disk: config.json, safetensors files, tokenizer files."""

    path: Path
    """The directory."""
    source: str
    """What the user named: a directory, a hub id, a GGUF file or `sample`; opening it again finds the same model."""
    revision: str | None
    config: dict[str, Any]
    """config.json as it stands on disk."""
    fingerprint: str
    """sha256 over config.json and the headers, sizes and sampled bytes of the weights: names caches, not a proof."""


@dataclass(frozen=True)
class CalibrationSet:
    """Token windows of equal length, the last one right-padded."""

    input_ids: torch.Tensor
    """[N, T], int64."""
    attention_mask: torch.Tensor
    """[N, T], 1 for real tokens and 0 for padding."""
    source: str
    seed: int
    sha256: str

    @property
    def num_tokens(self) -> int:
        return int(self.attention_mask.sum())

    @staticmethod
    def digest(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> str:
        h = hashlib.sha256(repr(tuple(input_ids.shape)).encode())
        h.update(input_ids.contiguous().numpy().tobytes())
        h.update(attention_mask.contiguous().numpy().tobytes())
        return h.hexdigest()


@dataclass(frozen=True)
class LayerScores(Record):
    """What one pass over the calibration set says of every layer; higher = keep."""

    num_layers: int
    tokens: int
    """Real tokens seen (padding excluded)."""
    calibration_sha256: str
    metrics: dict[str, tuple[float, ...]]
    """Metric name -> one value a layer. See `prune2serve.activations` for the formulas."""
    cosine: tuple[tuple[float, ...], ...]
    """[L + 1, L + 1]: mean token cosine between the inputs of layers i and j (L: the last layer's output)."""
    angle: tuple[tuple[float, ...], ...]
    """[L + 1, L + 1]: mean arccos(cosine) / pi at the last real token of each sample."""


MergeRule = Literal["telescoped", "delta-sum", "average"]


@dataclass(frozen=True)
class Merge(Record):
    """A run of neighbouring layers made into one, which stands at the run's lowest index."""

    low: int
    high: int
    """Inclusive; layers low + 1 .. high are in the plan's `removed`."""
    rule: MergeRule


@dataclass(frozen=True)
class Replacement(Record):
    """New values for tensors of one kept layer: a trained layer in a run's place, or a folded projection."""

    layer: int
    """The kept layer, in the parent's numbering."""
    kind: str
    """What made it, such as `linear-fold` or `streamline`."""
    path: str
    """A safetensors file whose tensor names are relative to the layer (`mlp.down_proj.weight`)."""
    sha256: str


@dataclass(frozen=True)
class PruningPlan(Record):
    """Which of the parent's L decoder layers go, and what stands for them."""

    num_layers: int
    """L, the parent's."""
    removed: tuple[int, ...]
    """Sorted, distinct."""
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    """The selector's settings and what its search found (winner, runner-up)."""
    merges: tuple[Merge, ...] = ()
    replacements: tuple[Replacement, ...] = ()
    why: str = ""
    """One sentence for a person."""

    def __post_init__(self) -> None:
        bad = [layer for layer in self.removed if not 0 <= layer < self.num_layers]
        if bad:
            raise Prune2ServeError(f"layer {bad[0]} cannot be removed: the model has layers 0 to {self.num_layers - 1}")
        if len(set(self.removed)) != len(self.removed):
            twice = next(layer for layer in self.removed if self.removed.count(layer) > 1)
            raise Prune2ServeError(f"layer {twice} is listed twice in {list(self.removed)}: name each layer once")
        if len(self.removed) >= self.num_layers:
            raise Prune2ServeError(f"all {self.num_layers} layers would be removed: keep at least one")
        object.__setattr__(self, "removed", tuple(sorted(self.removed)))
        for merge in self.merges:
            if not set(range(merge.low + 1, merge.high + 1)) <= set(self.removed) or merge.low in self.removed:
                raise Prune2ServeError(
                    f"the merge of layers {merge.low} to {merge.high} must keep {merge.low} and remove the others; "
                    f"removed is {list(self.removed)}"
                )
        for replacement in self.replacements:
            if replacement.layer not in self.kept:
                raise Prune2ServeError(
                    f"layer {replacement.layer} has replaced tensors but is not kept; kept are {list(self.kept)}"
                )

    @property
    def kept(self) -> tuple[int, ...]:
        gone = set(self.removed)
        return tuple(layer for layer in range(self.num_layers) if layer not in gone)


@dataclass(frozen=True)
class Perplexity(Record):
    """exp(mean negative log-likelihood) of both models on the same windows."""

    parent: float
    pruned: float
    ratio: float
    standard_error: float
    """Of the pruned model's perplexity: perplexity * standard error of the mean NLL over windows."""
    ratio_standard_error: float
    """Of the ratio, from the per-window differences (the windows are shared, so their difficulty cancels)."""


@dataclass(frozen=True)
class TaskMetric(Record):
    """One accuracy of both models on the same items."""

    parent: float
    parent_standard_error: float
    pruned: float
    pruned_standard_error: float
    difference: float
    """pruned - parent."""
    interval: tuple[float, float]
    """95% interval of the difference, paired by item."""


@dataclass(frozen=True)
class Stability(Record):
    """How many answers the pruning left as they were, weighted by how far apart the choices are."""

    value: float
    """sum_i w_i [parent right <=> pruned right], w = softmax(sigma); see `prune2serve.tasks.stability`."""
    effective_items: float
    """1 / sum_i w_i^2: how many items carry the weight."""
    unchanged: float
    """The same sum with equal weights."""


@dataclass(frozen=True)
class TaskResult(Record):
    """A zero-shot task answered by both models."""

    name: str
    source: str
    kind: Literal["multiple-choice", "continuation"]
    num_items: int
    chance: float
    """Accuracy of guessing; 0 for a continuation."""
    metrics: dict[str, TaskMetric]
    """`acc`, and `acc_norm` of multiple choice; see `prune2serve.tasks`."""
    stability: Stability | None = None


@dataclass(frozen=True)
class QualityReport(Record):
    """The pruned model beside its parent on the same text."""

    text: str
    """Where the windows came from."""
    num_windows: int
    num_tokens: int
    """Predicted tokens."""
    perplexity: Perplexity
    kl: float
    """Mean KL(parent || pruned) of the next-token distribution, nats per token."""
    kl_standard_error: float
    top1_agreement: float
    """Fraction of positions where both models' most likely token is the same."""
    verdict: Literal["ok", "degraded", "collapsed"] | None = None
    reasons: tuple[str, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    """Anything else that was measured, such as `repetition`."""


@dataclass(frozen=True)
class Manifest(Record):
    """prune2serve.json: what is in a build directory and enough to make it again."""

    prune2serve_version: str
    created: str
    """UTC, ISO 8601."""
    model: str
    """The parent, as `prune2serve.models.open_checkpoint` takes it."""
    revision: str | None
    parent_fingerprint: str
    plan: PruningPlan
    files: dict[str, str]
    """File name -> sha256."""
    num_parameters: dict[str, int]
    """`parent` and `pruned`."""
    seed: int
    scores: LayerScores | None = None
    quality: QualityReport | None = None
    reload_proof: dict[str, Any] = field(default_factory=dict)
    """Stock transformers on the directory against layers removed in memory."""
    engines: dict[str, dict[str, str]] = field(default_factory=dict)
    """Engine -> `verdict` and `why`: which ones will serve this directory as it is."""
    calibration: dict[str, Any] = field(default_factory=dict)
    healing: dict[str, Any] = field(default_factory=dict)
    onnx: dict[str, Any] = field(default_factory=dict)
    """Precision -> parity with stock transformers."""
    gates: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> wall time."""
    peak_rss_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class RequestTrace(Record):
    """One request as the client saw it. All times come from `time.perf_counter_ns` of one process."""

    arm: Literal["baseline", "candidate"]
    round: int
    """Round of four periods; -1 for warm-up."""
    period: int
    """0 to 3 within the round."""
    prompt: int
    """Index of the prompt within the round: the same number is the same prompt in both arms."""
    scheduled_ns: int
    """When it should have been sent; equal to `start_ns` in a closed loop."""
    start_ns: int
    chunk_ns: tuple[int, ...]
    """Arrival of every chunk that carried tokens."""
    prompt_tokens: int | None
    output_tokens: int
    """As the server's usage says; the number of chunks where it says nothing."""
    error: str | None = None


@dataclass(frozen=True)
class ComparisonRow(Record):
    """One metric of both arms."""

    metric: str
    unit: str
    baseline: float | None
    candidate: float | None
    ratio: float | None
    """candidate / baseline."""
    interval: tuple[float, float] | None = None
    """95% interval of the ratio, where the design gives one."""
    difference: float | None = None
    """candidate - baseline, in `unit`."""
    difference_interval: tuple[float, float] | None = None
    ideal_ratio: float | None = None
    """What bytes or operations alone would give, where that is known for the metric."""
    smallest_effect: float | None = None
    """Relative change that this run would have found with 80% probability."""
    verdict: Literal["better", "worse", "not distinguishable"] | None = None
    """None where there is no interval."""


@dataclass(frozen=True)
class Check(Record):
    """One named fairness check."""

    name: str
    status: Literal["ok", "warning", "failed", "skipped"]
    detail: str
    """One sentence with the values seen."""


@dataclass(frozen=True)
class Comparison(Record):
    """Latency and throughput of a candidate against its baseline."""

    baseline: str
    candidate: str
    rows: tuple[ComparisonRow, ...]
    ideal_ratio: float | None
    """Decode time the pruned model needs at best, over its parent's: bytes read per token."""
    verdict: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    attribution: dict[str, Any] = field(default_factory=dict)
    """Why the measured ratio differs from the ideal one; see `prune2serve.serve.ideal`."""
    noise_floor: tuple[ComparisonRow, ...] = ()
    """The same design with the baseline on both arms."""
    environment: dict[str, Any] = field(default_factory=dict)
    requests: tuple[RequestTrace, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Everything but the requests, which a file keeps."""
        return {key: value for key, value in self.to_dict().items() if key != "requests"}
