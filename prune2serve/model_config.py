"""Config surgery: the config.json of the model that remains, with all that followed position made explicit."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prune2serve.architectures import Architecture, expand
from prune2serve.errors import CorruptCheckpointError, Prune2ServeError, UnsupportedArchitectureError
from prune2serve.position_rules import changed_fields, per_layer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

IMPLIED_BY_LAYER_TYPES = ("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers")
"""Periods from which layer_types is derived where it is not given; once it is given, they are stale."""


def prune_config(config: Mapping[str, Any], architecture: Architecture, kept: Sequence[int]) -> dict[str, Any]:
    """Return config.json of the pruned model.

    Args:
        config: the parent's, as it stands on disk.
        kept: the layers that remain, ascending, in the parent's numbering.

    Raises:
        UnsupportedArchitectureError: what follows a layer's position cannot be stated for these layers.
    """
    check_kept(kept, architecture.num_layers)
    pruned = copy.deepcopy(dict(config))
    part = pruned
    for key in architecture.config_path:
        part = part.setdefault(key, {})
    changes = pruned_fields(architecture.decoder, architecture.num_layers, kept)
    _drop_stale(part, changes)
    for name in ("num_hidden_layers", architecture.count_field):
        if name in part or name == architecture.count_field:
            part[name] = len(kept)
    part.update(changes)
    for holder in (pruned,) if part is pruned else (pruned, part):
        if isinstance(holder.get("quantization_config"), dict):
            holder["quantization_config"] = _rename_layers(holder["quantization_config"], architecture, kept)
    _verify(pruned, architecture, kept)
    return pruned


def pruned_fields(decoder: PreTrainedConfig, num_layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """Return the fields of a decoder config that change, the count of layers excepted; see `position_rules`."""
    return changed_fields(decoder_fields(decoder), num_layers, kept)


def decoder_fields(decoder: PreTrainedConfig) -> dict[str, Any]:
    """Return a config's fields by name, defaults filled in."""
    fields = dict(vars(decoder)) | {"model_type": decoder.model_type}
    if getattr(decoder, "is_heterogeneous", False):
        fields["per_layer_config"] = decoder.to_dict().get("per_layer_config")
    return fields


def check_kept(kept: Sequence[int], num_layers: int) -> None:
    """Raise unless `kept` is a non-empty ascending selection of the layers 0 to num_layers - 1."""
    if not kept:
        raise Prune2ServeError(f"all {num_layers} layers would be removed: keep at least one")
    ascending = all(a < b for a, b in zip(kept, list(kept)[1:], strict=False))
    if not ascending or kept[0] < 0 or kept[-1] >= num_layers:
        raise Prune2ServeError(
            f"the kept layers {list(kept)} do not fit: expected ascending numbers from 0 to {num_layers - 1}"
        )


def _drop_stale(part: dict[str, Any], changes: dict[str, Any]) -> None:
    if "layer_types" in changes:
        for name in IMPLIED_BY_LAYER_TYPES:
            if name not in changes:
                part.pop(name, None)


def _rename_layers(value: Any, architecture: Architecture, kept: Sequence[int]) -> Any:
    """Renumber the layers that a quantization config names, in lists and as keys; names of removed layers go."""
    position = {layer: new for new, layer in enumerate(kept)}
    name = architecture.layer_prefix.rstrip(".").rpartition(".")[2]
    pattern = re.compile(rf"(^|\.){re.escape(name)}\.(\d+)(?=\.|$)")

    def renamed(text: Any) -> Any:
        match = pattern.search(text) if isinstance(text, str) else None
        if match is None:
            return text
        new = position.get(int(match[2]))
        return None if new is None else f"{text[: match.start(2)]}{new}{text[match.end(2) :]}"

    if isinstance(value, dict):
        items = {renamed(key): _rename_layers(item, architecture, kept) for key, item in value.items()}
        return {key: item for key, item in items.items() if key is not None}
    if isinstance(value, list):
        left = [renamed(item) if isinstance(item, str) else _rename_layers(item, architecture, kept) for item in value]
        return [new for new, old in zip(left, value, strict=True) if new is not None or old is None]
    return value


def _verify(pruned: Mapping[str, Any], architecture: Architecture, kept: Sequence[int]) -> None:
    """Read the written config back through transformers: each per-layer field must say what the parent's said."""
    try:
        decoder: Any = expand(pruned)
    except CorruptCheckpointError as error:
        raise UnsupportedArchitectureError(
            f"{architecture.model_type} without these layers is refused by transformers: {error}: choose other layers"
        ) from None
    for key in architecture.config_path:
        decoder = getattr(decoder, key)
    before, after = decoder_fields(architecture.decoder), decoder_fields(decoder)
    for name, expected in per_layer(before, architecture.num_layers, kept).items():
        got = after.get(name)
        if got is None or list(got) != list(expected):
            raise UnsupportedArchitectureError(
                f"{architecture.model_type}: transformers reads {name} of the pruned config as {got}, expected "
                f"{expected}: choose other layers"
            )
