"""The boundary of an optimizer step over the flat buffers of ZeRO-1: one pass for the norm, one for the update, one wait.

    gradients [all ranks hold all]  --reduce-->  this rank's range  --norm, judge-->  scale, is_good   (on the device)
    range, masters, moments  --update-->  masters, moments, this rank's bf16 weights  --gather-->  weights of all ranks

Gradients are left as they are, sums over micro batches and ranks: what divides and clips them is one number, which the update
multiplies them by. It writes nothing if the step is bad, so nobody need know that before it runs; the host hears of it while
it runs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from based_megatron.kernels.square_sum import square_sum, stretches
from based_megatron.parallel.gradient_sums import GradientSum
from based_megatron.parallel.partitions import Judged, PartitionedOptimizer, Piece

CLIP_EPS = 1e-6
"""Added to the norm that clipping divides by, as torch's clip_grad_norm_ and DeepSpeed do."""


@dataclass(frozen=True)
class FlatGroup:
    """The flat buffers of one group of parameters, padded to equal ranges of all ranks."""

    weights: Tensor
    """The bf16 weights of the model are views of it."""
    gradients: Tensor
    """fp32; the sums of gradients are views of it."""
    first: int
    numel: int
    """This rank's range, whose masters and optimizer state it holds."""

    @property
    def own_weights(self) -> Tensor:
        """This rank's range of the weights."""
        return self.weights.narrow(0, self.first, self.numel)

    @property
    def own_gradients(self) -> Tensor:
        """This rank's range of the gradients: all that is right after they are reduced."""
        return self.gradients.narrow(0, self.first, self.numel)


class FlatStep:
    """Reduces gradients, judges them, updates and gathers, for an optimizer that was given its partitions."""

    def __init__(
        self,
        groups: Sequence[FlatGroup],
        sums: Sequence[GradientSum],
        optimizer: PartitionedOptimizer,
        clip_norm: float,
        data: dist.ProcessGroup,
        model: dist.ProcessGroup,
    ) -> None:
        """sums: of all parameters; clip_norm: 0 does not clip; data: ranks that share the buffers; model: those of its parts."""
        self.groups, self._sums, self._optimizer, self._clip_norm = groups, sums, optimizer, clip_norm
        self._data, self._model = data, model
        device = groups[0].gradients.device
        self._kernels = "triton" if device.type == "cuda" else "reference"
        self._factor = torch.ones((), dtype=torch.float64, device=device) / dist.get_world_size(self._data)
        """What the sums over micro batches and ranks are multiplied by, before clipping."""
        self.norm = torch.zeros((), dtype=torch.float64, device=device)
        """The norm of the gradient of the last step before clipping, on the device; infinite if it was not finite."""
        self._counted = [
            stretches(((p.offset, p.offset + p.numel) for p in partition.pieces if p.owned), device)
            for partition in optimizer.partitions
        ]

    def finish_sums(self, scale: Tensor) -> None:
        """Take what the sums hold as the gradient of this step, to be multiplied by a scale and averaged over ranks."""
        for total in self._sums:
            total.complete()
        self._factor = scale.double() / dist.get_world_size(self._data)

    @torch.no_grad()
    def __call__(
        self,
        on_gradients: Callable[[], None] | None = None,
        judge: Callable[[Tensor], Tensor | None] = lambda norm: None,
        on_skip: Callable[[], None] | None = None,
    ) -> bool:
        """See ZeroEngine.step."""
        for total in self._sums:
            total.complete()
        self._reduce()
        if on_gradients is not None:
            on_gradients()
        applied = self._optimizer.update(
            [group.own_gradients for group in self.groups],
            [group.own_weights for group in self.groups],
            self._judged(judge),
        )
        if applied:
            self._gather()
        elif on_skip is not None:
            on_skip()
        for total in self._sums:
            total.begin()
        return applied

    def gradients(self) -> Iterator[tuple[Piece, Tensor]]:
        """The reduced gradient of each piece of this rank's partitions, flat, before clipping; between reduction and next step."""
        for group, partition in zip(self.groups, self._optimizer.partitions, strict=True):
            for piece in partition.pieces:
                yield piece, piece.of(group.own_gradients) * self._factor.float()

    def _judged(self, judge: Callable[[Tensor], Tensor | None]) -> Judged:
        """What the norm makes of the gradient: the number it is multiplied by, and whether it is good."""
        norm = self._global_norm()
        is_good = norm.isfinite()
        self.norm = torch.where(is_good, norm, torch.inf)
        verdict = judge(self.norm)
        if verdict is not None:
            is_good = is_good & ~verdict
        scale = self._factor
        if self._clip_norm:
            scale = scale * (self._clip_norm / (norm + CLIP_EPS)).clamp(max=1)
        return Judged(scale.float(), is_good)

    def _global_norm(self) -> Tensor:
        squares = [
            square_sum(group.own_gradients, counted, backend=self._kernels)
            for group, counted in zip(self.groups, self._counted, strict=True)
        ]
        total = torch.stack(squares).sum()
        for ranks in (self._data, self._model):
            if dist.get_world_size(ranks) > 1:
                dist.all_reduce(total, group=ranks)
        return total.sqrt() * self._factor.abs()

    def _reduce(self) -> None:
        """Sum the gradients over the ranks that share them; right in this rank's range."""
        if dist.get_world_size(self._data) > 1:
            for group in self.groups:
                dist.all_reduce(group.gradients, group=self._data)

    def _gather(self) -> None:
        """Bring every rank's new weights to all others."""
        if dist.get_world_size(self._data) > 1:
            for group in self.groups:
                dist.all_gather_into_tensor(group.weights, group.own_weights, group=self._data)
