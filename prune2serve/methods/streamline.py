"""LLM-Streamline (arXiv 2403.19135): a run of layers that changes little gives way to one trained layer."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prune2serve.methods.base import Selection, windows
from prune2serve.records import PruningPlan, Replacement

if TYPE_CHECKING:
    import torch

KIND = "streamline"


def select(selection: Selection) -> PruningPlan:
    """The K + 1 layers j .. j + K with the highest mean token cosine cos(X_j, X_{j+K+1}) become one, trained.

    Raises:
        Prune2ServeError: no K + 1 neighbouring layers may be touched.
    """
    from prune2serve.replacement_training import train_replacement

    assert selection.model and selection.calibration and selection.work
    length = selection.num_remove + 1

    def cosine(run: tuple[int, ...]) -> float:
        return selection.scores.cosine[run[0]][run[0] + length]

    ranked = sorted(windows(selection.candidates, length), key=cosine, reverse=True)
    run, options = range(ranked[0][0], ranked[0][-1] + 1), selection.options
    trained = train_replacement(selection.model(), run, selection.calibration().score, options, selection.seed)
    plan = selection.plan(
        run[1:],
        KIND,
        f"layers {run[0]}-{run[-1]}, the run with the most similar ends (cosine {cosine(ranked[0]):.4f}), became one",
        cosine=cosine(ranked[0]),
        runner_up=list(ranked[1]) if len(ranked) > 1 else None,
        replacement=options.replacement,
        loss=options.replacement_loss,
        num_steps=options.replacement_steps,
        best_step=trained.best_step,
        held_out_loss={"before": trained.loss_before, "after": trained.loss},
    )
    return replace(plan, replacements=(save(trained.weights, run.start, selection.work),))


def save(weights: dict[str, torch.Tensor], layer: int, directory: Path) -> Replacement:
    """Write the trained weights, names relative to the layer."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    file, partial = directory / f"{KIND}.safetensors", directory / f"{KIND}.partial"
    save_file({name: weight.contiguous() for name, weight in weights.items()}, partial)
    partial.replace(file)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return Replacement(layer, KIND, str(file), digest)
