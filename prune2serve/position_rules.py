"""What a config says of layers by their position, restated for the layers that remain.

Each rule reads the parent's decoder config and returns the fields that must change. The rules go by field, not by
model family: a field means the same wherever it occurs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prune2serve.errors import UnsupportedArchitectureError

PER_LAYER_FIELDS = (
    *("layer_types", "mlp_layer_types", "no_rope_layers", "rope_layers", "layers_block_type", "mixer_types"),
    *("attn_layers", "block_configs", "num_attention_heads_per_layer", "indexer_types", "layer_rope_theta"),
    *("intermediate_size", "moe_intermediate_size", "activation_sparsity_pattern", "num_experts", "moe_topk"),
    *("num_shared_expert", "num_attention_heads", "num_key_value_heads", "num_query_heads", "num_kv_heads"),
    *("ffn_multipliers", "sliding_window_pattern", "hybrid_layer_pattern", "hybrid_override_pattern", "moe_layer_freq"),
)
"""Fields that hold one value a layer, when they are a list (or a string of letters) as long as the model is deep."""

INDEX_FIELDS = (
    *("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "local_layer_ids", "ple_layer_ids"),
    *("global_attn_idx", "attn_layer_idx", "cross_attention_layers"),
)
"""Fields that list the indices of some layers."""

PREFIX_FIELDS = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
"""Fields that count the layers of one kind at the bottom: what is left of such a run is a shorter run."""

MTP_FIELDS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")
"""How many multi-token prediction layers follow the last one; they are dropped."""

Fields = Mapping[str, Any]
Changes = dict[str, Any]
Kept = Sequence[int]


def changed_fields(decoder: Fields, num_layers: int, kept: Kept) -> Changes:
    """Return the decoder config's fields that change when the layers `kept` remain, the count excepted.

    Raises:
        UnsupportedArchitectureError: a layer's position means something that no field can restate.
    """
    _refuse(decoder, num_layers, kept)
    changes: Changes = {}
    for rule in RULES:
        changes |= rule(decoder, num_layers, kept)
    return changes


def per_layer(decoder: Fields, num_layers: int, kept: Kept) -> Changes:
    """One value a layer: keep those of the kept layers."""
    changes: Changes = {}
    for name in PER_LAYER_FIELDS:
        value = decoder.get(name)
        if isinstance(value, str) and len(value) == num_layers:
            changes[name] = "".join(value[layer] for layer in kept)
        elif isinstance(value, list | tuple) and len(value) == num_layers:
            changes[name] = [value[layer] for layer in kept]
    return changes


def _index_lists(decoder: Fields, num_layers: int, kept: Kept) -> Changes:
    position = {layer: new for new, layer in enumerate(kept)}
    return {
        name: [position[layer] for layer in decoder[name] if layer in position]
        for name in INDEX_FIELDS
        if isinstance(decoder.get(name), list | tuple)
    }


def _per_layer_config(decoder: Fields, num_layers: int, kept: Kept) -> Changes:
    """Gemma 4: overrides by layer index."""
    overrides = decoder.get("per_layer_config")
    if not isinstance(overrides, Mapping):
        return {}
    by_layer = {int(layer): fields for layer, fields in overrides.items()}
    renumbered = {f"{new:02d}": by_layer[layer] for new, layer in enumerate(kept) if layer in by_layer}
    return {"per_layer_config": renumbered}


def _prefixes(decoder: Fields, num_layers: int, kept: Kept) -> Changes:
    return {
        name: sum(layer < decoder[name] for layer in kept)
        for name in PREFIX_FIELDS
        if isinstance(decoder.get(name), int)
    }


def _sparse_step(decoder: Fields, num_layers: int, kept: Kept) -> Changes:
    """Qwen MoE: layer i is sparse where (i + 1) is a multiple of the step, unless it is listed as dense."""
    step = decoder.get("decoder_sparse_step")
    if not isinstance(step, int) or step < 1:
        return {}
    listed = decoder.get("mlp_only_layers") or []
    dense = [new for new, layer in enumerate(kept) if layer in listed or (layer + 1) % step]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def _moe_interval(decoder: Fields, num_layers: int, kept: Kept) -> Changes:
    """Ernie 4.5 MoE: layer i is sparse inside [start, end] where (i + 1) is a multiple of the interval."""
    interval, start = decoder.get("moe_layer_interval"), decoder.get("moe_layer_start_index")
    if not isinstance(interval, int) or interval < 1 or not isinstance(start, int):
        return {}
    end = decoder.get("moe_layer_end_index", -1)
    end = num_layers - 1 if end == -1 else end
    sparse = [start <= layer <= end and (layer + 1) % interval == 0 for layer in kept]
    where = [new for new, is_sparse in enumerate(sparse) if is_sparse] or [len(kept)]
    low, high = where[0], where[-1]
    for step in range(1, len(kept) + 1):
        if [low <= new <= high and (new + 1) % step == 0 for new in range(len(kept))] == sparse:
            return {"moe_layer_interval": step, "moe_layer_start_index": low, "moe_layer_end_index": high}
    raise _cannot_say("moe_layer_interval", kept)


def _periods(decoder: Fields, num_layers: int, kept: Kept) -> Changes:
    """Jamba: layer i is an attention (or expert) layer where i modulo the period is the offset."""
    changes: Changes = {}
    for kind in ("attn_layer", "expert_layer"):
        period, offset = decoder.get(f"{kind}_period"), decoder.get(f"{kind}_offset")
        if not isinstance(period, int) or period < 1 or not isinstance(offset, int):
            continue
        wanted = [layer % period == offset for layer in kept]
        changes |= dict(zip((f"{kind}_period", f"{kind}_offset"), _period_and_offset(wanted, kind, kept), strict=True))
    return changes


def _period_and_offset(wanted: Sequence[bool], kind: str, kept: Kept) -> tuple[int, int]:
    n = len(wanted)
    if not any(wanted):
        return n + 1, n
    first = wanted.index(True)
    for period in range(first + 1, n + 1):
        if [new % period == first for new in range(n)] == list(wanted):
            return period, first
    raise _cannot_say(f"{kind}_period", kept)


def _attention_types(decoder: Fields, num_layers: int, kept: Kept) -> Changes:
    """GPT-Neo: nested repeats of attention kinds, spelled out."""
    kinds = decoder.get("attention_layers")
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        return {}
    left = [kinds[layer] for layer in kept]
    return {"attention_types": [[left, 1]], "attention_layers": left}


def _block_types(decoder: Fields, num_layers: int, kept: Kept) -> Changes:
    """RecurrentGemma: a pattern of kinds that repeats to the model's depth, spelled out."""
    pattern = decoder.get("block_types")
    if not isinstance(pattern, list | tuple) or not pattern:
        return {}
    return {"block_types": [pattern[layer % len(pattern)] for layer in kept]}


def _residual_scale(decoder: Fields, num_layers: int, kept: Kept) -> Changes:
    """MiniCPM multiplies each residual branch by scale_depth / sqrt(number of layers): keep the product."""
    scale = decoder.get("scale_depth")
    return {"scale_depth": scale * math.sqrt(len(kept) / num_layers)} if isinstance(scale, int | float) else {}


def _mtp(decoder: Fields, num_layers: int, kept: Kept) -> Changes:
    return {name: 0 for name in MTP_FIELDS if isinstance(decoder.get(name), int)}


RULES: tuple[Callable[[Fields, int, Kept], Changes], ...] = (
    *(per_layer, _index_lists, _per_layer_config, _prefixes, _sparse_step, _moe_interval, _periods),
    *(_attention_types, _block_types, _residual_scale, _mtp),
)
"""Later rules override earlier ones."""


def _refuse(decoder: Fields, num_layers: int, kept: Kept) -> None:
    """Raise for settings that tie a layer to its position, or to another layer, beyond what fields can say."""
    family = decoder.get("model_type") or "this model"
    if decoder.get("scale_attn_by_inverse_layer_idx"):
        raise UnsupportedArchitectureError(
            f"{family}: scale_attn_by_inverse_layer_idx divides each layer's attention scores by its position, which "
            "removing layers would change"
        )
    if decoder.get("num_kv_shared_layers"):
        raise UnsupportedArchitectureError(
            f"{family}: its last {decoder['num_kv_shared_layers']} layers read the KV cache of earlier ones by position"
        )
    if decoder.get("hidden_size_per_layer_input"):
        raise UnsupportedArchitectureError(
            f"{family}: its per-layer input embeddings (hidden_size_per_layer_input) are one matrix over all layers"
        )
    frequency = decoder.get("moe_layer_freq")
    if isinstance(frequency, int) and frequency > 1:
        raise UnsupportedArchitectureError(f"{family}: moe_layer_freq {frequency} makes layers sparse by position")
    _refuse_lost_indexer(family, decoder.get("indexer_types"), num_layers, kept)
    _refuse_lost_attention(family, decoder.get("layer_types"), num_layers, kept)


def _refuse_lost_indexer(family: str, kinds: Any, num_layers: int, kept: Kept) -> None:
    """A `shared` layer reads the token choice of the nearest `full` one below: that one must stay."""
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        return
    sources = itertools.accumulate(
        range(num_layers), lambda last, layer: layer if kinds[layer] == "full" else last, initial=0
    )
    source = list(sources)[1:]
    for layer in kept:
        if source[layer] not in kept:
            raise UnsupportedArchitectureError(
                f"{family}: layer {layer} shares the sparse-attention indexer of layer {source[layer]}, which would be "
                "removed: keep it too"
            )


def _refuse_lost_attention(family: str, kinds: Any, num_layers: int, kept: Kept) -> None:
    """A cache counts tokens in an attention layer; a hybrid model left with recurrent layers alone has none."""
    if not isinstance(kinds, list) or len(kinds) != num_layers or not any("attention" in str(k) for k in kinds):
        return
    if any("attention" in kind and "linear" not in kind for kind in kinds) and all(
        "linear" in kinds[layer] or "attention" not in kinds[layer] for layer in kept
    ):
        raise UnsupportedArchitectureError(f"{family}: no attention layer would be left: keep at least one")


def _cannot_say(field: str, kept: Kept) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"the kinds of the kept layers {list(kept)} are in an order that {field} cannot state: choose other layers"
    )
