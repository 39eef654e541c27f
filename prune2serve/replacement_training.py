"""Train one decoder layer to do the work of a run of them (LLM-Streamline, arXiv 2403.19135).

The layer is a float32 copy of the run's first one and keeps its class, so the pruned model loads everywhere. The
parent is frozen and runs along: what a training step needs is computed for its window and dropped after it.

| loss | what is minimised |
|---|---|
| `mse` | mean over real tokens of mean_d (Y - X_stop)^2 / mean_d X_stop^2, for Y = layer(X_start) |
| `llm-loss` | mean over real tokens of KL(parent || parent with the layer in the run's place), end to end |

`mse` is relative to each token's own size: the few tokens with massive activations would otherwise be all it sees.
The layer is called with the very arguments that the model gave the run's first layer, causal mask included; the
published script trains without a mask and serves with one.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prune2serve.activations import batches, run_body
from prune2serve.errors import UnsupportedArchitectureError
from prune2serve.evaluation import next_token_logits
from prune2serve.layers import decoder_layers, spliced
from prune2serve.methods.base import SelectorOptions
from prune2serve.progress import say, task
from prune2serve.records import CalibrationSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEARNING_RATE = 2e-3
"""Of layers up to REFERENCE_WIDTH wide; wider ones take proportionally smaller steps."""
REFERENCE_WIDTH = 576
WARM_UP = 0.1
"""Fraction of the steps over which the learning rate rises; then it falls as a cosine."""
CHECK_EVERY = 12
"""Steps between two looks at the held-out windows."""
ATTENTION_OUTPUT = re.compile(
    r"^(self_attn|self_attention|attention|attn)\.(o_proj|out_proj|c_proj|dense|wo)\.(weight|bias)$"
)

Window = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[Window], torch.Tensor]


@dataclass(frozen=True)
class TrainedLayer:
    """The best weights seen, and how good they are on the held-out windows."""

    weights: dict[str, torch.Tensor]
    """Name inside the layer -> float32."""
    loss_before: float
    loss: float
    best_step: int
    """0: training did not improve on the copy it began with."""


def train_replacement(
    model: PreTrainedModel, run: range, windows: CalibrationSet, options: SelectorOptions, seed: int = 0
) -> TrainedLayer:
    """Train a layer that stands for `run`; the model is left as it was.

    Args:
        run: neighbouring decoder layers.
        windows: the last eighth of them, at least one, is held out; a single window serves both ways.

    Raises:
        UnsupportedArchitectureError: an MLP-only replacement is asked for, but the attention's output projection is
            not known by name.
    """
    layer = trainable_copy(decoder_layers(model)[run.start], options.replacement)
    every = list(batches(windows, 1))
    num_held_out = max(len(every) // 8, 1)
    train, held_out = every[:-num_held_out] or every, every[-num_held_out:]
    with frozen(model):
        loss = LOSSES[options.replacement_loss](model, layer, run)
        rate = LEARNING_RATE * min(1.0, REFERENCE_WIDTH / model.config.get_text_config().hidden_size)
        return _train(layer, loss, train, held_out, options.replacement_steps, rate, seed)


def trainable_copy(original: nn.Module, kind: str) -> nn.Module:
    """A float32 copy that casts what comes in; `mlp` silences its attention with a zero output projection."""
    layer = copy.deepcopy(original).float().requires_grad_(True)
    if kind == "mlp":
        silent = [parameter for name, parameter in layer.named_parameters() if ATTENTION_OUTPUT.match(name)]
        if not silent:
            raise UnsupportedArchitectureError(
                f"--replacement mlp: {type(original).__name__} has no attention output projection of a known name: use "
                "--replacement layer"
            )
        for parameter in silent:
            nn.init.zeros_(parameter.requires_grad_(False))
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: (cast(args, torch.float32), cast(kwargs, torch.float32)), with_kwargs=True
    )
    return layer


def _train(
    layer: nn.Module,
    loss: Loss,
    train: list[Window],
    held_out: list[Window],
    num_steps: int,
    learning_rate: float,
    seed: int,
) -> TrainedLayer:
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step + 1, num_steps))
    order = _shuffled(len(train), num_steps, seed)
    before = _mean(loss, held_out)
    best, best_weights, best_step = before, _weights(layer), 0
    with task("Training the replacement layer", num_steps) as bar:
        for step, number in enumerate(order, start=1):
            value = loss(train[number])
            if not bool(value.isfinite()):
                say(f"Training the replacement layer: the loss is {value.item()} at step {step}, the best weights stay")
                break
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % CHECK_EVERY == 0 or step == num_steps:
                now = _mean(loss, held_out)
                if now < best:
                    best, best_weights, best_step = now, _weights(layer), step
                bar.describe(f"Training the replacement layer, held-out loss {before:.4g} to {best:.4g}")
            bar.advance()
    return TrainedLayer(best_weights, before, best, best_step)


def state_error(model: PreTrainedModel, layer: nn.Module, run: range) -> Loss:
    """`mse`: the layers above the run are not computed."""
    layers = list(decoder_layers(model))[: run.stop]

    def loss(window: Window) -> torch.Tensor:
        call: dict[str, Any] = {}

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            call["args"], call["kwargs"] = args, kwargs

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            call["target"] = hidden(output)

        handles = [
            layers[run.start].register_forward_pre_hook(enter, with_kwargs=True),
            layers[-1].register_forward_hook(leave),
        ]
        try:
            with torch.no_grad(), spliced(model, layers, range(run.stop)):
                run_body(model, *window)
        finally:
            for handle in handles:
                handle.remove()
        real = window[1].bool().to(model.device)
        target = call["target"][real].float()
        error = hidden(layer(*call["args"], **call["kwargs"]))[real] - target
        return (error.square().mean(-1) / target.square().mean(-1)).mean()

    return loss


def divergence(model: PreTrainedModel, layer: nn.Module, run: range) -> Loss:
    """`llm-loss`: gradients flow through the frozen layers above the run."""
    layers = list(decoder_layers(model))
    modules = [*layers[: run.start], layer, *layers[run.stop :]]
    kinds = [*range(run.start + 1), *range(run.stop, len(layers))]
    layer.register_forward_hook(lambda _, __, output: cast(output, model.dtype))

    def loss(window: Window) -> torch.Tensor:
        with torch.no_grad():
            teacher = next_token_logits(model, *window)
        with spliced(model, modules, kinds):
            student = next_token_logits(model, *window)
        real = window[1][:, 1:].bool().to(teacher.device)
        p, q = teacher[real].float().log_softmax(-1), student[real].float().log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean()

    return loss


LOSSES: dict[str, Callable[[PreTrainedModel, nn.Module, range], Loss]] = {"mse": state_error, "llm-loss": divergence}


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block no parameter of the model takes a gradient."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast the floating-point tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: cast(item, dtype) for key, item in value.items()}
    return type(value)(cast(item, dtype) for item in value) if isinstance(value, tuple | list) else value


def hidden(output: Any) -> torch.Tensor:
    """The hidden states in what a decoder layer returns."""
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _mean(loss: Loss, windows: list[Window]) -> float:
    with torch.no_grad():
        return sum(float(loss(window)) for window in windows) / len(windows)


def _weights(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in layer.named_parameters()}


def _rate(step: int, num_steps: int) -> float:
    warm = max(round(WARM_UP * num_steps), 1)
    return min(step / warm, 0.5 * (1 + math.cos(math.pi * min(step / max(num_steps, 1), 1.0))) + 1e-3)


def _shuffled(num_windows: int, num_steps: int, seed: int) -> list[int]:
    """Window numbers in epochs, each in its own order."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < num_steps:
        order += torch.randperm(num_windows, generator=generator).tolist()
    return order[:num_steps]
