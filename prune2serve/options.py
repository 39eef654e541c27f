"""What a build is asked to do."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from prune2serve import __version__
from prune2serve.calibration import SELF, Sizes
from prune2serve.errors import Prune2ServeError
from prune2serve.methods.base import SelectorOptions
from prune2serve.models import SAMPLE
from prune2serve.paths import DEFAULT_OUTPUT

FORMATS = ("safetensors", "onnx")
COMPENSATIONS = ("auto", "linear-fold", "none")


@dataclass(frozen=True)
class BuildOptions:
    """Every choice of `prune2serve build`; the command line's defaults are these."""

    model: str = SAMPLE
    revision: str | None = None
    output: Path = DEFAULT_OUTPUT
    ratio: float | None = None
    num_layers: int | None = None
    """Layers the pruned model shall have."""
    remove: tuple[int, ...] | None = None
    method: str = "simdiff"
    selector: SelectorOptions = field(default_factory=SelectorOptions)
    protect_first: int = 1
    protect_last: int = 1
    calibration: str = SELF
    sizes: Sizes = field(default_factory=Sizes)
    refine: int = 0
    """Layer sets that the local search after the selector may try."""
    refine_seconds: float = float("inf")
    compensate: str = "auto"
    """auto, linear-fold or none."""
    text: Path | None = None
    """Report quality on this file instead of the calibration's report split."""
    text_windows: int | None = None
    tasks: tuple[Path, ...] = ()
    """Zero-shot task files that quality is reported on too."""
    tasks_limit: int | None = None
    """Only the first items of each."""
    formats: tuple[str, ...] = ("safetensors",)
    precision: str | None = None
    """Of the ONNX export; None: fp32 on a CPU, fp16 on a GPU."""
    max_shard_size: int = 5_000_000_000
    max_perplexity_ratio: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    resume: bool = False
    force: bool = False
    surgery_only: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("ratio", "num_layers", "remove") if getattr(self, name) is not None]
        if len(given) > 1:
            flags = " and ".join("--" + name.replace("_", "-") for name in given)
            raise Prune2ServeError(f"{flags} both say how many layers go: give one of them")
        if self.surgery_only and self.remove is None:
            raise Prune2ServeError(
                "--surgery-only scores nothing: name the layers with --remove, such as --remove 3,4,5"
            )
        if self.compensate not in COMPENSATIONS:
            raise Prune2ServeError(f"no compensation {self.compensate!r}: choose among {', '.join(COMPENSATIONS)}")
        if self.refine < 0 or not self.refine_seconds > 0:
            raise Prune2ServeError(
                "--refine counts layer sets and --refine-seconds is a time limit: give positive numbers"
            )
        if self.surgery_only and (self.refine or self.max_perplexity_ratio is not None):
            raise Prune2ServeError(
                "--surgery-only measures nothing: leave out --refine and --max-perplexity-ratio, or --surgery-only"
            )
        if self.max_perplexity_ratio is not None and not 0 < self.max_perplexity_ratio < float("inf"):
            raise Prune2ServeError(
                f"--max-perplexity-ratio {self.max_perplexity_ratio} is no limit: give one such as 1.5"
            )
        if self.max_shard_size < 1:
            raise Prune2ServeError(f"--max-shard-size is {self.max_shard_size} bytes: give at least 1, such as 5GB")
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown:
            raise Prune2ServeError(f"no format {unknown[0]!r}: choose among {', '.join(FORMATS)}")

    def selection_key(self, parent_fingerprint: str) -> str:
        """Hash of everything that decides the scores and the plan; a resumed build must match it."""
        outside = {"output", "text", "text_windows", "formats", "precision", "max_shard_size"} | {
            "max_perplexity_ratio", "resume", "force", "surgery_only", "revision", "model", "tasks", "tasks_limit",
        }  # fmt: skip
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in outside}
        chosen["sizes"] = asdict(self.sizes)
        file = Path(self.calibration).expanduser()
        content = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
        text = json.dumps([__version__, parent_fingerprint, content, chosen], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:24]
