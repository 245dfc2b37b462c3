"""The flat fp32 partitions of ZeRO, and what it asks of an optimizer that updates them.

ZeRO lays the parameters of a group one after another, row-major, and cuts this buffer into equal ranges, one for each data x
context rank, wherever the cuts fall. An optimizer therefore sees one flat tensor a group, not parameters:

    partition of this rank      | end of fc1 | fc2 | start of qkv |
    pieces                        offset 0     ...
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from based_megatron.parallel.sharding import ShardSpec
from based_megatron.parallel.transfer import HostCopy


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of this rank's row-major parameter, as they lie in a partition."""

    spec: ShardSpec
    start: int
    numel: int
    offset: int
    """First element in the partition."""
    owned: bool
    """False for a copy of what another tensor parallel rank or pipeline stage holds."""

    def of(self, flat: Tensor) -> Tensor:
        """The piece as a view of a tensor of the partition's size."""
        return flat.narrow(0, self.offset, self.numel)


@dataclass(frozen=True)
class Partition:
    """One rank's share of a group of parameters."""

    master: Tensor
    """The fp32 weights, flat; this very tensor is what the optimizer updates and keys its state by."""
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Judged:
    """What is known of a gradient before the update: scalars on the device, for which nobody has waited yet."""

    scale: Tensor
    """What the gradient is to be multiplied by, fp32."""
    is_good: Tensor
    """Whether the step counts, a bool."""


class PartitionedOptimizer(ABC):
    """An optimizer under ZeRO, with the state that a checkpoint keeps of it. One subclass is one file of train/optimizer/."""

    name: ClassVar[str]
    """The value of optimizer.name, saved in every checkpoint: another optimizer refuses its state."""

    def __init__(self, client: torch.optim.Optimizer) -> None:
        self.client = client
        """The torch optimizer that ZeRO steps. Its groups hold parameters at first, and from then on the partitions."""
        self.partitions: tuple[Partition, ...] = ()

    def place(self, partitions: Sequence[Partition]) -> None:
        """Take the partitions of this rank; called once, before the first step, by all ranks."""
        self.partitions = tuple(partitions)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of the client, with the learning rate of the next step."""
        return self.client.param_groups

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor], weights: Sequence[Tensor], judged: Judged) -> bool:
        """Step all partitions by their flat gradients, unless the step is bad, and round the masters to the weights.

        Returns whether it has. Gradients may be overwritten if it has. This form waits for the verdict; a subclass that leaves
        it to the device waits while the update runs.
        """
        if not HostCopy(judged.is_good).wait():
            return False
        for partition, gradient in zip(self.partitions, gradients, strict=True):
            partition.master.grad = gradient.mul_(judged.scale)
        self.client.step()
        for partition, weight in zip(self.partitions, weights, strict=True):
            weight.copy_(partition.master)
        return True

    @abstractmethod
    def state(self, master: Tensor) -> dict[str, Tensor]:
        """State tensors of a partition by kind: fp32, flat, one element for each of the master's.

        Kinds are names in checkpoints. A tensor that the first step would make is made here if there is none yet.
        """

    @abstractmethod
    def scalars(self) -> dict[str, int]:
        """State that is one number for all elements, such as a step count."""

    @abstractmethod
    def load_scalars(self, values: Mapping[str, int]) -> None:
        """Set what `scalars` returned when the checkpoint was saved."""
