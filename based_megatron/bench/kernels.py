"""`based bench kernels`: the training kernels against fp64 and beside their peers.

Legend: B batch, T sequence, H heads, F feature dim, V value head dim, W window_left, D channels or hidden size, K taps,
N tokens, C vocabulary columns.

What is checked is what is timed: outputs and gradients of the first set of inputs, compared on a few heads, channels or tokens
with the reference in fp64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from based_megatron.bench.report import Case, Check, Row, Target, relative_error
from based_megatron.bench.timing import Bench, Timing, forward_backward
from based_megatron.kernels.cross_entropy import vocab_cross_entropy
from based_megatron.kernels.gated_conv import gated_conv_fused
from based_megatron.kernels.packing import packed_rows
from based_megatron.kernels.rms_norm import add_rms_norm
from based_megatron.kernels.sliding_window import sliding_window_attention
from based_megatron.kernels.swiglu import swiglu
from based_megatron.kernels.taylor_attention import taylor_attention

Run = Callable[..., Any]
Peer = Callable[..., tuple[Run, Sequence[Tensor]]]
"""From our inputs to a peer's function and its inputs."""

CHUNK = 64
"""Tokens whose pairs a chunked algorithm computes directly, in the count of its operations."""


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best, measured in the same run."""

    bytes_per_ms: float
    flops_per_ms: float

    def floor_ms(self, moved: float, flops: float = 0.0) -> float:
        """The larger of the two times."""
        return max(moved / self.bytes_per_ms, flops / self.flops_per_ms)


@dataclass(frozen=True)
class Work:
    """One op at one size."""

    name: str
    shape: str
    run: Run
    """(*inputs, backend) to one output, or several."""
    inputs: Callable[[], Sequence[Tensor]]
    """Fresh random inputs."""
    cut: Callable[[Tensor, int], Tensor]
    """(input i, or output at i = -1) to the part that is checked, on which the op gives the same result alone."""
    gradients: tuple[str, ...]
    """Names of the inputs' gradients."""
    limits: Mapping[str, float]
    """Largest relative errors in bf16, of `o` and the gradients."""
    moved: tuple[float, float]
    """Bytes that must be read and written, forward and forward + backward."""
    flops: tuple[float, float] = (0.0, 0.0)
    targets: tuple[float | None, float | None] = (None, None)
    """Milliseconds, forward and forward + backward."""
    peers: Mapping[str, Peer] = field(default_factory=dict)
    splits_backward: bool = False
    """Report backward alone: forward + backward less forward."""


def cases(bench: Bench) -> list[Case]:
    """What `based bench kernels` runs."""
    ceilings = functools.cache(lambda: measure_ceilings(bench))
    named: dict[str, Callable[[], list[Row]]] = {
        "device": lambda: device_rows(ceilings()),
        **{
            f"taylor attention B{B} T{T}": functools.partial(taylor_rows, bench, ceilings, B, T)
            for B, T in ([(2, 48)] if bench.quick else [(8, 2048), (4, 4096), (2, 8192), (1, 32768)])
        },
        "taylor attention, head dim 112": lambda: wide_taylor_rows(bench, ceilings),
        "taylor attention, linear in T": lambda: taylor_scaling(bench, ceilings),
        "sliding window": lambda: window_rows(bench, ceilings),
        "gated conv": lambda: conv_rows(bench, ceilings),
        "add + RMSNorm": lambda: norm_rows(bench, ceilings),
        "SwiGLU": lambda: swiglu_rows(bench, ceilings),
        "cross entropy": lambda: cross_entropy_rows(bench, ceilings),
    }
    return [Case(name, run) for name, run in named.items()]


def measure_ceilings(bench: Bench) -> Ceilings:
    """Copy bandwidth, and the rate of a large matrix product on random data."""
    side = bench.size(8192, 64)
    a, b = bench.random(side, side), bench.random(side, side)
    return Ceilings(copy_bandwidth(bench), 2 * side**3 / bench.time(lambda: a @ b).ms)


def copy_bandwidth(bench: Bench) -> float:
    """Bytes read and written in a millisecond by the faster of two ways to copy 4 GiB."""
    source = torch.empty(bench.size(2**30, 2**16), dtype=torch.float32, device=bench.device).fill_(1)
    target = torch.empty_like(source)
    # By events: a copy inside a graph is another operation, and slower. An addition is a copy by a kernel.
    copies = (lambda: target.copy_(source), lambda: torch.add(source, 1, out=target))
    copy_ms = min(bench.time(copy, graph=False).ms for copy in copies)
    return 2 * source.nbytes / copy_ms


def device_rows(ceilings: Ceilings) -> list[Row]:
    """The two ceilings, from which floors are computed."""
    return [
        Row("copy", "bytes read + written", ceilings.bytes_per_ms / 1e6, "GB/s"),
        Row("matrix product", "square", ceilings.flops_per_ms / 1e9, "TFLOP/s"),
    ]


def measure(bench: Bench, work: Work, ceilings: Ceilings) -> list[Row]:
    """Rows of one op: forward, and forward + backward or backward alone."""
    torch.manual_seed(bench.seed)
    first = work.inputs()
    sets = [first, *(work.inputs() for _ in range(bench.copies(sum(x.nbytes for x in first)) - 1))]
    run = functools.partial(work.run, backend=bench.backend)
    cotangents = _cotangents(run, first)
    both_calls = [_forward_backward(run, inputs, cotangents) for inputs in sets]
    forward_calls = [_forward(run, inputs) for inputs in sets]
    checks = check(bench, work, first, _several(forward_calls[0]()), cotangents, both_calls[0]())
    both, forward = bench.time(both_calls), bench.time(forward_calls)
    names = (f"{work.name} forward", f"{work.name} forward + backward")
    rows = [
        _row(bench, work, ceilings, names[0], 0, forward, {"o": checks.pop("o")}, sets),
        _row(bench, work, ceilings, names[1], 1, both, checks, sets),
    ]
    if work.splits_backward:
        moved = work.moved[1] - work.moved[0]
        backward = Timing(both.ms - forward.ms, both.method)
        rows[1] = _row(bench, work, ceilings, f"{work.name} backward", 1, backward, checks, sets, moved)
    return rows


def check(
    bench: Bench,
    work: Work,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    found: Sequence[Tensor],
) -> dict[str, Check]:
    """Errors of the outputs and of the gradients `found` against fp64, on the part that `work.cut` takes."""
    floats = [i for i, x in enumerate(inputs) if x.is_floating_point()]
    exact = [
        (work.cut(x.detach(), i).double() if i in floats else work.cut(x, i)).requires_grad_(i in floats)
        for i, x in enumerate(inputs)
    ]
    expected = _several(work.run(*exact, backend="reference"))
    cut_cotangents = [work.cut(x, -1).double() for x in cotangents]
    wanted = torch.autograd.grad(expected, [exact[i] for i in floats], cut_cotangents)
    rounding = 1.0 if bench.dtype == torch.bfloat16 else 1e-5 / max(work.limits.values())
    errors = {"o": max(relative_error(work.cut(a, -1), b) for a, b in zip(outputs, expected, strict=True))}
    for i, name, got, want in zip(floats, work.gradients, found, wanted, strict=True):
        errors[name] = relative_error(work.cut(got, i), want)
    return {name: Check(error, work.limits[name] * rounding) for name, error in errors.items()}


def _row(
    bench: Bench,
    work: Work,
    ceilings: Ceilings,
    name: str,
    which: int,
    timing: Timing,
    checks: Mapping[str, Check],
    sets: Sequence[Sequence[Tensor]],
    moved: float | None = None,
) -> Row:
    moved = work.moved[which] if moved is None else moved
    rates = {"GB/s": moved / timing.ms / 1e6, "% of copy": 100 * moved / timing.ms / ceilings.bytes_per_ms}
    if work.flops[which]:
        rates["TFLOP/s"] = work.flops[which] / timing.ms / 1e9
    target = work.targets[which]
    alone = work.splits_backward and which == 1
    return Row(
        name,
        work.shape,
        timing.ms,
        target=None if bench.quick or target is None else Target("at most", target),
        floor=ceilings.floor_ms(moved, work.flops[which]),
        peers={peer: _peer(bench, prepare, sets, which, alone) for peer, prepare in work.peers.items()},
        checks=checks,
        rates=rates,
        note="timed by events" if timing.method == "events" else "",
    )


def _peer(bench: Bench, prepare: Peer, sets: Sequence[Sequence[Tensor]], which: int, alone: bool) -> Timing | str:
    def build(which: int) -> list[Callable[[], object]]:
        prepared = [prepare(*inputs) for inputs in sets]
        if not which:
            return [_forward(run, inputs) for run, inputs in prepared]
        cotangents = _cotangents(*prepared[0])
        return [_forward_backward(run, inputs, cotangents) for run, inputs in prepared]

    timing = bench.peer(lambda: build(which))
    if not alone or isinstance(timing, str):
        return timing
    forward = bench.peer(lambda: build(0))
    return forward if isinstance(forward, str) else Timing(timing.ms - forward.ms, timing.method)


def _forward(run: Run, inputs: Sequence[Tensor]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return run(*inputs)

    return call


def _forward_backward(run: Run, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Callable[[], Any]:
    return forward_backward(lambda *leaves: _several(run(*leaves)), inputs, grads)


def _cotangents(run: Run, inputs: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [torch.randn_like(x) for x in _several(run(*inputs))]


def _several(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def taylor_work(bench: Bench, B: int, T: int, V: int, **more: Any) -> Work:
    """Linear attention of 16 heads, feature dim 16."""
    H, F = bench.size(16, 2), bench.size(16, 8)
    token_heads = B * T * H
    features = 2 * packed_rows(F) * (V + 1)
    # Forward reads q, k, v and writes o and the fp32 normaliser; backward reads those and do, and writes dq, dk, dv.
    forward_bytes = 2 * (2 * F + 2 * V) + 4
    backward_bytes = 2 * (2 * F + 3 * V) + 4 + 2 * (2 * F + V)
    forward_flops = (CHUNK + 64) * (F + V) + 2 * features
    backward_flops = (CHUNK + 64) * (3 * F + 2 * V) + 5 * features

    def inputs() -> list[Tensor]:
        return [bench.random(B, T, H, size) for size in (F, F, V)]

    return Work(
        "taylor",
        f"B{B} T{T} H{H} F{F} V{V}",
        lambda q, k, v, backend: taylor_attention(q, k, v, backend=backend)[0],
        inputs,
        cut=lambda x, i: x[:1, :, :2],
        gradients=("dq", "dk", "dv"),
        limits={"o": 3e-3, "dq": 5e-3, "dk": 4e-3, "dv": 4e-3},
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
    """Beside softmax attention of the same shape and the kernels of flash-linear-attention."""
    peers = {"SDPA flash": _flash, "fla parallel_based": _fla_parallel, "fla fused_chunk_based": _fla_fused_chunk}
    targets = TAYLOR_TARGETS_MS.get((B, T), (None, None))
    return measure(bench, taylor_work(bench, B, T, bench.size(64, 16), targets=targets, peers=peers), ceilings())


def wide_taylor_rows(bench: Bench, ceilings: Callable[[], Ceilings]) -> list[Row]:
    """The head dim of the 1.3B model, held against a multiple of the time at head dim 64."""
    B, T = bench.size(8, 2), bench.size(2048, 48)
    narrow = measure(bench, taylor_work(bench, B, T, bench.size(64, 16)), ceilings())
    targets = tuple(WIDE_TARGET * row.value for row in narrow)
    return measure(
        bench, taylor_work(bench, B, T, bench.size(112, 24), targets=targets, peers={"SDPA flash": _flash}), ceilings()
    )


def taylor_scaling(bench: Bench, ceilings: Callable[[], Ceilings]) -> list[Row]:
    """One sequence of 2k to 256k tokens: checked at every length, and the time per token must not grow."""
    rows: list[Row] = []
    for doubling in range(bench.size(8, 2)):
        T = bench.size(2048, 32) << doubling
        rows += measure(bench, taylor_work(bench, 1, T, bench.size(64, 16)), ceilings())
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    if not bench.quick:
        for which, name in enumerate(("forward", "forward + backward")):
            # Two rows a length: forward, and forward with backward.
            eighth, longest = rows[2 * 4 + which], rows[2 * 7 + which]
            ratio = longest.value / (8 * eighth.value)
            rows.append(
                Row(
                    f"taylor {name}, time per token",
                    "B1 T262144 / T32768",
                    ratio,
                    "x",
                    Target("at most", SCALING_TARGET),
                )
            )
    return rows


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Run, Sequence[Tensor]]:
    """Causal softmax attention with heads of the value's size: what a transformer does in this place."""
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
    """A window of 128 at head dims 64 and 112, on views of a fused projection."""
    B, T, H, W = bench.size(8, 2), bench.size(2048, 40), bench.size(16, 2), bench.size(128, 8)
    rows: list[Row] = []
    for V in (bench.size(64, 16), bench.size(112, 24)):
        elements = B * T * H * V

        def inputs(V: int = V) -> list[Tensor]:
            fused = bench.random(T, B, 3 * H * V)
            return [part.transpose(0, 1).unflatten(-1, (H, V)) for part in fused.chunk(3, dim=-1)]

        peers: dict[str, Peer] = {
            "SDPA flash, whole past": _flash,
            "flash-attn": functools.partial(_flash_attn_window, W),
            "FlexAttention": functools.partial(_flex_window, bench, W),
        }
        work = Work(
            "window",
            f"B{B} T{T} H{H} V{V} W{W}",
            lambda q, k, v, backend: sliding_window_attention(q, k, v, window_left=W, backend=backend),
            inputs,
            cut=lambda x, i: x[:1, :, :2],
            gradients=("dq", "dk", "dv"),
            limits={"o": 3e-3, "dq": 5e-3, "dk": 4e-3, "dv": 4e-3},
            moved=(2 * 4 * elements, 2 * (4 + 5 + 3) * elements),
            flops=(4 * W * elements, 14 * W * elements),
            targets=(None, WINDOW_TARGET_MS if V == 64 else None),
            peers=peers,
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
    run = functools.partial(_compiled(bench, flex_attention), block_mask=mask)
    return run, [x.transpose(1, 2).contiguous() for x in (q, k, v)]


COPY_SHARE = 0.7
"""Of the copy bandwidth, that a kernel bound by memory should reach."""


def conv_rows(bench: Bench, ceilings: Callable[[], Ceilings]) -> list[Row]:
    """Three taps, at two widths, on the halves of a fused projection as in the model."""
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
            "gated conv",
            f"B{B} T{T} D{D} K{K}",
            lambda x, w, backend: gated_conv_fused(x, w, backend=backend),
            inputs,
            cut=cut,
            gradients=("du, dgate", "dweight"),
            limits={"o": 3e-3, "du, dgate": 4e-3, "dweight": 4e-3},
            moved=(3.0 * size, 8.0 * size),
            targets=(forward_ms, backward_ms),
            peers={"causal-conv1d": _causal_conv1d},
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


def norm_rows(bench: Bench, ceilings: Callable[[], Ceilings]) -> list[Row]:
    """The residual stream of based-1b: fp32 residual, update and output in the weights' dtype."""
    N, D = bench.size(16384, 12), bench.size(1792, 32)
    narrow = torch.finfo(bench.dtype).bits // 8
    forward = N * D * (4 + narrow + 4 + narrow)
    backward = N * D * (narrow + 4 + 4 + 4 + narrow)

    def inputs() -> list[Tensor]:
        return [bench.random(N, D, dtype=torch.float32), bench.random(N, D), 1 + bench.random(D, scale=0.1)]

    work = Work(
        "add + RMSNorm",
        f"N{N} D{D}, fp32 residual",
        lambda residual, update, weight, backend: add_rms_norm(residual, update, weight, 1e-5, backend=backend),
        inputs,
        cut=lambda x, i: x,
        gradients=("dresidual", "dupdate", "dweight"),
        limits={"o": 3e-3, "dresidual": 4e-3, "dupdate": 4e-3, "dweight": 4e-3},
        moved=(forward, forward + backward),
        peers={
            "PyTorch": lambda *x: (_plain_norm, x),
            "torch.compile": lambda *x: (_compiled(bench, _plain_norm), x),
            "Liger (bf16 residual)": lambda r, u, w: (_liger_norm(), (u, r.to(u.dtype), w)),
        },
    )
    return measure(bench, work, ceilings())


def swiglu_rows(bench: Bench, ceilings: Callable[[], Ceilings]) -> list[Row]:
    """The MLP of based-1b."""
    N, W = bench.size(16384, 12), bench.size(3584, 24)
    element = N * W * torch.finfo(bench.dtype).bits // 8
    work = Work(
        "SwiGLU",
        f"N{N} W{W}",
        lambda x, backend: swiglu(x, backend=backend),
        lambda: [bench.random(N, 2 * W)],
        cut=lambda x, i: x,
        gradients=("dx",),
        limits={"o": 4e-3, "dx": 4e-3},
        moved=(3.0 * element, 8.0 * element),
        peers={
            "PyTorch": lambda x: (swiglu, (x,)),
            "torch.compile": lambda x: (_compiled(bench, swiglu), (x,)),
            "Liger (halves swapped)": lambda x: (_liger_swiglu(), (x,)),
        },
    )
    return measure(bench, work, ceilings())


def cross_entropy_rows(bench: Bench, ceilings: Callable[[], Ceilings]) -> list[Row]:
    """The vocabulary of based-1b on one rank; the gradient is written over the logits, so each call works on a copy."""
    N, C = bench.size(16384, 12), bench.size(50264, 91)
    element = N * C * torch.finfo(bench.dtype).bits // 8
    tokens = min(N, 256)

    def inputs() -> list[Tensor]:
        return [bench.random(N, C), torch.randint(0, C, (N,), device=bench.device)]

    def run(logits: Tensor, labels: Tensor, backend: str) -> Tensor:
        # A copy as in a model, where the logits are an intermediate value.
        return vocab_cross_entropy(logits.clone(), labels, backend=backend)

    work = Work(
        "cross entropy",
        f"N{N} C{C}, with a copy of the logits",
        run,
        inputs,
        cut=lambda x, i: x[:tokens],
        gradients=("dlogits",),
        limits={"o": 3e-3, "dlogits": 4e-3},
        moved=(3.0 * element, 5.0 * element),
        peers={
            "PyTorch": lambda *x: (functools.partial(run, backend="reference"), x),
            "torch.compile": lambda *x: (_compiled(bench, _plain_cross_entropy), x),
            "Liger": lambda *x: (_liger_cross_entropy(), x),
        },
    )
    return measure(bench, work, ceilings())


def _plain_norm(residual: Tensor, update: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return add_rms_norm(residual, update, weight, 1e-5)


def _plain_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.clone().float(), labels, reduction="none")


def _compiled(bench: Bench, run: Run) -> Run:
    if bench.device.type != "cuda":
        raise NotImplementedError("compiled for a GPU only")
    return _compile(run)


@functools.cache
def _compile(run: Run) -> Run:
    return torch.compile(run, dynamic=False)


def _liger_norm() -> Run:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return lambda x, residual, weight: LigerFusedAddRMSNormFunction.apply(x, residual, weight, 1e-5)


def _liger_swiglu() -> Run:
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return LigerFusedGateUpSiLUMulFunction.apply


def _liger_cross_entropy() -> Run:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits, labels: liger_cross_entropy(logits.clone(), labels, reduction="none")
