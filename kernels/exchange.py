"""The exchange between slices of a sequence, as operations see it; `based_megatron.parallel.sequence` implements it.

Operations over slices start what they send as soon as they have it, and wait as late as they can, forward and backward.
Legend: B batch, T or L tokens of the slice, N rows of a halo, t boundary rows at the end of the slice, S = N + T keys, H heads, V head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Value_co = TypeVar("Value_co", covariant=True)


class Pending(Protocol[Value_co]):
    """A value under way."""

    def wait(self) -> Value_co:
        """Return the value, once it is there."""


class StateExchange(Protocol):
    """States that cross from slice to slice."""

    def start_prefix(self, moments: Callable[[], Tensor]) -> Pending[Tensor | None]:
        """Begin to find the state before this slice, from the moments of every slice. None: nothing before matters."""

    def start_suffix(self, moments: Callable[[], Tensor]) -> Pending[Tensor | None]:
        """Begin to find the adjoint state after this slice, from the adjoint moments of every slice."""


class HaloReturn(Protocol):
    """The way back of gradients of rows that came from other slices."""

    def start_return(self, dhalo: Tensor) -> Pending[Tensor]:
        """Begin to send the gradient of the halo [B, N, ...] home; what comes is that of the own boundary rows, [B, t, ...]."""


@dataclass(frozen=True)
class Halo:
    """Rows before a slice, on their way, and the way back of their gradients."""

    arriving: Pending[Tensor]
    """[B, N, ...] without gradients; N may be 0."""
    back: HaloReturn


class ReceivedHalo(Function):
    """The halo [B, N, ...] as a part of the graph, from (rows of this slice [B, L, ...], a halo of such rows).

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


def joined_keys(k_BTHV: Tensor, v_BTHV: Tensor, halo: Halo) -> tuple[Tensor, Tensor]:
    """Keys and values [B, N + T, H, V] with a halo [B, N, 2, H, V] copied in front."""
    kv_BT2HV = torch.stack([k_BTHV, v_BTHV], dim=2)
    k_BSHV, v_BSHV = torch.cat([ReceivedHalo.apply(kv_BT2HV, halo), kv_BT2HV], dim=1).unbind(2)
    return k_BSHV, v_BSHV
