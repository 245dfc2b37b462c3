"""What operations ask of the exchange between slices of a sequence. `based_megatron.parallel.sequence` has such things.

Operations over slices start what they send as soon as they have it, and wait as late as they can, forward and backward.
Legend: B batch, L tokens of the slice, N rows of a halo, t rows at the end of the slice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Value_co = TypeVar("Value_co", covariant=True)


class Pending(Protocol[Value_co]):
    """Something under way."""

    def wait(self) -> Value_co:
        """The value, once it is there."""


class StateExchange(Protocol):
    """States that cross from slice to slice."""

    def start_prefix(self, moments: Callable[[], Tensor]) -> Pending[Tensor | None]:
        """Begin to find the state before this slice, from the moments of every slice. None: nothing before matters."""

    def start_suffix(self, moments: Callable[[], Tensor]) -> Pending[Tensor | None]:
        """Begin to find the adjoint state after this slice, from the adjoint moments of every slice."""


class HaloReturn(Protocol):
    """The way back of gradients of rows that came from other slices."""

    def start_return(self, dhalo: Tensor) -> Pending[Tensor]:
        """Begin to send the gradient of the halo [B, N, ...] home; what comes is that of the last t own rows, [B, t, ...]."""


@dataclass(frozen=True)
class Halo:
    """Rows before a slice, on their way, and the way back of their gradients."""

    arriving: Pending[Tensor]
    """[B, N, ...] without gradients; N may be 0."""
    back: HaloReturn


class ReceivedHalo(Function):
    """(rows of this slice [B, L, ...], a halo of such rows) to the halo [B, N, ...] as a part of the graph.

    The plain form, for references: its backward waits at once.
    """

    @staticmethod
    def forward(ctx: Any, x_BL: Tensor, halo: Halo) -> Tensor:
        ctx.back, ctx.shape = halo.back, x_BL.shape
        return halo.arriving.wait().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhalo_BN: Tensor) -> tuple[Tensor, None]:
        late_Bt = ctx.back.start_return(dhalo_BN).wait()
        dx_BL = dhalo_BN.new_zeros(ctx.shape)
        dx_BL[:, ctx.shape[1] - late_Bt.shape[1] :] = late_Bt
        return dx_BL, None
