"""The tensors of a checkpoint on disk: which there are, where their bytes lie, and reading one at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prune2serve.errors import CorruptCheckpointError, Prune2ServeError
from prune2serve.records import Replacement
from prune2serve.safetensors_header import (
    ShardStamp,
    TensorEntry,
    parse_json_object,
    pread_exactly,
    read_header,
    stamp,
)

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_INDEX_BYTES = 256 << 20
CHUNK_BYTES = 16 << 20
"""Reading in pieces of this size bounds the memory of `find_nonfinite`."""


@dataclass(frozen=True)
class TensorIndex:
    """Every tensor of a checkpoint directory."""

    directory: Path
    entries: dict[str, TensorEntry]
    """Name -> place, in the order of the files and of the bytes in them."""
    shards: dict[Path, ShardStamp]

    @property
    def num_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.entries.values())

    def check_unchanged(self) -> None:
        """Raise CorruptCheckpointError when a shard is no longer the file whose header was read."""
        for file, before in self.shards.items():
            if stamp(file) != before:
                raise CorruptCheckpointError(
                    f"{file} changed while it was being read: wait until nothing writes to it, then run again"
                )


def read_index(directory: Path) -> TensorIndex:
    """Find and check the tensors of a directory with one safetensors file, or shards and an index.

    Raises:
        CorruptCheckpointError: files are missing, truncated, damaged, or contradict the index.
        Prune2ServeError: there is no such directory, or it holds no safetensors files.
    """
    if not directory.is_dir():
        raise Prune2ServeError(f"no directory {directory}: give an existing model directory")
    if (directory / SINGLE_FILE).exists():
        files = [directory / SINGLE_FILE]
        weight_map = None
    elif (directory / INDEX_FILE).exists():
        weight_map = _read_weight_map(directory / INDEX_FILE)
        files = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        raise _no_weights(directory)
    shards = {file: stamp(file) for file in files}
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for entry in read_header(file):
            if weight_map is not None:
                _check_mapped(entry, weight_map, directory)
            entries[entry.name] = entry
    for name, file_name in (weight_map or {}).items():
        if name not in entries:
            raise CorruptCheckpointError(f"{INDEX_FILE} says tensor {name!r} is in {file_name}, but it is not there")
    if not entries:
        raise CorruptCheckpointError(f"{directory} holds safetensors files without any tensor")
    return TensorIndex(directory, entries, shards)


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """Read one tensor into memory.

    Raises:
        CorruptCheckpointError: its dtype is one that torch has not, or the file ended.
    """
    import torch

    raw = torch.empty(entry.size_bytes, dtype=torch.uint8)
    if entry.size_bytes:
        with entry.file.open("rb") as stream:
            pread_exactly(stream.fileno(), raw.numpy().data, entry.start, entry.file)
    return raw.view(torch_dtype(entry)).reshape(entry.shape)


def read_replacement(replacement: Replacement) -> list[TensorEntry]:
    """Return the tensors of a replacement's file, checked to be the one that the plan names.

    Raises:
        CorruptCheckpointError: it is missing, damaged, or has another sha256.
    """
    file = Path(replacement.path)
    entries = read_header(file)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != replacement.sha256:
        raise CorruptCheckpointError(
            f"{file} is not the file of the plan: its sha256 is {digest}, expected {replacement.sha256}"
        )
    return entries


def torch_dtype(entry: TensorEntry) -> torch.dtype:
    """Return torch's name for the dtype of a tensor on disk.

    Raises:
        CorruptCheckpointError: torch has none.
    """
    import torch

    names = {
        **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64"},
        **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool"},
        **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
        **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
        **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
    }
    dtype = getattr(torch, names.get(entry.dtype, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise CorruptCheckpointError(f"tensor {entry.name!r} has dtype {entry.dtype}, which torch cannot compute with")
    return dtype


def is_float(entry: TensorEntry) -> bool:
    """True for floating-point weights, packed four and six bit floats excepted."""
    return entry.dtype in ("F64", "F32", "F16", "BF16") or entry.dtype.startswith("F8_E")


def find_nonfinite(index: TensorIndex) -> str | None:
    """Return the name of the first tensor that holds a NaN or an infinity, reading everything once, in pieces."""
    import torch

    buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    view = buffer.numpy().data
    for file, entries in _by_file(index):
        with file.open("rb") as stream:
            for entry in entries:
                dtype = torch_dtype(entry)
                for offset in range(0, entry.size_bytes, CHUNK_BYTES):
                    length = min(CHUNK_BYTES, entry.size_bytes - offset)
                    pread_exactly(stream.fileno(), view[:length], entry.start + offset, file)
                    if not _all_finite(buffer[:length].view(dtype)):
                        return entry.name
    return None


def check_finite(index: TensorIndex) -> None:
    """Raise CorruptCheckpointError when a weight is NaN or infinite, naming the tensor."""
    name = find_nonfinite(index)
    if name is not None:
        raise CorruptCheckpointError(
            f"{index.entries[name].file.name}: tensor {name!r} holds NaN or infinite weights: fetch or copy it again"
        )


def _all_finite(values: torch.Tensor) -> bool:
    import torch

    # One pass that reads only: a sum is finite unless something in it is not, or it overflowed; then look closely.
    wide = values.float() if values.element_size() == 1 else values
    total = wide.sum(dtype=torch.float64 if wide.dtype == torch.float64 else torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(wide.float()).all())


def _by_file(index: TensorIndex) -> Iterator[tuple[Path, list[TensorEntry]]]:
    for file in index.shards:
        yield file, [entry for entry in index.entries.values() if entry.file == file and is_float(entry)]


def _read_weight_map(file: Path) -> dict[str, str]:
    if stamp(file).size_bytes > MAX_INDEX_BYTES:
        raise CorruptCheckpointError(
            f"{file} is {stamp(file).size_bytes} bytes long, expected at most {MAX_INDEX_BYTES}"
        )
    weight_map = parse_json_object(file.read_bytes(), str(file)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(f"{file} has no weight_map of tensor names to file names")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise CorruptCheckpointError(f"{file} maps {name!r} to {str(shard)[:80]!r}, expected a .safetensors file")
        if os.path.basename(shard) != shard or "\\" in shard or "\0" in shard:
            raise CorruptCheckpointError(f"{file} maps {name!r} to {shard[:80]!r}, which leads out of its directory")
    return weight_map


def _check_mapped(entry: TensorEntry, weight_map: dict[str, str], directory: Path) -> None:
    mapped = weight_map.get(entry.name)
    if mapped is None:
        raise CorruptCheckpointError(f"tensor {entry.name!r} of {entry.file.name} is missing from {INDEX_FILE}")
    if mapped != entry.file.name:
        raise CorruptCheckpointError(
            f"tensor {entry.name!r} is in {entry.file.name}, but {INDEX_FILE} says it is in {mapped}"
        )


def _no_weights(directory: Path) -> Prune2ServeError:
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return CorruptCheckpointError(
            f"{directory} holds {files[0].name} but neither {SINGLE_FILE} nor {INDEX_FILE}: fetch the missing file"
        )
    pickles = sorted(file for pattern in PICKLES for file in directory.glob(pattern))
    if pickles:
        return Prune2ServeError(
            f"{directory} holds only pickled weights ({pickles[0].name}), which can run code when loaded: if you trust "
            "them, convert once with transformers: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
        )
    gguf = sorted(directory.glob("*.gguf"))
    if gguf:
        return Prune2ServeError(f"{directory} holds a GGUF file: name the file itself, {gguf[0]}")
    if not any(directory.iterdir()):
        return Prune2ServeError(f"{directory} is empty: a model directory holds config.json and *.safetensors")
    return Prune2ServeError(f"{directory} holds no safetensors weights: expected {SINGLE_FILE} or {INDEX_FILE}")
