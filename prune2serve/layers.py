"""The decoder layers of a model in memory: find them, and compute with some of them only.

No weight is copied, so trying a set of layers costs a forward pass and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prune2serve.architectures import count_field, decoder_config, find_layer_list, refuse_model_type
from prune2serve.model_config import check_kept, pruned_fields

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

INDEX_ATTRIBUTES = ("layer_idx", "layer_id")
"""How modules remember their layer's index, which is their slot in the KV cache."""


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Return the list of decoder layers of a causal LM.

    Raises:
        UnsupportedArchitectureError: the model is no decoder-only causal LM, or its layers cannot be found.
    """
    return model.get_submodule(_layer_path(model))  # type: ignore[return-value]


@contextmanager
def pruned_in_memory(model: PreTrainedModel, kept: Sequence[int]) -> Iterator[PreTrainedModel]:
    """Inside the block the model consists of the layers `kept` alone; afterwards it is what it was.

    Its config and the layers' cache slots are patched alike, so cached generation works.

    Args:
        kept: ascending, distinct layer numbers.
    """
    layers = decoder_layers(model)
    check_kept(kept, len(layers))
    with spliced(model, [layers[layer] for layer in kept], kept):
        yield model


@contextmanager
def spliced(
    model: PreTrainedModel, modules: Sequence[torch.nn.Module], stands_for: Sequence[int]
) -> Iterator[PreTrainedModel]:
    """Inside the block the decoder layers are `modules`.

    Args:
        modules: called as the model's own decoder layers are, with the same arguments and kind of result.
        stands_for: for each module the parent's layer whose kind (sliding or full attention, rope) it has;
            ascending, distinct.
    """
    with _restored(model):
        splice(model, modules, stands_for)
        yield model


def splice(model: PreTrainedModel, modules: Sequence[torch.nn.Module], stands_for: Sequence[int]) -> None:
    """Make `modules` the model's decoder layers for good; see `spliced`."""
    import torch

    path = _layer_path(model)
    num_layers = len(model.get_submodule(path))  # type: ignore[arg-type]
    check_kept(stands_for, num_layers)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, torch.nn.ModuleList(modules))
    for config in _decoder_configs(model):
        changes = pruned_fields(vars(config), num_layers, stands_for)
        for field, value in changes.items():
            setattr(config, field, value)
        setattr(config, count_field(config), len(stands_for))
    for index, module in enumerate(modules):
        _renumber(module, index)


def _layer_path(model: PreTrainedModel) -> str:
    refuse_model_type(model.config.model_type, model.config.is_encoder_decoder)
    _, decoder = decoder_config(model.config)
    return find_layer_list(model, getattr(decoder, count_field(decoder)))


def _decoder_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config object that the model's modules read for their decoder: usually one, shared."""
    _, decoder = decoder_config(model.config)
    found: dict[int, Any] = {id(decoder): decoder}
    for module in model.modules():
        config = getattr(module, "config", None)
        if type(config) is type(decoder):
            found.setdefault(id(config), config)
    return list(found.values())


def _renumber(module: torch.nn.Module, index: int) -> None:
    for part in module.modules():
        for name in INDEX_ATTRIBUTES:
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, index)


@contextmanager
def _restored(model: PreTrainedModel) -> Iterator[None]:
    """Put the layer list, the configs and the layers' indices back on exit, also after an exception."""
    path = _layer_path(model)
    parent, _, name = path.rpartition(".")
    owner, layers = model.get_submodule(parent), model.get_submodule(path)
    configs = [(config, dict(vars(config))) for config in _decoder_configs(model)]
    indices = [
        (part, attribute, getattr(part, attribute))
        for part in layers.modules()
        for attribute in INDEX_ATTRIBUTES
        if isinstance(getattr(part, attribute, None), int)
    ]
    try:
        yield
    finally:
        setattr(owner, name, layers)
        for config, fields in configs:
            vars(config).clear()
            vars(config).update(fields)
        for part, attribute, value in indices:
            setattr(part, attribute, value)
