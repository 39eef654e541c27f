"""Compare, without weights, each layer of the pruned model with the parent's layer that it came from.

transformers builds both models on the meta device from their configs. A layer whose modules, tensor shapes or settings
(window, rope, scale) come out differently follows its position in some way that the config cannot restate: the last
guard for families that nobody has looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prune2serve.architectures import Architecture, expand
from prune2serve.errors import UnsupportedArchitectureError
from prune2serve.layers import INDEX_ATTRIBUTES, decoder_layers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

IGNORED = {*INDEX_ATTRIBUTES, "training"}


def check_structure(
    parent: Mapping[str, Any], pruned: Mapping[str, Any], architecture: Architecture, kept: Sequence[int]
) -> None:
    """Raise UnsupportedArchitectureError when a kept layer would be built differently in the pruned model.

    Args:
        parent: its config.json.
        pruned: the config.json of the model with only the layers `kept`.
    """
    before, after = decoder_layers(_on_meta(parent)), decoder_layers(_on_meta(pruned))
    for new, old in enumerate(kept):
        expected, got = _description(before[old]), _description(after[new])
        for what in sorted(expected.keys() | got.keys()):
            if not _same(expected.get(what), got.get(what)):
                raise UnsupportedArchitectureError(
                    f"{architecture.model_type}: layer {old} would change with its place: {what} is "
                    f"{expected.get(what)} in the parent and {got.get(what)} in the pruned model"
                )


def _same(a: Any, b: Any) -> bool:
    both_floats = isinstance(a, float) and isinstance(b, float)
    return math.isclose(a, b, rel_tol=1e-12) if both_floats else a == b


def _on_meta(config: Mapping[str, Any]) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(expand(config))
    return model


def _description(layer: torch.nn.Module) -> dict[str, Any]:
    """Everything about a layer that can be compared: classes, tensor shapes and plain settings, by path."""
    found: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    for path, module in layer.named_modules():
        prefix = f"{path}." if path else ""
        found[f"the class of {path or 'the layer'}"] = type(module).__name__
        for name, value in vars(module).items():
            if name not in IGNORED and not name.startswith("_") and isinstance(value, bool | int | float | str):
                found[prefix + name] = value
    return found
