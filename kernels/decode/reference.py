"""Steps of one token in plain PyTorch: any device and dtype, fp32 (fp64 for fp64 inputs) where the kernels are.

Legend: B batch, H heads, F feature dim, R rows of a packed state (rotary: rotated pairs), V value head dim, E = V + 1, W window_left,
D channels, K taps, h = K - 1, U columns of the vocabulary, X = F + 1.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from based_megatron.kernels.decode.states import ConvState, TaylorState, WindowState, rows_by_shift
from based_megatron.kernels.packing import SQUARE_EPSILON, PackedLayout
from based_megatron.kernels.rotary import apply_rotary


def taylor_step(q_BHF: Tensor, k_BHF: Tensor, v_BHV: Tensor, state: TaylorState) -> Tensor:
    """o of the next token; see the package's function of this name. No keys are left in the buffer."""
    # To look into the buffer, the host would wait for a GPU.
    if q_BHF.device.type == "cpu" and not state.buffered_BH.any():
        return _unbuffered_taylor_step(q_BHF, k_BHF, v_BHV, state)
    dtype = state.moments_BHRV.dtype
    layout = PackedLayout.build(q_BHF.shape[-1], q_BHF.device, dtype, state.square)
    k_BHR, q_BHR = layout.features(k_BHF.to(dtype)), layout.features(q_BHF.to(dtype)) * layout.weights
    v_BHE = functional.pad(v_BHV.to(dtype), (0, 1), value=1.0)
    state_BHRE = state.joined() + k_BHR.unsqueeze(-1) * v_BHE.unsqueeze(-2)
    state.set_joined(state_BHRE)
    sums_BHE = (q_BHR.unsqueeze(-2) @ state_BHRE).squeeze(-2)
    z_BH1 = sums_BHE[..., -1:] + (SQUARE_EPSILON if state.square else 0)
    return (sums_BHE[..., :-1] / z_BH1).to(v_BHV.dtype)


def _unbuffered_taylor_step(q_BHF: Tensor, k_BHF: Tensor, v_BHV: Tensor, state: TaylorState) -> Tensor:
    """`taylor_step` of a state whose moments hold all keys, in the order of its rows: decoding on a CPU, where each pass counts."""
    dtype = state.moments_BHRV.dtype
    first_R, second_R, weights_R = _factors(q_BHF.shape[-1], dtype, state.square)

    def features(x_BHF: Tensor) -> Tensor:
        x_BHX = functional.pad(x_BHF.to(dtype), (0, 1), value=1.0)
        return x_BHX.index_select(-1, first_R) * x_BHX.index_select(-1, second_R)

    k_BHR, q_BHR = features(k_BHF), features(q_BHF) * weights_R
    state.moments_BHRV.addcmul_(k_BHR.unsqueeze(-1), v_BHV.to(dtype).unsqueeze(-2))
    state.normaliser_BHR.add_(k_BHR)
    z_BH1 = (q_BHR * state.normaliser_BHR).sum(-1, keepdim=True)
    if state.square:
        z_BH1 = z_BH1 + SQUARE_EPSILON
    return ((q_BHR.unsqueeze(-2) @ state.moments_BHRV).squeeze(-2) / z_BH1).to(v_BHV.dtype)


@functools.cache
def _factors(feature_dim: int, dtype: torch.dtype, square: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Both factors of each row of a decoding state, in x with a 1 behind it, and the weights of the rows; on the CPU."""
    cpu = torch.device("cpu")
    layout = PackedLayout.build(feature_dim, cpu, dtype, square)
    one = torch.tensor([feature_dim])
    alone = [] if square else [one, torch.arange(feature_dim)]
    first_R = torch.cat([*alone, layout.first])
    second_R = torch.cat([*(one.expand(len(x)) for x in alone), layout.second])
    order_R = rows_by_shift(feature_dim, cpu, square)
    return first_R[order_R], second_R[order_R], layout.weights[order_R]


def window_step(
    q_BHV: Tensor, k_BHV: Tensor, v_BHV: Tensor, cos_BR: Tensor, sin_BR: Tensor, state: WindowState, position_B: Tensor
) -> Tensor:
    """o of the next token; see the package's function of this name."""
    dtype = torch.promote_types(q_BHV.dtype, torch.float32)
    tables = cos_BR.unsqueeze(1), sin_BR.unsqueeze(1)
    q_BHV, k_BHV = apply_rotary(torch.stack([q_BHV, k_BHV], dim=1), *tables).unbind(1)
    slots = state.window_left + 1
    index_BHWV = (position_B % slots)[:, None, None, None].expand(-1, q_BHV.shape[1], 1, q_BHV.shape[2])
    state.k_BHWV.scatter_(2, index_BHWV, k_BHV.unsqueeze(2))
    state.v_BHWV.scatter_(2, index_BHWV, v_BHV.unsqueeze(2))
    # The slot of this position and those written before it: all of them once the ring is full.
    unread_B1W = (torch.arange(slots, device=position_B.device) > position_B[:, None]).unsqueeze(1)
    scores_BHW = (state.k_BHWV.to(dtype) @ q_BHV.to(dtype).unsqueeze(-1)).squeeze(-1) * q_BHV.shape[-1] ** -0.5
    p_BHW = scores_BHW.masked_fill(unread_B1W, -torch.inf).softmax(-1)
    # Nothing times zero is not zero if it is NaN.
    v_BHWV = state.v_BHWV.masked_fill(unread_B1W.unsqueeze(-1), 0).to(dtype)
    return (p_BHW.unsqueeze(-2) @ v_BHWV).squeeze(-2).to(v_BHV.dtype)


def conv_step(u_BD: Tensor, gate_BD: Tensor, weight_DK: Tensor, state: ConvState) -> Tensor:
    """y of the next token; see the package's function of this name."""
    dtype = torch.promote_types(u_BD.dtype, torch.float32)
    inputs_BKD = torch.cat([state.inputs_BhD, u_BD.unsqueeze(1)], dim=1)
    c_BD = (inputs_BKD.to(dtype) * weight_DK.to(dtype).t()).sum(1)
    state.inputs_BhD.copy_(inputs_BKD[:, 1:])
    return (functional.silu(c_BD) * gate_BD).to(u_BD.dtype)


def choose_token(logits_BU: Tensor, vocab_size: int, token_B: Tensor) -> None:
    """The most likely token; see the package's function of this name."""
    token_B.copy_(logits_BU[:, :vocab_size].argmax(-1))
