"""Linear fold: the MLP before a cut takes over, in closed form, what the removed layers added.

After ReplaceMe, arXiv 2505.02819.

For a run of removed layers let M be the MLP output of the layer before the cut, h_in that layer's output and h_out
the parent's output after the run, over calibration tokens [tokens, hidden]. With B solving the ridge regression

    B = (M'M + a I)^-1 M' (h_out - h_in),    a = ridge * mean diagonal of M'M

the layer's down projection becomes (I + B)' W_down, so that its output is h_in + B'M. No parameter is added and the
result loads anywhere. This is the paper's T = I + B, with the ridge pulling towards the identity instead of 0. All
tokens stay in the regression: leaving out the few with massive activations mangles exactly those (perplexity 1e6).

Runs are folded from the bottom up, each fitted on the activations of the model folded so far.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from prune2serve.errors import UnsupportedArchitectureError
from prune2serve.progress import track
from prune2serve.records import CalibrationSet, PruningPlan, Replacement
from prune2serve.segments import SegmentRunner, States

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DOWN_PROJECTIONS = (
    "mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2", "mlp.fc_out", "mlp.w2", "mlp.proj",
    "feed_forward.w2", "feed_forward.down_proj", "ffn.down_proj", "fc2",
)  # fmt: skip
"""How model families name the last projection of a layer's MLP."""

KIND = "linear-fold"


RIDGE = 1e-4
"""Of the mean diagonal of M'M. On SmolLM2 (perplexity 98.7) weighting tokens by 1 / norm gave 98.4, or 97.1 with a
ridge of 1e-2, and by 1 / norm^2 111: not worth a setting."""


def removed_runs(plan: PruningPlan) -> list[tuple[int, int]]:
    """(layer before the cut, last removed layer) of each run that has a plain kept layer before it."""
    busy = {merge.low for merge in plan.merges} | {replacement.layer for replacement in plan.replacements}
    runs = []
    for layer in plan.kept:
        last = layer
        while last + 1 in plan.removed:
            last += 1
        if last > layer and layer not in busy:
            runs.append((layer, last))
    return runs


def fold_plan(
    model: PreTrainedModel, plan: PruningPlan, windows: CalibrationSet, directory: Path, ridge: float = RIDGE
) -> PruningPlan:
    """Return the plan with a folded projection before each cut; their files are written into `directory`.

    Memory: the hidden states of the calibration set at two depths, and a [hidden, hidden] float64 matrix.

    Raises:
        UnsupportedArchitectureError: the MLP's output is not added to the hidden states as it is.
    """
    runner = SegmentRunner(model, windows)
    replacements = list(plan.replacements)
    for layer, module in track(folded_layers(runner, plan, ridge), "Fitting linear folds", len(removed_runs(plan))):
        name = down_projection(runner.layers[layer])
        tensors = {f"{name}.{key}": value for key, value in module.get_submodule(name).state_dict().items()}
        file = directory / f"fold-{layer}.safetensors"
        directory.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        replacements.append(Replacement(layer, KIND, str(file), digest))
    return replace(plan, replacements=tuple(replacements))


def folded_layers(runner: SegmentRunner, plan: PruningPlan, ridge: float) -> Iterator[tuple[int, nn.Module]]:
    """Yield (layer, its folded float32 copy) from the bottom up, each fitted on the model folded so far."""
    parent: States | None = None
    student: States | None = None
    parent_at = student_at = 0
    for layer, last in removed_runs(plan):
        stretch = [index for index in plan.kept if student_at <= index <= layer]
        same_so_far = student_at == 0 and len(stretch) == layer + 1
        student, mlp = _through_mlp(runner, stretch, student)
        if same_so_far:  # nothing below was removed: the parent's states are the student's, computed once
            parent, parent_at = student, layer + 1
        span = range(parent_at, last + 1)
        parent, parent_at = runner.run([runner.layers[index] for index in span], span, parent), last + 1
        weights = _solve(runner, mlp, student, parent, ridge)
        student = [state + _change(output, weights) for state, output in zip(student, mlp, strict=True)]
        student_at = last + 1
        yield layer, _apply(runner.layers[layer], weights)


def _through_mlp(runner: SegmentRunner, stretch: Sequence[int], states: States | None) -> tuple[States, States]:
    """Run the student's layers and return (h_in, M) of the last one."""
    layer = runner.layers[stretch[-1]]
    outputs: States = []

    def keep(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        outputs.append(output.reshape(1, -1, output.shape[-1]))

    handle = layer.get_submodule(down_projection(layer)).register_forward_hook(keep)
    try:
        states = runner.run([runner.layers[index] for index in stretch], stretch, states)
    finally:
        handle.remove()
    return states, outputs


def _solve(runner: SegmentRunner, mlp: States, student: States, target: States, ridge: float) -> torch.Tensor:
    """B of the module's docstring, [hidden, hidden], float64 normal equations, returned as float32."""
    hidden = mlp[0].shape[-1]
    gram = torch.zeros(hidden, hidden, dtype=torch.float64)
    cross = torch.zeros(hidden, hidden, dtype=torch.float64)
    for number in range(len(mlp)):
        m, h_in, h_out = (runner.real(number, states[number]) for states in (mlp, student, target))
        gram += (m.T @ m).double().cpu()
        cross += (m.T @ (h_out - h_in)).double().cpu()
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    solution: torch.Tensor = torch.linalg.solve(gram, cross)
    return solution.float()


def _apply(layer: nn.Module, weights: torch.Tensor) -> nn.Module:
    """A float32 copy of the layer with (I + B) folded into its down projection, bias included."""
    copied = copy.deepcopy(layer).float()
    projection = copied.get_submodule(down_projection(layer))
    old, bias = projection.weight, projection.bias
    assert isinstance(old, torch.Tensor)
    matrix = (torch.eye(len(weights)) + weights).to(old.device)
    with torch.no_grad():
        # nn.Linear holds [out, in]; transformers' Conv1D holds [in, out].
        old.copy_(matrix.T @ old if isinstance(projection, nn.Linear) else old @ matrix)
        if isinstance(bias, torch.Tensor):
            bias.copy_(bias @ matrix)
    return copied


def _change(output: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (output.float() @ weights.to(output.device)).to(output.dtype)


def down_projection(layer: nn.Module) -> str:
    """The name, inside the layer, of the projection whose output the MLP adds to the hidden states.

    Raises:
        UnsupportedArchitectureError: there is none (a mixture of experts), or a norm follows it.
    """
    names = {name for name, _ in layer.named_modules()}
    after = sorted(name for name in names if "post_feedforward" in name or "post_mlp" in name)
    if after:
        raise UnsupportedArchitectureError(
            f"linear-fold is invalid for {type(layer).__name__}: {after[0]} stands between its MLP and the hidden "
            "states: use --compensate none"
        )
    scales = sorted(name for module in layer.modules() for name in vars(module) if "multiplier" in name)
    if scales:
        raise UnsupportedArchitectureError(
            f"linear-fold is invalid for {type(layer).__name__}: {scales[0]} scales what its MLP adds: use "
            "--compensate none"
        )
    for name in DOWN_PROJECTIONS:
        if name in names and getattr(layer.get_submodule(name), "weight", None) is not None:
            return name
    raise UnsupportedArchitectureError(
        f"linear-fold needs a single down projection, which {type(layer).__name__} does not have: use --compensate none"
    )
