"""The decoder layers of a model in memory: find them, and compute with some of them only.

No weight is copied, so trying a set of layers costs a forward pass and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prune2serve.architectures import count_field, decoder_config, find_layer_list
from prune2serve.errors import Prune2ServeError
from prune2serve.families import refuse_family
from prune2serve.merging import merge_tensor
from prune2serve.model_config import check_kept, pruned_fields
from prune2serve.records import Merge, PruningPlan, Replacement
from prune2serve.tensors import read_replacement, read_tensor

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
        changes = {count_field(config): len(stands_for)} | pruned_fields(config, num_layers, stands_for)
        for field, value in changes.items():
            setattr(config, field, value)
    for index, module in enumerate(modules):
        _renumber(module, index)


@contextmanager
def plan_in_memory(model: PreTrainedModel, plan: PruningPlan) -> Iterator[PreTrainedModel]:
    """Inside the block the model is what `surgery.write_pruned` would write for this plan.

    Layers that a merge or a replacement changes are copies; all others are the model's own.
    """
    with spliced(model, planned_layers(model, plan), plan.kept):
        yield model


def apply_plan_in_memory(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """Turn the model into the pruned one for good, and return it; see `plan_in_memory`."""
    splice(model, planned_layers(model, plan), plan.kept)
    return model


def planned_layers(model: PreTrainedModel, plan: PruningPlan) -> list[torch.nn.Module]:
    """Return the decoder layers of the pruned model: the model's own, and changed copies of some."""
    layers = decoder_layers(model)
    if len(layers) != plan.num_layers:
        raise Prune2ServeError(f"the plan is for a model of {plan.num_layers} layers, this one has {len(layers)}")
    merges = {merge.low: merge for merge in plan.merges}
    chosen = []
    for layer in plan.kept:
        replacements = [replacement for replacement in plan.replacements if replacement.layer == layer]
        module = layers[layer]
        if layer in merges or replacements:
            module = _changed(layers, layer, merges.get(layer), replacements)
        chosen.append(module)
    return chosen


def _changed(
    layers: torch.nn.ModuleList, layer: int, merge: Merge | None, replacements: Sequence[Replacement]
) -> torch.nn.Module:
    module = copy.deepcopy(layers[layer])
    weights = module.state_dict()
    if merge:
        run = [layers[index].state_dict() for index in range(merge.low, merge.high + 1)]
        if any({n: t.shape for n, t in w.items()} != {n: t.shape for n, t in weights.items()} for w in run):
            raise Prune2ServeError(
                f"layers {merge.low} to {merge.high} cannot be merged: their tensors differ; merge layers of one kind"
            )
        weights = {name: merge_tensor(name, [w[name] for w in run], merge.rule) for name in weights}
    for replacement in replacements:
        for entry in read_replacement(replacement):
            if entry.name not in weights or weights[entry.name].shape != entry.shape:
                raise Prune2ServeError(
                    f"{entry.file} replaces {entry.name!r}, which layer {layer} has not in that shape"
                )
            weights[entry.name] = read_tensor(entry)
    module.load_state_dict(weights)
    return module


def _layer_path(model: PreTrainedModel) -> str:
    refuse_family(model.config.model_type, model.config.is_encoder_decoder)
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
