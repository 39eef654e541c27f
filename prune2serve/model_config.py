"""Config surgery: the config of a model whose layers `kept` remain, everything that follows position made explicit.

Each rule below reads the parent's fields and returns the fields that must change; the same rules serve config.json
on disk and the live config of a model in memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prune2serve.architectures import Architecture, expand
from prune2serve.errors import Prune2ServeError, UnsupportedArchitectureError

PER_LAYER_FIELDS = (
    *("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "hybrid_override_pattern"),
    *("attn_layers", "block_configs", "num_attention_heads_per_layer", "indexer_types", "layer_rope_theta"),
    *("intermediate_size", "activation_sparsity_pattern", "num_experts", "moe_topk", "num_key_value_heads"),
    *(
        "num_attention_heads",
        "sliding_window_pattern",
        "hybrid_layer_pattern",
        "moe_layer_freq",
        "num_shared_expert",
    ),
    *(
        "num_query_heads",
        "num_kv_heads",
        "ffn_multipliers",
        "mixer_types",
        "moe_intermediate_size",
        "rope_layers",
    ),
)
"""Fields that hold one value a layer, when they are a list (or a string of letters) as long as the model is deep."""

INDEX_FIELDS = (
    *(
        "mlp_only_layers",
        "moe_layers",
        "full_attn_idxs",
        "attn_layer_indices",
        "local_layer_ids",
        "ple_layer_ids",
    ),
    *("global_attn_idx", "attn_layer_idx", "cross_attention_layers"),
)
"""Fields that list the indices of some layers."""

DENSE_PREFIX_FIELDS = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
"""Fields that count the layers of one kind at the bottom of the model: what is left of that run is a run again."""

MTP_FIELDS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")
"""How many multi-token prediction layers follow the last one; they are dropped."""

Fields = Mapping[str, Any]
Changes = dict[str, Any]


def prune_config(config: Mapping[str, Any], architecture: Architecture, kept: Sequence[int]) -> dict[str, Any]:
    """Return config.json of the pruned model.

    Args:
        config: the parent's, as it stands on disk.
        kept: the layers that remain, ascending, in the parent's numbering.

    Raises:
        UnsupportedArchitectureError: what follows position cannot be stated for these layers.
    """
    check_kept(kept, architecture.num_layers)
    pruned = copy.deepcopy(dict(config))
    part = pruned
    for key in architecture.config_path:
        part = part.setdefault(key, {})
    part.update(pruned_fields(vars(architecture.decoder), architecture.num_layers, kept))
    for name in {"num_hidden_layers", architecture.count_field} & (set(part) | {architecture.count_field}):
        part[name] = len(kept)
    _verify(pruned, architecture, kept)
    return pruned


def pruned_fields(decoder: Fields, num_layers: int, kept: Sequence[int]) -> Changes:
    """Return the decoder config's fields that change, the count of layers excepted."""
    changes: Changes = {}
    for rule in RULES:
        changes |= rule(decoder, num_layers, kept)
    return changes


def check_kept(kept: Sequence[int], num_layers: int) -> None:
    """Raise unless `kept` is a non-empty ascending selection of the layers 0 to num_layers - 1."""
    if not kept:
        raise Prune2ServeError(f"all {num_layers} layers would be removed: keep at least one")
    ascending = all(a < b for a, b in zip(kept, list(kept)[1:], strict=False))
    if not ascending or kept[0] < 0 or kept[-1] >= num_layers:
        raise Prune2ServeError(
            f"kept layers {list(kept)} do not fit: expected ascending, distinct numbers from 0 to {num_layers - 1}"
        )


def _per_layer(decoder: Fields, num_layers: int, kept: Sequence[int]) -> Changes:
    changes: Changes = {}
    for name in PER_LAYER_FIELDS:
        value = decoder.get(name)
        if isinstance(value, str) and len(value) == num_layers:
            changes[name] = "".join(value[layer] for layer in kept)
        elif isinstance(value, list | tuple) and len(value) == num_layers:
            changes[name] = [value[layer] for layer in kept]
    return changes


def _index_lists(decoder: Fields, num_layers: int, kept: Sequence[int]) -> Changes:
    position = {layer: new for new, layer in enumerate(kept)}
    return {
        name: [position[layer] for layer in decoder[name] if layer in position]
        for name in INDEX_FIELDS
        if isinstance(decoder.get(name), list | tuple)
    }


def _dense_prefix(decoder: Fields, num_layers: int, kept: Sequence[int]) -> Changes:
    return {
        name: sum(layer < decoder[name] for layer in kept)
        for name in DENSE_PREFIX_FIELDS
        if isinstance(decoder.get(name), int)
    }


def _sparse_step(decoder: Fields, num_layers: int, kept: Sequence[int]) -> Changes:
    """Qwen MoE: layer i is sparse unless listed, and where (i + 1) is a multiple of the step."""
    step = decoder.get("decoder_sparse_step")
    if not isinstance(step, int) or step == 0:
        return {}
    listed = decoder.get("mlp_only_layers") or []
    dense = [new for new, layer in enumerate(kept) if layer in listed or (layer + 1) % step]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def _moe_interval(decoder: Fields, num_layers: int, kept: Sequence[int]) -> Changes:
    """Ernie 4.5 MoE: layer i is sparse inside [start, end] where (i + 1) is a multiple of the interval."""
    interval, start = decoder.get("moe_layer_interval"), decoder.get("moe_layer_start_index")
    if not isinstance(interval, int) or not isinstance(start, int):
        return {}
    end = decoder.get("moe_layer_end_index", -1)
    end = num_layers - 1 if end == -1 else end
    sparse = [start <= layer <= end and (layer + 1) % interval == 0 for layer in kept]
    n = len(kept)
    for step in range(1, n + 1):
        for low in range(n + 1):
            for high in range(low, n) if low < n else [n]:
                if [low <= i <= high and (i + 1) % step == 0 for i in range(n)] == sparse:
                    return {
                        "moe_layer_interval": step,
                        "moe_layer_start_index": low,
                        "moe_layer_end_index": high,
                    }
    raise UnsupportedArchitectureError(
        f"removing these layers leaves sparse and dense MLPs in an order that moe_layer_interval cannot state: kept "
        f"{list(kept)}: choose other layers"
    )


def _attention_types(decoder: Fields, num_layers: int, kept: Sequence[int]) -> Changes:
    """GPT-Neo: nested repeats of attention kinds, spelled out."""
    kinds = decoder.get("attention_layers")
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        return {}
    left = [kinds[layer] for layer in kept]
    return {"attention_types": [[left, 1]], "attention_layers": left}


def _block_types(decoder: Fields, num_layers: int, kept: Sequence[int]) -> Changes:
    """RecurrentGemma: a pattern of kinds repeated to the model's depth, spelled out."""
    pattern = decoder.get("block_types")
    if not isinstance(pattern, list | tuple) or not pattern:
        return {}
    return {"block_types": [pattern[layer % len(pattern)] for layer in kept]}


def _residual_scale(decoder: Fields, num_layers: int, kept: Sequence[int]) -> Changes:
    """MiniCPM scales each residual branch by scale_depth / sqrt(number of layers)."""
    scale = decoder.get("scale_depth")
    return {"scale_depth": scale * math.sqrt(len(kept) / num_layers)} if isinstance(scale, int | float) else {}


def _mtp(decoder: Fields, num_layers: int, kept: Sequence[int]) -> Changes:
    return {name: 0 for name in MTP_FIELDS if isinstance(decoder.get(name), int)}


Rule = Callable[[Fields, int, Sequence[int]], Changes]
RULES: tuple[Rule, ...] = (
    *(_per_layer, _index_lists, _dense_prefix, _sparse_step, _moe_interval, _attention_types, _block_types),
    *(_residual_scale, _mtp),
)
"""Later rules override earlier ones."""


def _verify(pruned: Mapping[str, Any], architecture: Architecture, kept: Sequence[int]) -> None:
    """Read the written config back through transformers: each per-layer field must say what the parent's said."""
    decoder: Any = expand(pruned)
    for key in architecture.config_path:
        decoder = getattr(decoder, key)
    before, after = vars(architecture.decoder), vars(decoder)
    for name, expected in _per_layer(before, architecture.num_layers, kept).items():
        got = after.get(name)
        if got is None or list(got) != list(expected):
            raise UnsupportedArchitectureError(
                f"{architecture.model_type}: transformers reads {name} of the pruned config as {got}, expected {expected}: "
                "choose other layers"
            )
