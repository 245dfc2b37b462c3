"""Flat pieces of sharded parameters, and the rectangles of the unsharded tensor that they cover.

ZeRO cuts the row-major buffer of a rank's parameters into equal flat ranges, wherever the cut falls. A flat range of a
matrix is the end of one row, some whole rows, and the start of another: at most three rectangles. Tensor parallelism
keeps some of these rows (or columns), padding excluded, and moves them to another place of the unsharded tensor.

      local parameter                     unsharded parameter
      . . . x x x     head                whatever ShardSpec.regions() says
      x x x x x x     whole rows    -->   about these rows and columns
      x x . . . .     tail
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from based_megatron.parallel.sharding import ShardSpec

Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Rectangle:
    """A box of the unsharded tensor, as a strided view of a fragment's flat tensors."""

    global_offset: tuple[int, ...]
    """First corner in the unsharded tensor."""
    shape: tuple[int, ...]
    """Size of the box."""
    flat_offset: int
    """Element of the fragment that is the first corner."""
    strides: tuple[int, ...]
    """Strides of the box in the fragment, in elements."""

    def view(self, flat: Tensor) -> Tensor:
        """The box inside a fragment's flat tensor; writing to it writes the fragment."""
        return torch.as_strided(flat, self.shape, self.strides, flat.storage_offset() + self.flat_offset)


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a rank's row-major parameter, with the live tensors that hold them."""

    spec: ShardSpec
    start: int
    numel: int
    tensors: dict[str, Tensor]
    """Flat views of `numel` elements by kind: model (master weights) and what the optimizer keeps, all fp32; or carried."""
    owned: bool = True
    """False for a copy that is loaded but that another rank writes."""

    def rectangles(self) -> list[Rectangle]:
        """Rectangles of the unsharded tensor that this fragment holds, padding left out: at most three per part of a matrix."""
        return rectangles(self.spec, self.start, self.numel)


def rectangles(spec: ShardSpec, start: int, numel: int) -> list[Rectangle]:
    """Cut the flat range [start, start + numel) of the local parameter into rectangles of the unsharded one."""
    local_shape = spec.local_shape
    strides = tuple(prod(local_shape[dim + 1 :]) for dim in range(len(local_shape)))
    found = []
    for offset, size in _boxes(local_shape, start, start + numel):
        for region in spec.regions():
            low = tuple(map(max, offset, region.local_offset))
            high = tuple(
                min(o + s, ro + rs)
                for o, s, ro, rs in zip(offset, size, region.local_offset, region.shape, strict=True)
            )
            if all(a < b for a, b in zip(low, high, strict=True)):
                to_global = (a + g - r for a, g, r in zip(low, region.global_offset, region.local_offset, strict=True))
                found.append(
                    Rectangle(
                        global_offset=tuple(to_global),
                        shape=tuple(b - a for a, b in zip(low, high, strict=True)),
                        flat_offset=sum(a * s for a, s in zip(low, strides, strict=True)) - start,
                        strides=strides,
                    )
                )
    return found


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """(offset, size) of the boxes that make up the row-major range [start, stop), in order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield (start,) * len(shape), (stop - start,) * len(shape)
        return
    row_numel = prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row_numel), divmod(stop, row_numel)
    if first == last:
        yield from _in_row(first, _boxes(shape[1:], head, tail))
        return
    if head:
        yield from _in_row(first, _boxes(shape[1:], head, row_numel))
        first += 1
    if first < last:
        yield (first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])
    yield from _in_row(last, _boxes(shape[1:], 0, tail))


def _in_row(row: int, boxes: Iterator[Box]) -> Iterator[Box]:
    return (((row, *offset), (1, *size)) for offset, size in boxes)
