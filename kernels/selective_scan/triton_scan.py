"""The selective scan in Triton: a forward kernel that saves the state before each chunk, and a backward kernel that starts from these.

Legend: B batch, T tokens, C channels, N states of a channel, S saved states of a row, one before each chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from based_megatron.kernels.layout import Operand, ids_operand, laid_out_like, operand, unit_last_stride
from based_megatron.kernels.selective_scan import triton_kernels

TILE_CHANNELS = 32
"""Channels of a program, one for each thread of its warp."""


CHUNK_TOKENS = 64
"""Tokens between saved states."""
FORWARD_GROUP_TOKENS = 8
"""Tokens that are loaded together."""
BACKWARD_GROUP_STATES = 64
"""Backward has the states of a group of tokens in registers, so many of a thread, and as many decays."""


class SelectiveScan(torch.autograd.Function):
    """(x, raw steps, rate, b, c, gate, bias of the steps, skip, initial state or None, ids or None) to (y, last state)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTC: Tensor,
        raw_step_BTC: Tensor,
        rate_CN: Tensor,
        b_BTN: Tensor,
        c_BTN: Tensor,
        gate_BTC: Tensor,
        step_bias_C: Tensor,
        skip_C: Tensor,
        initial_BCN: Tensor | None,
        ids_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        (B, T, C), N = x_BTC.shape, rate_CN.shape[1]
        grid, S = (triton.cdiv(C, TILE_CHANNELS), B), triton.cdiv(T, CHUNK_TOKENS)
        final_BCN, y_BTC = rate_CN.new_empty(B, C, N), laid_out_like(x_BTC)
        saved = rate_CN.new_empty(B, grid[0], S, *_tile(N))
        triton_kernels.forward_kernel[grid](
            operand(x_BTC), operand(raw_step_BTC), rate_CN, _for_all(b_BTN), _for_all(c_BTN),
            operand(gate_BTC), step_bias_C, skip_C, final_BCN if initial_BCN is None else initial_BCN, ids_operand(ids_BT, x_BTC),
            operand(y_BTC), saved, final_BCN, T, C, S, HAS_INITIAL=initial_BCN is not None, **_constants(N, ids_BT, FORWARD_GROUP_TOKENS),
        )  # fmt: skip
        ctx.save_for_backward(x_BTC, raw_step_BTC, rate_CN, b_BTN, c_BTN, gate_BTC, step_bias_C, skip_C, ids_BT, saved)
        ctx.has_initial = initial_BCN is not None
        return y_BTC, final_BCN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTC: Tensor, dfinal_BCN: Tensor) -> tuple[Tensor | None, ...]:
        x_BTC, raw_step_BTC, rate_CN, b_BTN, c_BTN, gate_BTC, step_bias_C, skip_C, ids_BT, saved = ctx.saved_tensors
        (B, T, C), N, S = x_BTC.shape, rate_CN.shape[1], saved.shape[2]
        tiles = saved.shape[1]
        noted = saved.new_empty(B, tiles, CHUNK_TOKENS // _backward_group_tokens(N), *_tile(N))
        drate_BCN, dinitial_BCN = saved.new_empty(2, B, C, N)
        # Sums over the channels or the tokens of each program, added up below in a fixed order.
        dbc, (dbias_BC, dskip_BC) = saved.new_empty(B, tiles, T, 2, _padded(N)), saved.new_empty(2, B, C)
        dx_BTC, draw_BTC, dgate_BTC = (laid_out_like(part) for part in (x_BTC, raw_step_BTC, gate_BTC))
        triton_kernels.backward_kernel[tiles, B](
            operand(x_BTC), operand(raw_step_BTC), rate_CN, _for_all(b_BTN), _for_all(c_BTN),
            operand(gate_BTC), step_bias_C, skip_C, ids_operand(ids_BT, x_BTC),
            operand(unit_last_stride(dy_BTC)), dfinal_BCN.contiguous(), saved, noted,
            operand(dx_BTC), operand(draw_BTC), drate_BCN, dbc, operand(dgate_BTC), dbias_BC, dskip_BC, dinitial_BCN,
            T, C, S, **_constants(N, ids_BT, _backward_group_tokens(N)),
        )  # fmt: skip
        db_BTN, dc_BTN = dbc.sum(1)[..., :N].unbind(2)
        return (
            dx_BTC,
            draw_BTC,
            drate_BCN.sum(0),
            db_BTN.to(b_BTN.dtype),
            dc_BTN.to(c_BTN.dtype),
            dgate_BTC,
            dbias_BC.sum(0).to(step_bias_C.dtype),
            dskip_BC.sum(0).to(skip_C.dtype),
            dinitial_BCN if ctx.has_initial else None,
            None,
        )


@torch.compiler.disable  # a kernel of ours inside of an autograd function: one call in a compiled graph
def selective_scan(
    x_BTC: Tensor,
    raw_step_BTC: Tensor,
    rate_CN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    gate_BTC: Tensor,
    step_bias_C: Tensor,
    skip_C: Tensor,
    initial_state_BCN: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y and the last state; see the package's function of this name."""
    x, raw_step, gate = (unit_last_stride(part) for part in (x_BTC, raw_step_BTC, gate_BTC))
    rate, bias, skip = (part.contiguous() for part in (rate_CN, step_bias_C, skip_C))
    initial = None if initial_state_BCN is None else initial_state_BCN.contiguous()
    y, final = SelectiveScan.apply(x, raw_step, rate, b_BTN, c_BTN, gate, bias, skip, initial, document_ids_BT)
    return y, final


def _for_all(x_BTN: Tensor) -> Operand:
    """b or c in fp32, for every thread reads all of them, and filled up to whole groups of tokens."""
    return operand(functional.pad(x_BTN.float(), (0, 0, 0, -x_BTN.shape[1] % FORWARD_GROUP_TOKENS)).contiguous())


def _padded(N: int) -> int:
    """Places for the states of a channel; two for each thread at least, for those of b and c are summed together."""
    return max(triton.next_power_of_2(N), TILE_CHANNELS // 2)


def _backward_group_tokens(N: int) -> int:
    return max(1, BACKWARD_GROUP_STATES // _padded(N))


def _tile(N: int) -> tuple[int, int]:
    """Shape of the states of a program in memory, [states, channels].

    One column is not used: rows of odd length cannot be read as vectors, for which the compiler would give each thread several
    channels, and parts of their states.
    """
    return _padded(N), TILE_CHANNELS + 1


def _constants(N: int, ids_BT: Tensor | None, group_tokens: int) -> dict[str, Any]:
    return {
        "N": N,
        "HAS_IDS": ids_BT is not None,
        "CHUNK_TOKENS": CHUNK_TOKENS,
        "GROUP_TOKENS": group_tokens,
        "TILE_CHANNELS": TILE_CHANNELS,
        "PADDED_N": _padded(N),
        "num_warps": 1,
    }
