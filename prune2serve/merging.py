"""The weights of several neighbouring layers made into one layer's, tensor by tensor.

Three rules (sliding layer merging, arXiv 2502.19159), each stated for every kind of tensor:

| rule         | norms between the layers | everything else: projections, biases, q/k norms, scalars |
|--------------|--------------------------|-----------------------------------------------------------|
| `telescoped` | the lowest layer's       | the topmost layer's                                       |
| `delta-sum`  | the lowest layer's       | low + sum over k of (k - low)                             |
| `average`    | the mean                 | the mean                                                  |

`telescoped` is what the published code computes: it adds (W_k - W_low) to a running W_low, so all but the last
difference cancel. `delta-sum` is the paper's formula. Both leave the norms that read or write the hidden states
between layers (`input_layernorm`) at the lowest layer's values, since the merged layer reads that layer's input.
What is no floating-point number, such as a causal mask kept as a buffer, is the lowest layer's under every rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prune2serve.records import MergeRule

if TYPE_CHECKING:
    import torch

LAYER_NORM = re.compile(r"^(\w*norm\w*|ln_\w+)\.(weight|bias)$")
"""A norm that is a direct part of the layer; q/k norms lie inside the attention and follow the projections."""


def is_layer_norm(name: str) -> bool:
    """True for a tensor, named inside its layer, that belongs to a norm on the hidden states between layers."""
    return LAYER_NORM.match(name) is not None


def chosen_layer(name: str, rule: MergeRule) -> int | None:
    """Return which layer of the run gives the tensor unchanged: 0 the lowest, -1 the topmost, None if computed."""
    if rule == "average":
        return None
    if is_layer_norm(name):
        return 0
    return -1 if rule == "telescoped" else None


def merge_tensor(name: str, tensors: Iterable[torch.Tensor], rule: MergeRule) -> torch.Tensor:
    """Merge one tensor of a run of layers; accumulated in float32 (float64 for float64), returned in its own dtype.

    Args:
        name: inside the layer, such as `mlp.down_proj.weight`.
        tensors: the same tensor of each layer of the run, lowest first; equal shapes and dtypes.
    """
    run = iter(tensors)
    low = next(run)
    if not low.is_floating_point():
        return low
    chosen = chosen_layer(name, rule)
    if chosen is not None:
        return [low, *run][chosen]
    wide = low.double() if low.element_size() == 8 else low.float()
    total, count = wide.clone(), 1
    for tensor in run:
        total += tensor.to(total.dtype) - wide if rule == "delta-sum" else tensor.to(total.dtype)
        count += 1
    return (total / count if rule == "average" else total).to(low.dtype)
