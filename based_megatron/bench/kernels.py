"""`based bench kernels`: the training kernels against fp64 and against baselines.

Legend: B batch, T sequence, H heads, F feature dim, V value head dim, W window_left, D channels, E = 2D, K taps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from based_megatron.bench.keys import Baseline, Operation, Quantity, Sizes
from based_megatron.bench.linear_fp8 import linear_rows
from based_megatron.bench.norm_gate_loss import cross_entropy_rows, norm_rows, swiglu_rows
from based_megatron.bench.report import Case, Row, Target
from based_megatron.bench.timing import Bench
from based_megatron.bench.work import Ceilings, Prepare, Run, Work, compiled, measure, measure_ceilings
from based_megatron.kernels.gated_conv import gated_conv_fused
from based_megatron.kernels.packing import packed_rows
from based_megatron.kernels.sliding_window import sliding_window_attention
from based_megatron.kernels.taylor_attention import taylor_attention

CHUNK = 64
"""Tokens whose pairs a chunked algorithm computes directly, in the count of its operations."""


def cases(bench: Bench) -> list[Case]:
    """The cases of `based bench kernels`."""
    ceilings = functools.cache(lambda: measure_ceilings(bench))
    named: dict[str, Callable[[], list[Row]]] = {
        "device": lambda: device_rows(ceilings()),
        **{
            f"taylor attention B{B} T{T}": functools.partial(taylor_rows, bench, ceilings, B, T)
            for B, T in ([(2, 48)] if bench.quick else [(8, 2048), (4, 4096), (2, 8192), (1, 32768)])
        },
        "taylor attention, head dim 112": lambda: wide_taylor_rows(bench, ceilings),
        "taylor attention, linear in T": lambda: taylor_scaling(bench, ceilings),
        "squares": lambda: square_rows(bench, ceilings),
        "sliding window": lambda: window_rows(bench, ceilings),
        "gated conv": lambda: conv_rows(bench, ceilings),
        "add + RMSNorm": lambda: norm_rows(bench, ceilings),
        "SwiGLU": lambda: swiglu_rows(bench, ceilings),
        "linear layers in fp8": lambda: linear_rows(bench, ceilings),
        "cross entropy": lambda: cross_entropy_rows(bench, ceilings),
    }
    return [Case(name, run) for name, run in named.items()]


def device_rows(ceilings: Ceilings) -> list[Row]:
    """The two ceilings, from which floors are computed."""
    return [
        Row(
            Operation.COPY,
            ceilings.bytes_per_ms / 1e6,
            Quantity.GIGABYTES_PER_SECOND,
            note="bytes read + written",
        ),
        Row(Operation.MATRIX_PRODUCT, ceilings.flops_per_ms / 1e9, Quantity.TERAFLOPS_PER_SECOND, note="square"),
    ]


TAYLOR_LIMITS = {"o": 3e-3, "dq": 5e-3, "dk": 4e-3, "dv": 4e-3}


def taylor_work(bench: Bench, B: int, T: int, V: int, *, square: bool = False, **more: Any) -> Work:
    """Taylor attention of 16 heads with feature dim 16, or attention by squares of normed queries and keys."""
    H, F = bench.size(16, 2), bench.size(16, 8)
    token_heads = B * T * H
    features = 2 * packed_rows(F, square) * (V + 1)
    # Forward reads q, k, v and writes o and the fp32 normaliser; backward reads those and do, and writes dq, dk, dv.
    forward_bytes = 2 * (2 * F + 2 * V) + 4
    backward_bytes = 2 * (2 * F + 3 * V) + 4 + 2 * (2 * F + V)
    forward_flops = (CHUNK + 64) * (F + V) + 2 * features
    backward_flops = (CHUNK + 64) * (3 * F + 2 * V) + 5 * features

    def inputs() -> list[Tensor]:
        q, k, v = (bench.random(B, T, H, size) for size in (F, F, V))
        return [functional.layer_norm(q, (F,)), functional.layer_norm(k, (F,)), v] if square else [q, k, v]

    return Work(
        Operation.SQUARE_ATTENTION if square else Operation.TAYLOR_ATTENTION,
        Sizes(batch=B, tokens=T, heads=H, feature_dim=F, head_dim=V),
        lambda q, k, v, backend: taylor_attention(q, k, v, square=square, backend=backend)[0],
        inputs,
        cut=lambda x, i: x[:1, :, :2],
        gradients=("dq", "dk", "dv"),
        # Normalisers of squares may be small, where roundings are not.
        limits={name: limit * (3 if square else 1) for name, limit in TAYLOR_LIMITS.items()},
        moved=(token_heads * forward_bytes, token_heads * (forward_bytes + backward_bytes)),
        flops=(token_heads * forward_flops, token_heads * (forward_flops + backward_flops)),
        **more,
    )


TAYLOR_TARGETS_MS: Mapping[tuple[int, int], tuple[float, float]] = {(8, 2048): (0.075, 0.30), (1, 32768): (0.16, 0.65)}
WIDE_TARGET = 1.9
"""Head dim 112 against 64, times of the same shape otherwise."""
SCALING_TARGET = 1.1
"""Time per token at the longest sequence against that at an eighth of it."""


def taylor_rows(bench: Bench, ceilings: Callable[[], Ceilings], B: int, T: int) -> list[Row]:
    """Taylor attention against softmax attention of the same shape and the kernels of flash-linear-attention."""
    baselines: dict[Baseline, Prepare] = {
        Baseline.SDPA_FLASH: _flash,
        Baseline.FLA_PARALLEL: _fla_parallel,
        Baseline.FLA_FUSED_CHUNK: _fla_fused_chunk,
    }
    targets = TAYLOR_TARGETS_MS.get((B, T), (None, None))
    work = taylor_work(bench, B, T, bench.size(64, 16), targets=targets, baselines=baselines)
    return measure(bench, work, ceilings())


def wide_taylor_rows(bench: Bench, ceilings: Callable[[], Ceilings]) -> list[Row]:
    """Taylor attention at the head dim of the 1.3B model; the target is a multiple of the time at head dim 64."""
    B, T = bench.size(8, 2), bench.size(2048, 48)
    narrow = measure(bench, taylor_work(bench, B, T, bench.size(64, 16)), ceilings())
    targets = tuple(WIDE_TARGET * row.value for row in narrow)
    baselines: dict[Baseline, Prepare] = {Baseline.SDPA_FLASH: _flash}
    work = taylor_work(bench, B, T, bench.size(112, 24), targets=targets, baselines=baselines)
    return measure(bench, work, ceilings())


def square_rows(bench: Bench, ceilings: Callable[[], Ceilings]) -> list[Row]:
    """Attention by squares alone, in the size of the first rows of Taylor attention."""
    B, T, V = bench.size(8, 2), bench.size(2048, 48), bench.size(64, 16)
    return measure(bench, taylor_work(bench, B, T, V, square=True), ceilings())


def taylor_scaling(bench: Bench, ceilings: Callable[[], Ceilings]) -> list[Row]:
    """Taylor attention over one sequence of 2k to 256k tokens: checked at every length, and the time per token must not grow."""
    rows: list[Row] = []
    for doubling in range(bench.size(8, 2)):
        T = bench.size(2048, 32) << doubling
        rows += measure(bench, taylor_work(bench, 1, T, bench.size(64, 16)), ceilings())
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    if not bench.quick:
        # Two rows a length: forward, and forward with backward.
        for eighth, longest in zip(rows[2 * 4 : 2 * 5], rows[2 * 7 :], strict=True):
            assert longest.sizes.tokens == 8 * (eighth.sizes.tokens or 0)
            rows.append(
                Row(
                    Operation.TAYLOR_ATTENTION,
                    longest.value / (8 * eighth.value),
                    Quantity.TIME_PER_TOKEN_RATIO,
                    longest.passes,
                    Sizes(batch=1, tokens=longest.sizes.tokens, than_tokens=eighth.sizes.tokens),
                    target=Target("at most", SCALING_TARGET),
                )
            )
    return rows


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Run, Sequence[Tensor]]:
    """Causal softmax attention with heads of the value's size, which a transformer has in this place."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    B, T, H, V = v.shape

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run, [torch.randn(B, H, T, V, device=v.device, dtype=v.dtype) for _ in range(3)]


def _fla_parallel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Run, Sequence[Tensor]]:
    from fla.ops.based import parallel_based

    return functools.partial(parallel_based, scale=q.shape[-1] ** -0.5), (q, k, v)


def _fla_fused_chunk(q: Tensor, k: Tensor, v: Tensor) -> tuple[Run, Sequence[Tensor]]:
    from fla.ops.based import fused_chunk_based

    return functools.partial(fused_chunk_based, scale=q.shape[-1] ** -0.5), (q, k, v)


WINDOW_TARGET_MS = 0.45


def window_rows(bench: Bench, ceilings: Callable[[], Ceilings]) -> list[Row]:
    """Sliding window attention: a window of 128 at head dims 64 and 112, on views of a fused projection."""
    B, T, H, W = bench.size(8, 2), bench.size(2048, 40), bench.size(16, 2), bench.size(128, 8)
    rows: list[Row] = []
    for V in (bench.size(64, 16), bench.size(112, 24)):
        elements = B * T * H * V

        def inputs(V: int = V) -> list[Tensor]:
            fused = bench.random(T, B, 3 * H * V)
            return [part.transpose(0, 1).unflatten(-1, (H, V)) for part in fused.chunk(3, dim=-1)]

        baselines: dict[Baseline, Prepare] = {
            Baseline.SDPA_FLASH_WHOLE_PAST: _flash,
            Baseline.FLASH_ATTN: functools.partial(_flash_attn_window, W),
            Baseline.FLEX_ATTENTION: functools.partial(_flex_window, bench, W),
        }
        work = Work(
            Operation.SLIDING_WINDOW,
            Sizes(batch=B, tokens=T, heads=H, head_dim=V, window_left=W),
            lambda q, k, v, backend: sliding_window_attention(q, k, v, window_left=W, backend=backend),
            inputs,
            cut=lambda x, i: x[:1, :, :2],
            gradients=("dq", "dk", "dv"),
            limits={"o": 3e-3, "dq": 5e-3, "dk": 4e-3, "dv": 4e-3},
            moved=(2 * 4 * elements, 2 * (4 + 5 + 3) * elements),
            flops=(4 * W * elements, 14 * W * elements),
            targets=(None, WINDOW_TARGET_MS if V == 64 else None),
            baselines=baselines,
        )
        rows += measure(bench, work, ceilings())
    return rows


def _flash_attn_window(W: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Run, Sequence[Tensor]]:
    from flash_attn import flash_attn_func

    return lambda q, k, v: flash_attn_func(q, k, v, causal=True, window_size=(W, 0)), (q, k, v)


def _flex_window(bench: Bench, W: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Run, Sequence[Tensor]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = q.shape[1]
    mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j <= W), None, None, T, T, device=str(q.device))
    run = functools.partial(compiled(bench, flex_attention), block_mask=mask)
    return run, [x.transpose(1, 2).contiguous() for x in (q, k, v)]


COPY_SHARE = 0.7
"""Share of the copy bandwidth that a kernel bound by memory should reach."""


def conv_rows(bench: Bench, ceilings: Callable[[], Ceilings]) -> list[Row]:
    """Gated convolution: three taps, at two widths, on the halves of a fused projection as in the model."""
    B, T, K = bench.size(8, 2), bench.size(2048, 24), 3
    rows: list[Row] = []
    for D in (bench.size(2048, 16), bench.size(3584, 24)):
        size = 2 * B * T * D

        def inputs(D: int = D) -> list[Tensor]:
            return [bench.random(T, B, 2 * D).transpose(0, 1), bench.random(D, K, scale=K**-0.5)]

        def cut(x: Tensor, i: int, D: int = D) -> Tensor:
            few = 8
            if i == 1:
                return x[:few]
            return torch.cat([x[..., :few], x[..., D : D + few]], dim=-1) if i == 0 else x[..., :few]

        forward_ms, backward_ms = (part / (COPY_SHARE * ceilings().bytes_per_ms) for part in (3.0 * size, 5.0 * size))
        work = Work(
            Operation.GATED_CONV,
            Sizes(batch=B, tokens=T, channels=D, taps=K),
            lambda x, w, backend: gated_conv_fused(x, w, backend=backend),
            inputs,
            cut=cut,
            gradients=("du, dgate", "dweight"),
            limits={"o": 3e-3, "du, dgate": 4e-3, "dweight": 4e-3},
            moved=(3.0 * size, 8.0 * size),
            targets=(forward_ms, backward_ms),
            baselines={Baseline.CAUSAL_CONV1D: _causal_conv1d},
            splits_backward=True,
        )
        rows += measure(bench, work, ceilings())
    return rows


def _causal_conv1d(projected_BTE: Tensor, weight_DK: Tensor) -> tuple[Run, Sequence[Tensor]]:
    from causal_conv1d import causal_conv1d_fn

    def run(projected_BTE: Tensor, weight_DK: Tensor) -> Tensor:
        u, gate = projected_BTE.transpose(1, 2).chunk(2, dim=1)
        return causal_conv1d_fn(u, weight_DK, activation="silu") * gate

    return run, (projected_BTE, weight_DK)
