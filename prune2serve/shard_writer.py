"""Write safetensors files whose tensors come, mostly, from byte ranges of other safetensors files."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from prune2serve.errors import CorruptCheckpointError
from prune2serve.safetensors_header import DTYPE_BITS, TensorEntry, build_header, pread_exactly

if TYPE_CHECKING:
    import torch

COPY_BYTES = 32 << 20
"""One call copies at most this much: a bar can move, and the fallback's buffer stays small."""

NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Output:
    """One tensor to write: bytes copied from a file, or values computed when their turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    source: TensorEntry | Callable[[], torch.Tensor]


def pack(outputs: Iterable[Output], max_shard_size: int) -> list[list[Output]]:
    """Split tensors into files of at most `max_shard_size` bytes, in order; a larger tensor has a file of its own.

    Inside a file wide dtypes come first, so that each tensor is aligned to its element.
    """
    shards: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        if shards[-1] and filled + output.size_bytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += output.size_bytes
    return [sorted(shard, key=lambda output: -DTYPE_BITS[output.dtype]) for shard in shards]


def write_shard(file: Path, outputs: Sequence[Output], advance: Advance) -> None:
    """Write one safetensors file. `advance` is told the bytes done."""
    with file.open("wb") as target:
        target.write(build_header((o.name, o.dtype, o.shape, o.size_bytes) for o in outputs))
        target.flush()
        for source in _runs(outputs):
            if isinstance(source, TensorEntry):
                _copy_range(source, target.fileno(), advance)
            else:
                advance(_write_tensor(source(), target.fileno()))


def _runs(outputs: Sequence[Output]) -> Iterator[TensorEntry | Callable[[], torch.Tensor]]:
    """Join tensors that are neighbours in the same source file: a whole layer is one copy."""
    run: TensorEntry | None = None
    for output in outputs:
        source = output.source
        if (
            run
            and isinstance(source, TensorEntry)
            and source.file == run.file
            and source.start == run.start + run.size_bytes
        ):
            run = replace(run, size_bytes=run.size_bytes + source.size_bytes)
            continue
        if run:
            yield run
        run = source if isinstance(source, TensorEntry) else None
        if not isinstance(source, TensorEntry):
            yield source
    if run:
        yield run


def _copy_range(source: TensorEntry, target: int, advance: Advance) -> None:
    """Append a range of a file to the open file `target`, inside the kernel where it can."""
    with source.file.open("rb") as stream:
        done = _copy_in_kernel(stream.fileno(), target, source, advance)
        buffer = bytearray(min(COPY_BYTES, source.size_bytes - done))
        while done < source.size_bytes:
            piece = memoryview(buffer)[: source.size_bytes - done]
            pread_exactly(stream.fileno(), piece, source.start + done, source.file)
            _write_all(target, piece)
            done += len(piece)
            advance(len(piece))


def _copy_in_kernel(stream: int, target: int, source: TensorEntry, advance: Advance) -> int:
    """Copy with copy_file_range and return the bytes done: all of them, or what was done before it refused."""
    done = 0
    while done < source.size_bytes and hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(stream, target, min(COPY_BYTES, source.size_bytes - done), source.start + done)
        except OSError as error:
            if error.errno in NO_KERNEL_COPY:
                return done
            raise
        if count == 0:
            raise CorruptCheckpointError(f"{source.file} ended while it was being read: something is writing to it")
        done += count
        advance(count)
    return done


def _write_tensor(values: torch.Tensor, target: int) -> int:
    import torch

    raw = values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    _write_all(target, raw)
    return len(raw)


def _write_all(target: int, data: memoryview) -> None:
    while data:
        data = data[os.write(target, data) :]
