"""The safetensors format, read and written by hand: a length, a JSON header, then the tensors' bytes.

Nothing in a header is trusted: lengths, shapes, offsets and names are checked against the file before use.
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune2serve.errors import CorruptCheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""

MAX_DIMENSIONS = 16

DTYPE_BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32},
    **{"F16": 16, "BF16": 16, "I16": 16, "U16": 16},
    **{
        "F8_E4M3": 8,
        "F8_E5M2": 8,
        "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "I8": 8,
        "U8": 8,
        "BOOL": 8,
    },
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
"""Bits of one element."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor's bytes lie."""

    name: str
    file: Path
    dtype: str
    """As safetensors spells it: F32, BF16, ..."""
    shape: tuple[int, ...]
    start: int
    """Offset of the first byte in the file."""
    size_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ShardStamp:
    """What a file looked like when its header was read: a change in either betrays a concurrent writer."""

    size_bytes: int
    mtime_ns: int


def stamp(file: Path) -> ShardStamp:
    """Return the size and modification time of a regular file.

    Raises:
        CorruptCheckpointError: there is none, or it is a directory, device or pipe.
    """
    try:
        status = file.stat()
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{file} is missing: fetch or copy the checkpoint again") from None
    except (OSError, ValueError) as error:
        raise CorruptCheckpointError(f"{file} cannot be read: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CorruptCheckpointError(f"{file} is not a regular file")
    return ShardStamp(status.st_size, status.st_mtime_ns)


def read_header(file: Path) -> list[TensorEntry]:
    """Return the tensors of one safetensors file in the order of their bytes.

    Raises:
        CorruptCheckpointError: the file is truncated, damaged or no safetensors file.
    """
    size = stamp(file).size_bytes
    try:
        with file.open("rb") as stream:
            raw_length = stream.read(8)
            length = struct.unpack("<Q", raw_length)[0] if len(raw_length) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CorruptCheckpointError(
                    f"{file} is truncated or no safetensors file: it is {size} bytes long and announces a header of "
                    f"{max(length, 0)}"
                )
            text = stream.read(length)
    except OSError as error:
        raise CorruptCheckpointError(f"{file} cannot be read: {error}") from None
    header = parse_json_object(text, str(file))
    header.pop("__metadata__", None)
    entries = [_entry(file, name, fields, 8 + length) for name, fields in header.items()]
    return _check_layout(file, sorted(entries, key=lambda entry: (entry.start, entry.size_bytes)), 8 + length, size)


def parse_json_object(text: bytes, origin: str) -> dict[str, Any]:
    """Parse a JSON object, refusing a key that is given twice.

    Raises:
        CorruptCheckpointError: it is no such thing.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise CorruptCheckpointError(f"{origin} names {_short(name)!r} twice")
            found[name] = value
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{origin} holds damaged JSON: {_short(error)}") from None
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{origin} holds a JSON {type(value).__name__}, expected an object")
    return value


def build_header(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """Return the length and header of a file that holds (name, dtype, shape, size in bytes) one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, size in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def _entry(file: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    where = f"{file}: tensor {_short(name)!r}"
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise CorruptCheckpointError(f"{where} has no dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CorruptCheckpointError(f"{where} has the unknown dtype {_short(dtype)}")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise CorruptCheckpointError(f"{where} has the shape {_short(shape)}, expected up to 16 whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CorruptCheckpointError(f"{where} has the data_offsets {_short(offsets)}, expected [begin, end]")
    size, bits = offsets[1] - offsets[0], math.prod(shape) * DTYPE_BITS[dtype]
    if size * 8 != bits:
        raise CorruptCheckpointError(
            f"{where} has {size} bytes, but {dtype} of shape {_short(shape)} takes {_short(bits / 8)}"
        )
    return TensorEntry(name, file, dtype, tuple(shape), data_start + offsets[0], size)


def _check_layout(file: Path, entries: list[TensorEntry], data_start: int, size: int) -> list[TensorEntry]:
    """The tensors must fill the file from the header to its last byte, without gap or overlap."""
    position = data_start
    for entry in entries:
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "follows a gap"
            raise CorruptCheckpointError(f"{file} is damaged: tensor {_short(entry.name)!r} {kind}")
        position += entry.size_bytes
    if position != size:
        what = "truncated" if size < position else "followed by bytes that belong to no tensor"
        raise CorruptCheckpointError(
            f"{file} is {what}: it is {_short(size)} bytes long, its header promises {_short(position)}: copy it again"
        )
    return entries


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value
    )


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def pread_exactly(descriptor: int, buffer: memoryview, offset: int, file: Path) -> None:
    """Fill `buffer` from `offset` on.

    Raises:
        CorruptCheckpointError: the file ends before, or the disk cannot read it.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise CorruptCheckpointError(f"{file} cannot be read: {error}") from None
        if count == 0:
            raise CorruptCheckpointError(f"{file} ended while it was being read: something is writing to it")
        done += count
