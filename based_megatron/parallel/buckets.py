"""The communication of ZeRO-1 in buckets, during computation: gradients in the last backward, weights in the next forward.

A bucket is some parameters, one after another in two flat tensors, of their gradients and of their weights. Every data x context
rank owns an equal range of both:

    last backward    ... layer 3 | layer 2 | layer 1 |       a bucket is reduced to its owners once its gradients are complete
    next forward             | layer 1 | layer 2 | ...       a layer waits for the weights that it reads, sent by their owners

All ranks reduce buckets in one order, that of the backward pass, whatever the order in which their gradients come.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from based_megatron.parallel.gradient_sums import GradientSum
from based_megatron.parallel.topology import Axis

EMBEDDING = "embedding.weight"
Readers = Sequence[tuple[nn.Module, Sequence[nn.Parameter]]]
"""Modules, and the parameters that nobody reads before their forward."""


@dataclass(frozen=True)
class Bucket:
    """Parameters that travel together: a group of ZeRO, with its flat tensors, padded to equal ranges of all ranks."""

    parameters: tuple[nn.Parameter, ...]
    sums: tuple[GradientSum, ...]
    """The gradient of each, as a view of the flat tensor."""
    gradients: Tensor
    """fp32 and flat; after the reduction only this rank's range counts."""
    weights: Tensor
    """Flat; the parameters are views of it."""
    axis: Axis
    """The ranks that share the bucket."""

    @property
    def own_gradients(self) -> Tensor:
        """This rank's range of the gradients."""
        return self._own(self.gradients)

    @property
    def own_weights(self) -> Tensor:
        """This rank's range of the weights, whose masters and optimizer state it holds."""
        return self._own(self.weights)

    def _own(self, flat: Tensor) -> Tensor:
        share = flat.numel() // self.axis.size
        return flat.narrow(0, self.axis.rank * share, share)


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
    """Sums the gradients of each step over the ranks; each rank gets its own ranges."""

    def __init__(self, buckets: Sequence[Bucket], overlap: bool) -> None:
        """buckets: in the order of the forward pass. overlap: begin inside the last backward, not after it."""
        self._buckets = tuple(reversed(buckets))
        self._works: list[dist.Work] = []
        self._next = 0
        """Buckets whose reduction has begun."""
        self._missing: list[list[int]] = []
        """Backward passes that each parameter of each bucket is still to take part in; empty if nobody knows."""
        hooked = [(i, bucket) for i, bucket in enumerate(self._buckets) if overlap and bucket.axis.size > 1]
        # A hook on a node that nobody holds is lost with it.
        self._nodes = [
            self._hook(parameter, number, place)
            for number, bucket in hooked
            for place, parameter in enumerate(bucket.parameters)
        ]

    def expect(self, passes: int) -> None:
        """Begin a step of so many backward passes over every parameter. Sums that no update has used are dropped."""
        if self._next:
            self.end_step()
        self._missing = [[passes] * len(bucket.parameters) for bucket in self._buckets]

    def end_backward(self) -> None:
        """Reduce what no backward pass has completed."""
        while self._next < len(self._buckets):
            self._reduce_next()

    def wait(self) -> None:
        """Wait for all reductions, on the device if it is a GPU."""
        self.end_backward()
        while self._works:
            self._works.pop(0).wait()

    def end_step(self) -> None:
        """The sums are used up: the next gradients are of another step."""
        self.wait()
        for bucket in self._buckets:
            for total in bucket.sums:
                total.begin()
        self._next, self._missing = 0, []

    def _hook(self, parameter: nn.Parameter, number: int, place: int) -> Any:
        # The hooks of the parameter, which may move its gradient to the flat tensor, come before those of the node. The node runs
        # even if the gradient went there by another way, and autograd has none to hand over.
        node = torch.autograd.graph.get_gradient_edge(parameter).node
        node.register_hook(lambda *_: self._passed(number, place))
        return node

    def _passed(self, number: int, place: int) -> None:
        if not self._missing:
            return
        self._missing[number][place] -= 1
        assert self._missing[number][place] >= 0, "a gradient came after its bucket was complete"
        while self._next < len(self._buckets) and not any(self._missing[self._next]):
            self._reduce_next()

    def _reduce_next(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        for total in bucket.sums:
            total.complete()
        if bucket.axis.size > 1:
            group = bucket.axis.group
            work = dist.reduce_scatter_tensor(bucket.own_gradients, bucket.gradients, group=group, async_op=True)
            self._works.append(work)


class Gathers:
    """Sends the weights that each rank owns to all; modules wait for those that they read."""

    def __init__(self, buckets: Sequence[Bucket], overlap: bool, readers: Readers) -> None:
        """buckets: in the order of the forward pass. overlap: let `readers` wait, which then name every parameter."""
        self._buckets, self._overlap = tuple(buckets), overlap
        self._works: dict[int, dist.Work] = {}
        number_of = {parameter: number for number, bucket in enumerate(buckets) for parameter in bucket.parameters}
        for module, parameters in readers if overlap else ():
            numbers = sorted({number_of[parameter] for parameter in parameters})
            module.register_forward_pre_hook(lambda *_, numbers=numbers: self._wait(numbers))
        assert not overlap or number_of.keys() == {parameter for _, parameters in readers for parameter in parameters}

    @torch.no_grad()
    def begin(self) -> None:
        """Send the weights that this rank owns, and receive all others."""
        for number, bucket in enumerate(self._buckets):
            if bucket.axis.size > 1:
                group = bucket.axis.group
                work = dist.all_gather_into_tensor(bucket.weights, bucket.own_weights, group=group, async_op=True)
                self._works[number] = work
        if not self._overlap:
            self.wait()

    def wait(self) -> None:
        """Wait for all weights, on the device if it is a GPU."""
        self._wait(list(self._works))

    @torch.no_grad()
    def _wait(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number in self._works:
                self._works.pop(number).wait()
