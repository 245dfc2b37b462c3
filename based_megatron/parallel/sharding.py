"""The place of one rank's piece of a parameter inside the unsharded parameter.

The unsharded tensors are those of the released checkpoints, fused projections included. A fused projection is a stack of
`parts` along the partition dim (value | gate, q | k | v); each part is cut over the tensor parallel ranks on its own, so that
rank r holds [value_r | gate_r]. A part that does not divide is padded at its end: padding exists in memory only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

VOCAB_MULTIPLE = 64
"""A rank's rows of a shared vocabulary are rounded up to a multiple of it: GPUs multiply by odd numbers of columns at half the rate."""


def rows_of_rank(rows: int, size: int, multiple: int = 1) -> int:
    """Rows that each of `size` ranks has memory for; only the last ones may be padding.

    Rounded up to the multiple if the rows are cut at all, and each rank keeps some.
    """
    fewest = -(-rows // size)
    rounded = -(-fewest // multiple) * multiple
    return rounded if size > 1 and rounded * (size - 1) < rows else fewest


@dataclass(frozen=True)
class Region:
    """A box that a shard and the unsharded tensor have in common."""

    local_offset: tuple[int, ...]
    global_offset: tuple[int, ...]
    shape: tuple[int, ...]

    def of_local(self, tensor: Tensor) -> Tensor:
        """The box as a view of the shard."""
        return tensor[tuple(slice(o, o + n) for o, n in zip(self.local_offset, self.shape, strict=True))]

    def of_global(self, tensor: Tensor) -> Tensor:
        """The box as a view of the unsharded tensor."""
        return tensor[tuple(slice(o, o + n) for o, n in zip(self.global_offset, self.shape, strict=True))]


@dataclass(frozen=True)
class ShardSpec:
    """One rank's piece of the parameter `name`."""

    name: str
    """Global name, the same under every layout."""
    shape: tuple[int, ...]
    """Shape of the unsharded tensor."""
    partition_dim: int | None = None
    """Dim that is cut over the tensor parallel ranks; None if every rank holds the whole tensor."""
    parts: tuple[int, ...] = ()
    """Sizes along partition_dim of the fused parts."""
    rank: int = 0
    """Tensor parallel rank."""
    size: int = 1
    """Tensor parallel size."""
    multiple: int = 1
    """What a rank's rows of each part are rounded up to (`rows_of_rank`)."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's tensor, padding included."""
        if self.partition_dim is None:
            return self.shape
        rows = sum(rows_of_rank(part, self.size, self.multiple) for part in self.parts)
        return (*self.shape[: self.partition_dim], rows, *self.shape[self.partition_dim + 1 :])

    def regions(self) -> list[Region]:
        """The boxes that this rank holds, in order of their local offset."""
        dim = self.partition_dim
        if dim is None:
            return [Region((0,) * len(self.shape), (0,) * len(self.shape), self.shape)]
        regions, local_start, global_start = [], 0, 0
        for part in self.parts:
            rows = rows_of_rank(part, self.size, self.multiple)
            first, last = min(self.rank * rows, part), min((self.rank + 1) * rows, part)
            if last > first:
                regions.append(
                    Region(
                        local_offset=_at(dim, local_start, len(self.shape)),
                        global_offset=_at(dim, global_start + first, len(self.shape)),
                        shape=(*self.shape[:dim], last - first, *self.shape[dim + 1 :]),
                    )
                )
            local_start, global_start = local_start + rows, global_start + part
        return regions

    def cut(self, full: Tensor) -> Tensor:
        """The tensor of this rank, cut out of the unsharded one; padding is zero."""
        local = torch.zeros(self.local_shape, dtype=full.dtype, device=full.device)
        for region in self.regions():
            region.of_local(local).copy_(region.of_global(full))
        return local


def _at(dim: int, start: int, ndim: int) -> tuple[int, ...]:
    return tuple(start if d == dim else 0 for d in range(ndim))
