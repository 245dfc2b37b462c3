"""The kernels of based_megatron in the place of plain PyTorch, on a GPU where that package is installed; an export needs it nowhere.

Before kernels are used for heads of some size, they are compared with plain PyTorch on a few numbers: where they differ, as those of
another version might, a warning says so and plain PyTorch goes on.

Legend: B batch, T tokens of this call, S tokens with those of the cache, H heads, F feature dim: of queries and keys of linear attention,
V value head dim (in windows that of queries and keys too), R packed features, C channels, K taps, E both halves of a projection, 2 C,
h K - 1 inputs in front of a convolution.
"""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

CHECKED_TOKENS = 40
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
"""Largest difference to plain PyTorch, whose results are about 1: products of float32 may be in TF32. Other dtypes have no kernels."""


Tensors = tuple[Tensor, ...]
Random = Callable[..., Tensor]
"""Normal numbers of a shape."""
Plain = Callable[..., Any]
"""What a kernel replaces."""


def backend(x: Tensor) -> str | None:
    """The name of the kernels for inputs like this tensor; None where plain PyTorch is to run."""
    wanted = x.device.type == "cuda" and x.dtype in TOLERANCES and not torch.compiler.is_compiling()
    return "triton" if wanted and is_installed() else None


@functools.cache
def is_installed() -> bool:
    """Whether the kernels can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("triton", "based_megatron"))


def fast_attention(
    q_BHTF: Tensor,
    k_BHTF: Tensor,
    v_BHTV: Tensor,
    state_BHRV: Tensor | None,
    square: bool,
    documents_BT: Tensor | None,
    plain: Plain,
) -> tuple[Tensor, Tensor | None] | None:
    """Linear attention and its next state as those of `plain`, taylor_attention of mixers_based; None where that is to run."""
    name = backend(q_BHTF)
    if name is None or q_BHTF.shape[2] == 1:
        return None
    if not _attention_agrees(name, q_BHTF.device, q_BHTF.dtype, q_BHTF.shape[-1], v_BHTV.shape[-1], square, plain):
        return None
    return _attention(name, q_BHTF, k_BHTF, v_BHTV, state_BHRV, square, documents_BT)


def fast_convolution(
    projected_BTE: Tensor, weight_CK: Tensor, before_BCh: Tensor | None, documents_BT: Tensor | None
) -> Tensor | None:
    """silu of the convolution of the first half of the channels, times the second half: [B, T, C]; None where plain PyTorch is to run."""
    name = backend(projected_BTE)
    if name is None or projected_BTE.shape[1] == 1 or weight_CK.dtype != projected_BTE.dtype:
        return None
    if not _convolution_agrees(name, projected_BTE.device, projected_BTE.dtype, *weight_CK.shape):
        return None
    return _convolution(name, projected_BTE, weight_CK, before_BCh, documents_BT)


def fast_window(
    q_BHTV: Tensor, k_BHSV: Tensor, v_BHSV: Tensor, window: int, documents_BT: Tensor | None, plain: Plain
) -> Tensor | None:
    """Attention over a window of keys, as that of `plain`, causal_attention of mixers_based; None where that is to run."""
    name = backend(q_BHTV)
    if name is None or q_BHTV.shape[2] == 1:
        return None
    if not _window_agrees(name, q_BHTV.device, q_BHTV.dtype, q_BHTV.shape[-1], window, plain):
        return None
    return _window(name, q_BHTV, k_BHSV, v_BHSV, window, documents_BT)


def state_weights(feature_dim: int, square: bool, device: torch.device) -> Tensor:
    """What a packed feature [R] of an export's state has in it, and one of the kernels' moments has not."""
    i, j = torch.triu_indices(feature_dim, feature_dim, device=device)
    pairs = torch.full((len(i),), feature_dim**-0.5, device=device)
    pairs = torch.where(i == j, pairs * math.sqrt(0.5), pairs)
    if square:
        return pairs * math.sqrt(2)
    ones = torch.ones(1 + feature_dim, device=device)
    ones[1:] *= feature_dim**-0.25
    return torch.cat([ones, pairs])


def _attention(
    name: str,
    q_BHTF: Tensor,
    k_BHTF: Tensor,
    v_BHTV: Tensor,
    state_BHRV: Tensor | None,
    square: bool,
    documents_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    weights_R1 = state_weights(q_BHTF.shape[-1], square, q_BHTF.device)[:, None]
    kernels: Any = importlib.import_module("based_megatron.kernels.taylor_attention")
    y_BTHV, moments_BHRV = kernels.taylor_attention(
        *(x.transpose(1, 2) for x in (q_BHTF, k_BHTF, v_BHTV)),
        initial_state_BHRV=None if state_BHRV is None else state_BHRV / weights_R1,
        document_ids_BT=documents_BT,
        return_final_state=True,
        square=square,
        backend=name,
    )
    return y_BTHV.transpose(1, 2), moments_BHRV * weights_R1


@functools.cache
def _attention_agrees(
    name: str, device: torch.device, dtype: torch.dtype, features: int, values: int, square: bool, plain: Plain
) -> bool:
    def check(random: Random) -> tuple[Tensors, Tensors]:
        q, k, v = (random(1, 2, CHECKED_TOKENS, size) for size in (features, features, values))
        state = plain(q.float(), k.float(), v.float(), None, None, square)[1]
        expected = plain(q.float(), k.float(), v.float(), None, state, square)
        return _attention(name, q, k, v, state, square, None), expected

    return _agrees("linear attention", device, dtype, check)


def _convolution(
    name: str, projected_BTE: Tensor, weight_CK: Tensor, before_BCh: Tensor | None, documents_BT: Tensor | None
) -> Tensor:
    kernels: Any = importlib.import_module("based_megatron.kernels.gated_conv")
    halo_BhC = None if before_BCh is None else before_BCh.transpose(1, 2).to(projected_BTE.dtype).contiguous()
    return kernels.gated_conv_fused(
        projected_BTE, weight_CK, halo_BhD=halo_BhC, key_document_ids_BS=documents_BT, backend=name
    )


@functools.cache
def _convolution_agrees(name: str, device: torch.device, dtype: torch.dtype, channels: int, taps: int) -> bool:
    def check(random: Random) -> tuple[Tensors, Tensors]:
        projected_BTE, weight_CK = random(1, CHECKED_TOKENS, 2 * channels), random(channels, taps)
        before_BCh = random(1, channels, taps - 1)
        u_BTC, gate_BTC = projected_BTE.float().chunk(2, dim=-1)
        u_BCS = torch.cat([before_BCh.float(), u_BTC.transpose(1, 2)], dim=-1)
        c_BCT = torch.nn.functional.conv1d(u_BCS, weight_CK.float().unsqueeze(1), groups=channels)
        expected = torch.nn.functional.silu(c_BCT).transpose(1, 2) * gate_BTC
        return (_convolution(name, projected_BTE, weight_CK, before_BCh, None),), (expected,)

    return _agrees("convolutions", device, dtype, check)


def _window(
    name: str, q_BHTV: Tensor, k_BHSV: Tensor, v_BHSV: Tensor, window: int, documents_BT: Tensor | None
) -> Tensor:
    kernels: Any = importlib.import_module("based_megatron.kernels.sliding_window")
    inputs = (x.transpose(1, 2) for x in (q_BHTV, k_BHSV, v_BHSV))
    options = dict(window_left=window - 1, key_document_ids_BS=documents_BT, backend=name)
    return kernels.sliding_window_attention(*inputs, **options).transpose(1, 2)


@functools.cache
def _window_agrees(name: str, device: torch.device, dtype: torch.dtype, values: int, window: int, plain: Plain) -> bool:
    def check(random: Random) -> tuple[Tensors, Tensors]:
        q, k, v = (random(1, 2, CHECKED_TOKENS, values) for _ in range(3))
        expected = plain(q.float(), k.float(), v.float(), None, window)
        return (_window(name, q, k, v, window, None),), (expected,)

    return _agrees("windows", device, dtype, check)


@torch.no_grad()
def _agrees(
    what: str, device: torch.device, dtype: torch.dtype, check: Callable[[Random], tuple[Tensors, Tensors]]
) -> bool:
    """Whether kernels give the values of plain PyTorch; any error of theirs says that they do not."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    try:
        found, expected = check(random)
        scaled = (
            (a.float() - b).abs().max() / b.abs().max().clamp(min=1) for a, b in zip(found, expected, strict=True)
        )
        worst = max(map(float, scaled))
        reason = "" if worst <= TOLERANCES[dtype] else f"they differ by {worst:.2g}"
    except Exception as error:  # whatever another version, compiler or driver makes of it
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if reason:
        logger.warning("the kernels of based_megatron are not used for %s: %s", what, reason)
    return not reason
