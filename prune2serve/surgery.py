"""Write a pruned checkpoint from its parent's files, tensor by tensor, without building the model.

What is kept is copied as byte ranges inside the kernel; what a merge or a replacement changes is computed one tensor
at a time. Memory is bounded by the few tensors of one merge, whatever the model's size.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune2serve.architectures import Architecture, architecture_of
from prune2serve.errors import Prune2ServeError
from prune2serve.families import PROVEN
from prune2serve.merging import chosen_layer, merge_tensor
from prune2serve.model_config import prune_config
from prune2serve.progress import task
from prune2serve.records import Checkpoint, Merge, PruningPlan
from prune2serve.safetensors_header import TensorEntry
from prune2serve.shard_writer import Output, pack, write_shard
from prune2serve.structure import check_structure
from prune2serve.tensors import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorIndex,
    is_float,
    read_index,
    read_replacement,
    read_tensor,
    torch_dtype,
)

if TYPE_CHECKING:
    import torch

COMPANIONS = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*"),
    *("merges.txt", "*.model", "*.tiktoken", "chat_template*", "additional_chat_templates/*"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)
"""Files that belong to the model and do not depend on its depth."""

MTP = re.compile(r"(^|\.)mtp(_\w+)?\.")
"""Multi-token prediction heads that lie beside the decoder layers."""


@dataclass(frozen=True)
class SurgeryResult:
    """What `write_pruned` wrote."""

    num_parameters_parent: int
    num_parameters_pruned: int
    files: tuple[str, ...]
    """Relative to the output directory, sorted."""


def write_pruned(
    checkpoint: Checkpoint, plan: PruningPlan, output: Path, *, max_shard_size: int = 5_000_000_000
) -> SurgeryResult:
    """Write the pruned model into the empty directory `output`, loadable by stock transformers.

    Args:
        output: exists and is empty; the caller makes it appear under its final name.
        max_shard_size: bytes of tensors in one file, unless a single tensor is larger.

    Raises:
        CorruptCheckpointError: the parent's files are damaged, or change while they are read.
        UnsupportedArchitectureError: its layers cannot be removed correctly.
        Prune2ServeError: the plan is another model's, a replacement does not fit, or the disk is full.
    """
    if max_shard_size < 1:
        raise Prune2ServeError(f"the shard size is {max_shard_size} bytes, expected at least 1")
    index = read_index(checkpoint.path)
    architecture = architecture_of(checkpoint.config, index.entries)
    if plan.num_layers != architecture.num_layers:
        raise Prune2ServeError(
            f"the plan is for a model of {plan.num_layers} layers, {checkpoint.source} has {architecture.num_layers}"
        )
    config = prune_config(checkpoint.config, architecture, plan.kept)
    if architecture.model_type not in PROVEN:
        check_structure(checkpoint.config, config, architecture, plan.kept)
    outputs = plan_tensors(index, architecture, plan)
    try:
        _check_space(output, sum(tensor.size_bytes for tensor in outputs))
        copy_companions(checkpoint.path, output)
        _write_json(output / "config.json", config)
        _write_weights(output, pack(outputs, max_shard_size))
    except OSError as error:
        raise _disk_error(error, output) from error
    index.check_unchanged()
    return SurgeryResult(
        num_parameters(index.entries.values(), architecture),
        num_parameters(outputs, architecture),
        tuple(sorted(str(file.relative_to(output)) for file in output.rglob("*") if file.is_file())),
    )


def plan_tensors(index: TensorIndex, architecture: Architecture, plan: PruningPlan) -> list[Output]:
    """Return every tensor of the pruned checkpoint, in the order in which the parent's files hold them.

    Multi-token prediction layers are left out: they were trained on the unpruned model's hidden states, the pruned
    config says there are none, and the model itself does not read them.
    """
    position = {layer: new for new, layer in enumerate(plan.kept)}
    merges = {merge.low: merge for merge in plan.merges}
    replaced = {(r.layer, entry.name): entry for r in plan.replacements for entry in read_replacement(r)}
    outputs = []
    for name, entry in index.entries.items():
        place = architecture.split(name)
        if place is None and not MTP.search(name):
            outputs.append(_output(name, entry, entry))
        if place is None or place[0] not in position:
            continue
        layer, inside = place
        new_name = f"{architecture.layer_prefix}{position[layer]}.{inside}"
        if place in replaced:
            outputs.append(_replaced(new_name, replaced.pop(place), entry))
        elif layer in merges:
            outputs.append(_merged(new_name, inside, merges[layer], index, architecture))
        else:
            outputs.append(_output(new_name, entry, entry))
    for (layer, inside), entry in replaced.items():
        raise Prune2ServeError(f"{entry.file} replaces {inside!r}, which layer {layer} of the parent does not have")
    return outputs


def copy_companions(parent: Path, output: Path) -> None:
    """Copy tokenizer, generation config, chat template and licence; links are followed."""
    for pattern in COMPANIONS:
        for file in sorted(parent.glob(pattern)):
            if file.is_file() and file.suffix not in (".safetensors", ".bin", ".py"):
                target = output / file.relative_to(parent)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)


def num_parameters(tensors: Iterable[TensorEntry | Output], architecture: Architecture) -> int:
    """Count weights; a head tied to the embeddings counts once even where the file holds it twice."""
    import math

    tied = architecture.tied_embeddings
    return sum(math.prod(t.shape) for t in tensors if not (tied and t.name.endswith("lm_head.weight")))


def _output(name: str, source: TensorEntry, like: TensorEntry) -> Output:
    return Output(name, like.dtype, like.shape, like.size_bytes, source)


def _replaced(new_name: str, new: TensorEntry, old: TensorEntry) -> Output:
    """The replacement's values in the parent's dtype."""
    if new.shape != old.shape or not (is_float(new) and is_float(old)):
        raise Prune2ServeError(
            f"{new.file} gives {new.name!r} as {new.dtype} {list(new.shape)}, expected the shape of the layer's own, "
            f"{old.dtype} {list(old.shape)}"
        )
    if new.dtype == old.dtype:
        return _output(new_name, new, old)
    return Output(new_name, old.dtype, old.shape, old.size_bytes, lambda: read_tensor(new).to(torch_dtype(old)))


def _merged(new_name: str, inside: str, merge: Merge, index: TensorIndex, architecture: Architecture) -> Output:
    run: list[TensorEntry] = []
    for layer in range(merge.low, merge.high + 1):
        name = f"{architecture.layer_prefix}{layer}.{inside}"
        entry = index.entries.get(name)
        if entry is None or (run and (entry.shape, entry.dtype) != (run[0].shape, run[0].dtype)):
            raise Prune2ServeError(
                f"layers {merge.low} to {merge.high} cannot be merged: {name} is missing or unlike the others; merge "
                "layers of one kind"
            )
        run.append(entry)
    if run[0].dtype.startswith(("F8_", "F6_", "F4")):
        raise Prune2ServeError(f"layers of {run[0].dtype} weights cannot be merged: merge the unquantized model")
    chosen = chosen_layer(inside, merge.rule) if is_float(run[0]) else 0
    if chosen is not None:
        return _output(new_name, run[chosen], run[0])
    low = run[0]
    return Output(new_name, low.dtype, low.shape, low.size_bytes, partial(_merge_entries, inside, run, merge))


def _merge_entries(inside: str, run: Sequence[TensorEntry], merge: Merge) -> torch.Tensor:
    return merge_tensor(inside, (read_tensor(entry) for entry in run), merge.rule)


def _write_weights(output: Path, shards: Sequence[Sequence[Output]]) -> None:
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE_FILE]
    total = sum(tensor.size_bytes for shard in shards for tensor in shard)
    with task("Writing weights", total) as bar:
        for name, shard in zip(names, shards, strict=True):
            write_shard(output / name, shard, bar.advance)
    if len(shards) > 1:
        weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        _write_json(output / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _check_space(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output).free
    if free < needed:
        raise Prune2ServeError(
            f"the pruned weights take {needed} bytes, but {output.parent} has {free} free: free some space or choose "
            "another --output"
        )


def _disk_error(error: OSError, output: Path) -> Prune2ServeError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Prune2ServeError(
            f"the disk that holds {output.parent} is full: free some space or choose another --output"
        )
    return Prune2ServeError(f"cannot write the pruned model to {output}: {error.strerror or error}")


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
