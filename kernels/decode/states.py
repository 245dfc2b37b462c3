"""States of decoding: what each mixer keeps of the tokens so far, of constant size, updated in place.

Legend: B batch, T tokens, H heads, F feature dim, R rows of a packed state, V value head dim, E = V + 1, S keys (of a buffer, or given),
W window_left, D channels, K taps, h = K - 1.

Buffers keep their addresses, so that a CUDA graph of a step can be replayed; positions are tensors on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from based_megatron.kernels.packing import PackedLayout, packed_rows

BUFFERED_KEYS = 15
"""Keys that the buffer of a Taylor state holds between steps: with the one that finds it full, 16 are absorbed at a time."""


def rows_by_shift(feature_dim: int, device: torch.device, square: bool = False) -> Tensor:
    """[R] int64, the packed row (see `PackedLayout`) that each row of a decoding state is.

    First come x_a, then x_a x_(a + shift mod F) for shift = 0, 1, .., F / 2, every pair once, then the 1: both factors of a row
    are whole numbers away, where the packed order takes a square root to find them. Squares alone have the pairs only.
    """
    F, R = feature_dim, packed_rows(feature_dim, square)
    row = torch.arange(R, device=device)
    first = row % F
    second = (first + row // F - (0 if square else 1)) % F
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    pair = low * F - low * (low - 1) // 2 + high - low
    if square:
        return pair
    pair += 1 + F
    return torch.where(row < F, 1 + row, pair).masked_fill(row == R - 1, 0)


@dataclass(frozen=True)
class TaylorState:
    """Moments of the Taylor features, and a buffer of the last keys and values, which are not yet added to them.

    A step reads all moments but need not write them: it attends to the buffered keys one by one, which is the same sum, and
    only the step that finds the buffer full absorbs them, and empties it. Normalisers lie apart from the moments: rows of V
    floats start on 16 bytes, rows of V + 1 would not.
    """

    moments_BHRV: Tensor
    """fp32 (fp64 under fp64 models), sum of packed(k) v^T over absorbed tokens; rows in the order of `rows_by_shift`."""
    normaliser_BHR: Tensor
    """Sum of packed(k), in the dtype and order of the moments."""
    k_BHSF: Tensor
    """Buffered keys in the model's dtype, and a place for the one that finds the buffer full; places from `buffered` on are not read."""
    v_BHSV: Tensor
    buffered_BH: Tensor
    """int32, how many keys are buffered. Each head has its own count, so that the program of a head can advance it."""

    @classmethod
    def zeros(
        cls, batch: int, heads: int, feature_dim: int, value_dim: int, *, dtype: torch.dtype, device: torch.device,
        square: bool = False,
    ) -> TaylorState:  # fmt: skip
        """The state of an empty sequence, for keys and values of `dtype`; moments are fp32 or wider.

        square: the state is one of squares alone, in all that is done with it.
        """
        rows, wide = packed_rows(feature_dim, square), torch.promote_types(dtype, torch.float32)
        return cls(
            torch.zeros(batch, heads, rows, value_dim, dtype=wide, device=device),
            torch.zeros(batch, heads, rows, dtype=wide, device=device),
            torch.zeros(batch, heads, BUFFERED_KEYS + 1, feature_dim, dtype=dtype, device=device),
            torch.zeros(batch, heads, BUFFERED_KEYS + 1, value_dim, dtype=dtype, device=device),
            torch.zeros(batch, heads, dtype=torch.int32, device=device),
        )

    @property
    def square(self) -> bool:
        """Whether weights are s^2 alone, as the number of rows says."""
        return self.moments_BHRV.shape[2] == packed_rows(self.k_BHSF.shape[-1], square=True)

    def joined(self) -> Tensor:
        """A copy in the form [B, H, R, V + 1] that `taylor_attention` takes as its initial state, the buffered keys added."""
        F, device = self.k_BHSF.shape[-1], self.k_BHSF.device
        layout = PackedLayout.build(F, device, self.moments_BHRV.dtype, self.square)
        free_BHS1 = (torch.arange(self.k_BHSF.shape[2], device=device) >= self.buffered_BH[..., None])[..., None]
        # Free places may hold anything, even NaN.
        k_BHSR = layout.features(self.k_BHSF.to(layout.weights.dtype)).masked_fill(free_BHS1, 0)
        v_BHSE = functional.pad(self.v_BHSV.to(layout.weights.dtype), (0, 1), value=1.0).masked_fill(free_BHS1, 0)
        absorbed_BHRE = torch.cat([self.moments_BHRV, self.normaliser_BHR.unsqueeze(-1)], dim=-1)
        absorbed_BHRE = absorbed_BHRE.index_select(2, rows_by_shift(F, device, self.square).argsort())
        return absorbed_BHRE + k_BHSR.transpose(-1, -2) @ v_BHSE

    def set_joined(self, state_BHRE: Tensor) -> None:
        """Take over a final state [B, H, R, V + 1] of `taylor_attention`."""
        order_R = rows_by_shift(self.k_BHSF.shape[-1], state_BHRE.device, self.square)
        state_BHRE = state_BHRE.index_select(2, order_R)
        self.moments_BHRV.copy_(state_BHRE[..., :-1])
        self.normaliser_BHR.copy_(state_BHRE[..., -1])
        self.buffered_BH.zero_()


@dataclass(frozen=True)
class WindowState:
    """A ring of the last keys and values: position p lies in slot p mod (W + 1).

    A step writes its own slot, which held the one key that has just left the window, and reads the W others.
    """

    k_BHWV: Tensor
    """[B, H, W + 1, V] in the model's dtype, rotated to their positions."""
    v_BHWV: Tensor

    @classmethod
    def zeros(
        cls, batch: int, heads: int, window_left: int, value_dim: int, *, dtype: torch.dtype, device: torch.device
    ) -> WindowState:
        """The state of an empty sequence."""
        shape = (batch, heads, window_left + 1, value_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    @property
    def window_left(self) -> int:
        """W, the previous keys that a query sees."""
        return self.k_BHWV.shape[2] - 1

    def last(self, position_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [B, W, H, V] of the positions p - W .. p - 1 in order, and their document ids [B, W].

        An id is 0, or -1 where the position is before the start of the sequence: a key that does not exist.
        """
        positions_BW, slots_BW = self._slots(position_B)
        k, v = (
            torch.take_along_dim(x, slots_BW[:, None, :, None], dim=2).transpose(1, 2)
            for x in (self.k_BHWV, self.v_BHWV)
        )
        return k, v, (positions_BW >= 0).int() - 1

    def store(self, k_BSHV: Tensor, v_BSHV: Tensor, end_B: Tensor) -> None:
        """Keep the last W of S keys and values, that lie before position `end`."""
        W = self.window_left
        _, slots_BW = self._slots(end_B)
        index_BHWV = slots_BW[:, None, :, None].expand(-1, self.k_BHWV.shape[1], -1, self.k_BHWV.shape[3])
        for ring, x in ((self.k_BHWV, k_BSHV), (self.v_BHWV, v_BSHV)):
            # Rows for positions before 0 land in slots that are written again before they are read.
            missing = max(W - x.shape[1], 0)
            last_BWHV = functional.pad(x[:, x.shape[1] + missing - W :], (0, 0, 0, 0, missing, 0))
            ring.scatter_(2, index_BHWV, last_BWHV.transpose(1, 2))

    def _slots(self, end_B: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, W] before `end`, and their slots."""
        positions_BW = end_B[:, None] + torch.arange(-self.window_left, 0, device=end_B.device)
        return positions_BW, positions_BW % (self.window_left + 1)


@dataclass(frozen=True)
class ConvState:
    """The last K - 1 inputs of a convolution, oldest first; zeros before the start of the sequence."""

    inputs_BhD: Tensor
    """The inputs, in the model's dtype."""

    @classmethod
    def zeros(cls, batch: int, taps: int, channels: int, *, dtype: torch.dtype, device: torch.device) -> ConvState:
        """The state of an empty sequence."""
        return cls(torch.zeros(batch, taps - 1, channels, dtype=dtype, device=device))

    def store(self, u_BTD: Tensor) -> None:
        """Take in T more inputs."""
        h, T = self.inputs_BhD.shape[1], u_BTD.shape[1]
        if h > T:
            u_BTD = torch.cat([self.inputs_BhD[:, T:], u_BTD], dim=1)
        self.inputs_BhD.copy_(u_BTD[:, u_BTD.shape[1] - h :])
