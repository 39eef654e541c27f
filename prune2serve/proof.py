"""The reload proof: stock transformers on the written directory is the parent with those layers removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from prune2serve.errors import Prune2ServeError
from prune2serve.generation import greedy
from prune2serve.layers import decoder_layers, planned_layers, spliced
from prune2serve.records import PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_TOKENS = 48
NUM_GREEDY = 16
TOLERANCE = 1e-3
"""Of the logits' range. The same operations on the same numbers give 0."""
ROUNDED_TOLERANCE = 0.05
"""Where layers were merged from weights stored wider than they run: in memory they were rounded before the merge."""


def prove_reload(
    parent: PreTrainedModel, pruned: PreTrainedModel, plan: PruningPlan, stored: torch.dtype
) -> dict[str, Any]:
    """Compare logits and cached greedy tokens of the reloaded model with the plan applied in memory.

    Args:
        stored: the dtype of the parent's files, which merged and replaced tensors are rounded to when written.

    Returns:
        `max_logit_difference`, `logit_range`, `greedy_equal` of `greedy_tokens`, and `dtype`.

    Raises:
        Prune2ServeError: they are not the same model; nothing must be deployed.
    """
    vocabulary = parent.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        with spliced(parent, _as_written(parent, plan, stored), plan.kept):
            expected = parent(input_ids=ids.to(parent.device), use_cache=False).logits.float()
            expected_tokens = greedy(parent, ids, NUM_GREEDY)
        got = pruned(input_ids=ids.to(pruned.device), use_cache=False).logits.float()
        got_tokens = greedy(pruned, ids, NUM_GREEDY)
    difference = float((got - expected).abs().max())
    value_range = float(expected.max() - expected.min())
    equal = int((got_tokens == expected_tokens).sum())
    averaged = any(merge.rule != "telescoped" for merge in plan.merges)
    rounded = averaged and parent.dtype.itemsize < stored.itemsize
    tolerance = ROUNDED_TOLERANCE if rounded else TOLERANCE
    if not difference <= tolerance * value_range or (equal < got_tokens.numel() and not rounded):
        raise Prune2ServeError(
            f"the written model is not the pruned one: logits differ by {difference:.4g} (range {value_range:.4g}), "
            f"{equal} of {got_tokens.numel()} greedy tokens are equal: please report this model's architecture"
        )
    return {
        "max_logit_difference": difference,
        "logit_range": value_range,
        "tolerance": tolerance,
        "greedy_tokens": got_tokens.numel(),
        "greedy_equal": equal,
        "dtype": str(parent.dtype).removeprefix("torch."),
    }


def _as_written(parent: PreTrainedModel, plan: PruningPlan, stored: torch.dtype) -> list[torch.nn.Module]:
    """The plan's layers, changed ones rounded as their tensors are on disk."""
    own = set(decoder_layers(parent))
    modules = planned_layers(parent, plan)
    for module in modules:
        if module not in own:
            for weight in module.parameters():
                if weight.is_floating_point():
                    weight.data = weight.data.to(stored).to(weight.dtype)
    return modules
