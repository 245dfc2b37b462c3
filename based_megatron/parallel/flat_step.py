"""The boundary of an optimizer step over the flat buffers of ZeRO-1: one pass for the norm, one for the update, one wait.

    gradients [all ranks hold all]  --reduce-->  this rank's range  --norm, judge-->  scale, is_good   (on the device)
    range, masters, moments  --update-->  masters, moments, this rank's bf16 weights  --gather-->  weights of all ranks

Gradients are left as they are, sums over micro batches and ranks: what divides and clips them is one number, which the update
multiplies them by. It writes nothing if the step is bad, so nobody need know that before it runs; the host hears of it while
it runs.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from based_megatron.kernels.backend import resolve_backend
from based_megatron.kernels.square_sum import square_sum, stretches
from based_megatron.parallel.buckets import Bucket, Gathers, Reductions
from based_megatron.parallel.partitions import Judged, PartitionedOptimizer, Piece

CLIP_EPS = 1e-6
"""Added to the norm that clipping divides by, as torch's clip_grad_norm_ and DeepSpeed do."""


class FlatStep:
    """Reduces gradients, judges them, updates and gathers, for an optimizer that was given its partitions."""

    def __init__(
        self,
        buckets: Sequence[Bucket],
        optimizer: PartitionedOptimizer,
        clip_norm: float,
        reductions: Reductions,
        gathers: Gathers,
        model: dist.ProcessGroup,
    ) -> None:
        """buckets: in the order of the partitions; clip_norm: 0 does not clip; model: ranks that hold the parts of the model."""
        self._buckets, self._optimizer, self._clip_norm = buckets, optimizer, clip_norm
        self._reductions, self._gathers = reductions, gathers
        self._data, self._model = buckets[0].axis.group, model
        device = buckets[0].gradients.device
        self._backend = resolve_backend("auto", device)
        self._factor = torch.ones((), dtype=torch.float64, device=device) / dist.get_world_size(self._data)
        """What the sums over micro batches and ranks are multiplied by, before clipping."""
        self.norm = torch.zeros((), dtype=torch.float64, device=device)
        """The norm of the gradient of the last step before clipping, on the device; infinite if it was not finite."""
        self._counted = [
            stretches(((p.offset, p.offset + p.numel) for p in partition.pieces if p.owned), device)
            for partition in optimizer.partitions
        ]

    def scale_by(self, scale: Tensor) -> None:
        """Multiply the gradient of this step by a scale, and average it over ranks."""
        self._factor = scale.double() / dist.get_world_size(self._data)

    @torch.no_grad()
    def __call__(
        self,
        on_gradients: Callable[[], None] | None = None,
        judge: Callable[[Tensor], Tensor | None] = lambda norm: None,
        on_skip: Callable[[], None] | None = None,
    ) -> bool:
        """See ZeroEngine.step."""
        self._reductions.wait()
        self._gathers.wait()
        if on_gradients is not None:
            on_gradients()
        applied = self._optimizer.update(
            [bucket.own_gradients for bucket in self._buckets],
            [bucket.own_weights for bucket in self._buckets],
            self._judged(judge),
        )
        if applied:
            self._gathers.begin()
        elif on_skip is not None:
            on_skip()
        self._reductions.end_step()
        return applied

    def gradients(self) -> Iterator[tuple[Piece, Tensor]]:
        """The reduced gradient of each piece of this rank's partitions, flat, before clipping; from the reduction to the update."""
        for bucket, partition in zip(self._buckets, self._optimizer.partitions, strict=True):
            for piece in partition.pieces:
                yield piece, piece.of(bucket.own_gradients) * self._factor.float()

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
            square_sum(bucket.own_gradients, counted, backend=self._backend)
            for bucket, counted in zip(self._buckets, self._counted, strict=True)
        ]
        total = torch.stack(squares).sum()
        for ranks in (self._data, self._model):
            if dist.get_world_size(ranks) > 1:
                dist.all_reduce(total, group=ranks)
        return total.sqrt() * self._factor.abs()
