"""One KV buffer for every sequence: a row each, shared between the session's inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CacheShape:
    """What the exported graph asks of the cache."""

    names: tuple[str, ...]
    """`LAYER.key` and `LAYER.value`, in the graph's order."""
    num_heads: tuple[int, ...]
    """Key-value heads, one number a name."""
    head_sizes: tuple[int, ...]
    element_bytes: int

    @property
    def bytes_per_token(self) -> int:
        elements = sum(heads * size for heads, size in zip(self.num_heads, self.head_sizes, strict=True))
        return elements * self.element_bytes


class KVCache:
    """Tensors [num_rows, heads, max_length, head_size], one for each name.

    On the CPU the pages of a row take memory only once they are written.
    """

    def __init__(
        self, shape: CacheShape, num_rows: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        import torch

        self.num_rows, self.max_length, self._device = num_rows, max_length, device
        # Masked positions are not read, but a GPU kernel may multiply them by zero: no NaN may be there.
        make = torch.empty if device.type == "cpu" else torch.zeros
        self.tensors = {
            name: make((num_rows, heads, max_length, size), dtype=dtype, device=device)
            for name, heads, size in zip(shape.names, shape.num_heads, shape.head_sizes, strict=True)
        }

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a row over another row."""
        import torch

        for tensor in self.tensors.values():
            tensor[target, :, :length].copy_(tensor[source, :, :length])
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the session runs on a stream of its own
