"""Greedy decoding with a KV cache, written out so that parent, pruned and in-memory models are driven alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def greedy(model: PreTrainedModel, input_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Continue [B, T] token ids by the most likely token, `num_tokens` times; return [B, num_tokens]."""
    step, cache, tokens = input_ids.to(model.device), None, []
    with torch.inference_mode():
        for _ in range(num_tokens):
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            step = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(step)
    return torch.cat(tokens, dim=-1).cpu()
