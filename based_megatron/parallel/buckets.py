"""The communication of ZeRO-1 in buckets, beside computation: gradients in the last backward, weights in the next forward.

A bucket is some parameters, one after another in two flat tensors, of their gradients and of their weights. Every data x context
rank owns an equal range of both:

    last backward    ... layer 3 | layer 2 | layer 1 |       a bucket is reduced to its owners once its gradients are complete
    next forward             | layer 1 | layer 2 | ...       a layer waits for the weights that it reads, sent by their owners

All ranks reduce buckets in one order, that of the backward pass, whatever the order in which their gradients come.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from based_megatron.parallel.topology import Axis

EMBEDDING = "embedding.weight"


@dataclass(frozen=True)
class Bucket:
    """Parameters that travel together."""

    parameters: tuple[nn.Parameter, ...]
    gradients: Tensor
    """Sums of this rank's micro batches, flat, a multiple of the ranks long; after the reduction only the owned range counts."""
    weights: Tensor
    """The weights, flat, which the parameters are views of."""


def cut_into_buckets(sizes: Sequence[tuple[str, int]], elements: int) -> list[range]:
    """Places of parameters that share a bucket: runs of up to so many elements, or of one parameter.

    sizes: name and elements of each parameter. The embedding is always alone: the first and the last pipeline stage, which sum
    its gradients, then cut it alike.
    """
    ends: list[int] = []
    room, last = 0, ""
    for place, (name, numel) in enumerate(sizes):
        if numel > room or EMBEDDING in (name, last):
            ends.append(place)
            room = elements
        room, last = room - numel, name
    return [range(start, end) for start, end in pairwise([*ends, len(sizes)])]


class Reductions:
    """Sums the gradients of a step over the ranks; each rank gets the ranges that it owns."""

    def __init__(self, buckets: Sequence[Bucket], axis: Axis, overlap: bool) -> None:
        """buckets: in the order of the forward pass. overlap: begin inside the last backward, not after it."""
        self._buckets, self._axis = tuple(reversed(buckets)), axis
        self._works: list[dist.Work] = []
        self._next = len(self._buckets)
        self._missing = [[0] * len(bucket.parameters) for bucket in self._buckets]
        """Backward passes that each parameter of each bucket is still to take part in."""
        # A hook on a node that nobody holds is lost with it.
        self._nodes = [
            self._hook(parameter, number, place)
            for number, bucket in enumerate(self._buckets if overlap and axis.size > 1 else ())
            for place, parameter in enumerate(bucket.parameters)
        ]

    def begin(self, passes: int) -> None:
        """Begin a step of so many backward passes over every parameter."""
        assert not self._works, "the last step's reductions were not waited for"
        self._next = 0
        self._missing = [[passes] * len(bucket.parameters) for bucket in self._buckets]

    def end_backward(self) -> None:
        """Reduce what no backward pass has completed: all of it without overlap, else the gradients of unused parameters."""
        while self._next < len(self._buckets):
            self._reduce_next()

    def wait(self) -> None:
        """Wait for all reductions, on the device if it is a GPU."""
        while self._works:
            self._works.pop(0).wait()

    def _hook(self, parameter: nn.Parameter, number: int, place: int) -> Any:
        # The hooks of the parameter, which may move its gradient to the flat tensor, come before those of the node. The node runs
        # even if the gradient went there by another way, and autograd has none to hand over.
        node = torch.autograd.graph.get_gradient_edge(parameter).node
        node.register_hook(lambda *_: self._passed(number, place))
        return node

    def _passed(self, number: int, place: int) -> None:
        missing = self._missing[number]
        missing[place] -= 1
        assert missing[place] >= 0, "a gradient came after its bucket was complete"
        while self._next < len(self._buckets) and not any(self._missing[self._next]):
            self._reduce_next()

    def _reduce_next(self) -> None:
        gradients = self._buckets[self._next].gradients
        self._next += 1
        if self._axis.size > 1:
            own = owned_range(gradients, self._axis)
            work = dist.reduce_scatter_tensor(own, gradients, group=self._axis.group, async_op=True)
            self._works.append(work)


class Gathers:
    """Sends the weights that each rank owns to all; modules wait for those that they read."""

    def __init__(
        self,
        buckets: Sequence[Bucket],
        axis: Axis,
        overlap: bool,
        readers: Iterable[tuple[nn.Module, Sequence[nn.Parameter]]],
    ) -> None:
        """buckets: in the order of the forward pass. readers: modules, and the parameters that nobody reads before their forward.

        overlap: wait there, not after the update.
        """
        self._buckets, self._axis, self._overlap = tuple(buckets), axis, overlap
        self._works: dict[int, dist.Work] = {}
        number_of = {id(parameter): number for number, bucket in enumerate(buckets) for parameter in bucket.parameters}
        for module, parameters in readers:
            numbers = sorted({number_of[id(parameter)] for parameter in parameters})
            module.register_forward_pre_hook(lambda *_, numbers=numbers: self._wait(numbers))

    def begin(self) -> None:
        """Send the weights that this rank owns, and receive all others."""
        if self._axis.size == 1:
            return
        for number, bucket in enumerate(self._buckets):
            own = owned_range(bucket.weights, self._axis)
            work = dist.all_gather_into_tensor(bucket.weights, own, group=self._axis.group, async_op=True)
            self._works[number] = work
        if not self._overlap:
            self.wait()

    def wait(self) -> None:
        """Wait for all weights, on the device if it is a GPU."""
        self._wait(list(self._works))

    def _wait(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number in self._works:
                self._works.pop(number).wait()


def owned_range(flat: Tensor, axis: Axis) -> Tensor:
    """This rank's range of a flat tensor."""
    share = flat.numel() // axis.size
    return flat.narrow(0, axis.rank * share, share)
