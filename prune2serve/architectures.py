"""Recognise a causal LM: its decoder's config, and where its decoder layers are, on disk and in memory.

Detection is generic: the config class of the installed transformers fills in every default, the names of tensors and
modules show where the layers are. `prune2serve.families` holds what must be known by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prune2serve.errors import CorruptCheckpointError, UnsupportedArchitectureError
from prune2serve.families import REFUSED, refuse_family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MAX_LAYERS = 2048
"""No causal LM has more; a larger count is a damaged or hostile config, and would size lists and loops."""

COUNT_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""How the config names its number of decoder layers."""

LAYER_NAMES = ("layers", "h", "blocks", "block", "layer")
"""How decoder-only models name the list that holds their decoder layers."""

OTHER_TOWERS = re.compile(r"(^|\.)(vision|visual|audio|image|mtp|draft|speech|encoder)\w*(\.|$)")
"""Module paths that hold layers of something other than the decoder."""


@dataclass(frozen=True)
class Architecture:
    """Where a causal LM keeps its decoder layers, on disk and in its config."""

    model_type: str
    """The decoder's own model type (`gemma3_text` inside `gemma3`)."""
    config_path: tuple[str, ...]
    """Keys that lead from the top of config.json to the decoder's part; empty for most."""
    count_field: str
    """The decoder config's own name for the number of layers."""
    num_layers: int
    layer_prefix: str
    """What stands before the layer's index in tensor names, with the dot: `model.layers.`."""
    decoder: PreTrainedConfig
    """The decoder's config with every default filled in by transformers."""
    tied_embeddings: bool

    def split(self, name: str) -> tuple[int, str] | None:
        """Return a tensor's layer and its name inside that layer, or None when it belongs to no decoder layer."""
        if not name.startswith(self.layer_prefix):
            return None
        index, _, rest = name[len(self.layer_prefix) :].partition(".")
        return (int(index), rest) if index.isdecimal() and rest else None


def architecture_of(config: Mapping[str, Any], tensor_names: Iterable[str]) -> Architecture:
    """Recognise a checkpoint from config.json and its tensor names.

    Raises:
        UnsupportedArchitectureError: it is unknown, no decoder-only causal LM, or cannot be cut correctly.
        CorruptCheckpointError: the config does not fit its own model type or the tensors.
    """
    full = expand(config)
    path, decoder = decoder_config(full)
    field = count_field(decoder)
    num_layers = getattr(decoder, field)
    prefix = find_layer_prefix(tensor_names, num_layers)
    tied = bool(getattr(full, "tie_word_embeddings", False))
    return Architecture(decoder.model_type, path, field, num_layers, prefix, decoder, tied)


def expand(config: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the transformers config of a config.json with all defaults; refuses what cannot be pruned."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise UnsupportedArchitectureError("config.json names no model_type: add it, such as 'model_type': 'llama'")
    refuse_family(model_type, bool(config.get("is_encoder_decoder")))
    _check_counts(config)
    _check_names(config)
    try:
        return CONFIG_MAPPING[model_type].from_dict(_decoded(dict(config)))
    except (
        *(StrictDataclassError, TypeError, ValueError, KeyError, AttributeError, IndexError),
        *(ArithmeticError, AssertionError, RecursionError),
    ) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        raise CorruptCheckpointError(f"config.json does not fit model_type {model_type!r}: {line[:300]}") from None


def decoder_config(config: PreTrainedConfig) -> tuple[tuple[str, ...], PreTrainedConfig]:
    """Return the decoder's part of a config and the keys that lead to it."""
    from transformers import PreTrainedConfig

    if config.is_encoder_decoder:
        refuse_family(config.model_type, True)
    decoder = config.get_text_config(decoder=True)
    path = () if decoder is config else tuple(name for name, value in vars(config).items() if value is decoder)
    if decoder is not config:
        if len(path) != 1 or not isinstance(decoder, PreTrainedConfig):
            raise UnsupportedArchitectureError(
                f"{config.model_type}: expected its decoder's config at the top or one level below"
            )
        if decoder.model_type in REFUSED:
            refuse_family(decoder.model_type, False)
    return path, decoder


def count_field(decoder: PreTrainedConfig) -> str:
    """Return the decoder config's own name for its number of layers, checked to be a sane count."""
    field = type(decoder).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    value = getattr(decoder, field, None)
    if field not in COUNT_FIELDS or isinstance(value, bool) or not isinstance(value, int):
        raise UnsupportedArchitectureError(f"{decoder.model_type}: cannot tell its number of decoder layers")
    if value < 1:
        raise CorruptCheckpointError(f"config.json says {field} {value}: expected at least 1")
    return field


def find_layer_prefix(tensor_names: Iterable[str], num_layers: int) -> str:
    """Return what stands before a decoder layer's index in the tensor names.

    Layers past `num_layers` are allowed: multi-token prediction layers are often numbered after the last one.

    Raises:
        CorruptCheckpointError: no numbered list of modules holds layers 0 to `num_layers` - 1.
    """
    indices: dict[str, set[int]] = {}
    for name in tensor_names:
        for match in re.finditer(r"\.(\d{1,4})\.", name):
            indices.setdefault(name[: match.start() + 1], set()).add(int(match[1]))
            break  # the outermost list: experts and projections inside a layer are numbered too
    lists = {prefix: seen for prefix, seen in indices.items() if _looks_like_decoder(prefix)}
    full = [prefix for prefix, seen in lists.items() if seen >= set(range(num_layers))]
    if full:
        return min(full, key=lambda prefix: (prefix.count("."), len(prefix)))
    if not lists:
        raise CorruptCheckpointError("no tensor belongs to a decoder layer: expected names such as model.layers.0.*")
    prefix, seen = max(lists.items(), key=lambda item: len(item[1]))
    missing = min(set(range(num_layers)) - seen)
    raise CorruptCheckpointError(
        f"config.json says {num_layers} layers, but no tensor is named {prefix}{missing}.*: weights and config are "
        "not of one model"
    )


def find_layer_list(model: PreTrainedModel, num_layers: int) -> str:
    """Return the path of the ModuleList that holds a model's decoder layers.

    Raises:
        UnsupportedArchitectureError: no ModuleList of that length, or several that could be it.
    """
    import torch

    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers and _looks_like_decoder(name + ".")
    ]
    outer = [name for name in found if not any(name.startswith(other + ".") for other in found)]
    if not outer:
        raise UnsupportedArchitectureError(
            f"{model.config.model_type}: {type(model).__name__} holds no list of {num_layers} decoder layers"
        )
    return min(outer, key=lambda name: (name.count("."), len(name)))


def _looks_like_decoder(prefix: str) -> bool:
    path = prefix.rstrip(".")
    return path.rpartition(".")[2] in LAYER_NAMES and not OTHER_TOWERS.search(path)


def _check_counts(config: Mapping[str, Any], where: str = "") -> None:
    """Refuse absurd layer counts before transformers builds lists of that length."""
    for key, value in config.items():
        if isinstance(value, Mapping) and not where:
            _check_counts(value, f"{key}.")
        if (
            ("layers" in str(key) or key in COUNT_FIELDS)
            and isinstance(value, int | float)
            and not -1 <= value <= MAX_LAYERS
        ):
            raise CorruptCheckpointError(f"config.json says {where}{key} {value}: expected 1 to {MAX_LAYERS}")


def _check_names(config: Mapping[str, Any]) -> None:
    """Refuse fields named like a method of the config class, which they would replace."""
    from transformers import PreTrainedConfig

    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in part:
            if key == "attribute_map" or callable(getattr(PreTrainedConfig, str(key), None)):
                raise CorruptCheckpointError(f"config.json has a field named {key!r}, which is no setting: remove it")


def _decoded(value: Any) -> Any:
    """Read transformers' JSON form of infinities and NaN, {"__float__": "Infinity"}, which from_dict does not."""
    if isinstance(value, dict):
        if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value
