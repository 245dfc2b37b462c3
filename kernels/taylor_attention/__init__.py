"""Causal normalised linear attention of second order with a packed state: that of Taylor (Based), or squares alone (ReBased).

Legend: B batch, T tokens, L tokens of a slice, H heads, F feature dim, V value head dim, R rows of a packed state:
1 + F + F(F+1)/2, or F(F+1)/2 of squares alone.

A state is [B, H, R, V + 1]: the moments sum_j packed(k_j) [v_j; 1]^T without weights. Row 0 sums [v; 1], rows 1..F sum
k_a [v; 1], then k_a k_b [v; 1] for a <= b in row-major order; a state of squares has these last rows only. It is fp32, or
fp64 for fp64 inputs. States of consecutive pieces of one document add up.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from based_megatron.kernels.backend import implementation
from based_megatron.kernels.exchange import StateExchange
from based_megatron.kernels.packing import packed_rows
from based_megatron.kernels.taylor_attention import attention, reference
from based_megatron.kernels.taylor_attention.attention import Watch

__all__ = [
    "finish_sliced_attention",
    "start_sliced_attention",
    "taylor_attention",
    "taylor_moments",
]


def taylor_attention(
    q_BTHF: Tensor,
    k_BTHF: Tensor,
    v_BTHV: Tensor,
    *,
    initial_state_BHRV: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    return_final_state: bool = False,
    watch: Watch | None = None,
    square: bool = False,
    chunk_tokens: int | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor | None]:
    """o_i = sum_j w_ij v_j / sum_j w_ij over j <= i, with w = 1 + s + s^2/2 and s = q.k / sqrt(F).

    Args:
        q_BTHF, k_BTHF, v_BTHV: fp64, fp32 or bf16; any T >= 1.
        initial_state_BHRV: [B, H, R, V + 1], what came before in the document of each row's FIRST token; the caller
            zeroes a row whose first token starts a document. None is zero.
        document_ids_BT: integers that do not decrease along T; a token sees only its own document. None: one document.
        return_final_state: also return the moments of the last token's document, with the initial state if that
            document is the first token's too.
        watch: called with that state, without gradients, and the smallest normaliser of any token, a scalar.
        square: w = s^2 instead, and 1e-5 more in the denominator: the form of ReBased, for queries and keys that are normed.
        chunk_tokens: tokens computed at a time; changes speed and memory, not the result. None picks what suits the
            device: a GPU wants fewer, larger steps.
        backend: a name from `resolve_backend`.

    Returns: o_BTHV in the dtype of v, and the final state [B, H, R, V + 1] or None. Gradients flow to q, k, v and the
    initial state, from both outputs.

    Source: Arora et al. 2024 (arXiv 2402.18668), without its epsilon: w >= 1/2, so the normaliser is never small. Squares:
    Aksenov et al. 2024 (arXiv 2402.10644).

    >>> q_BTHF, k_BTHF, v_BTHV = torch.randn(2, 7, 3, 4), torch.randn(2, 7, 3, 4), torch.randn(2, 7, 3, 8)
    >>> o_BTHV, _ = taylor_attention(q_BTHF, k_BTHF, v_BTHV)
    >>> first, last = ([x[:, part] for x in (q_BTHF, k_BTHF, v_BTHV)] for part in (slice(0, 4), slice(4, 7)))
    >>> _, state = taylor_attention(*first, return_final_state=True)
    >>> o_last, _ = taylor_attention(*last, initial_state_BHRV=state)
    >>> state.shape, torch.allclose(o_last, o_BTHV[:, 4:], atol=1e-5)
    (torch.Size([2, 3, 15, 9]), True)
    """
    B, T, H, F = q_BTHF.shape
    state_shape = (B, H, packed_rows(F, square), v_BTHV.shape[-1] + 1)
    assert initial_state_BHRV is None or initial_state_BHRV.shape == state_shape, (
        initial_state_BHRV.shape,
        state_shape,
    )
    assert document_ids_BT is None or document_ids_BT.shape[1] == T, (document_ids_BT.shape, T)
    steps = _steps(backend, chunk_tokens, square, q_BTHF, k_BTHF, v_BTHV)
    if initial_state_BHRV is not None:
        initial_state_BHRV = initial_state_BHRV.to(reference.accumulation_dtype(q_BTHF.dtype)).contiguous()
    # Autocast would round the sums over thousands of tokens to bf16.
    with torch.autocast(q_BTHF.device.type, enabled=False):
        return attention.TaylorAttention.apply(
            q_BTHF, k_BTHF, v_BTHV, initial_state_BHRV, document_ids_BT, steps, return_final_state, watch
        )


def taylor_moments(
    k_BTHF: Tensor,
    v_BTHV: Tensor,
    *,
    document_ids_BT: Tensor | None = None,
    square: bool = False,
    chunk_tokens: int | None = None,
    backend: str = "reference",
) -> Tensor:
    """The state [B, H, R, V + 1] that the tokens of the first token's document make: a prefix that all queries may see.

    Args: as of `taylor_attention`, whose initial state it may be. Gradients flow to k and v.

    >>> k_BTHF, v_BTHV = torch.randn(2, 7, 3, 4), torch.randn(2, 7, 3, 8)
    >>> _, state = taylor_attention(k_BTHF, k_BTHF, v_BTHV, return_final_state=True)
    >>> torch.allclose(taylor_moments(k_BTHF, v_BTHV), state)
    True
    """
    if document_ids_BT is not None:
        # A scan leaves the moments of the last document; sums have no order.
        k_BTHF, v_BTHV, document_ids_BT = k_BTHF.flip(1), v_BTHV.flip(1), -document_ids_BT.flip(1)
    steps = _steps(backend, chunk_tokens, square, k_BTHF, v_BTHV)
    with torch.autocast(k_BTHF.device.type, enabled=False):
        return attention.TaylorMoments.apply(k_BTHF, v_BTHV, document_ids_BT, steps)


def start_sliced_attention(
    k_BLHF: Tensor,
    v_BLHV: Tensor,
    exchange: StateExchange,
    *,
    document_ids_BL: Tensor | None = None,
    square: bool = False,
    chunk_tokens: int | None = None,
    backend: str = "reference",
) -> attention.Started:
    """Begin the attention of one slice of a sequence: its moments are on the way while the queries are projected.

    Args: as of `taylor_attention`, for the tokens of this slice; exchange: how moments of slices become states.
    Returns: what `finish_sliced_attention` takes, once, with the same keys and values.

    >>> class OneSlice:
    ...     # The exchange of a sequence that is a single slice: nothing comes before it.
    ...     def start_prefix(self, moments): return self
    ...     def wait(self): return None
    >>> k_BLHF, v_BLHV = torch.randn(2, 7, 3, 4), torch.randn(2, 7, 3, 8)
    >>> started = start_sliced_attention(k_BLHF, v_BLHV, OneSlice())
    >>> started.state_before.wait() is None  # what `finish_sliced_attention` waits for
    True
    """
    steps = _steps(backend, chunk_tokens, square, k_BLHF, v_BLHV)
    with torch.autocast(k_BLHF.device.type, enabled=False):
        return attention.start(k_BLHF, v_BLHV, document_ids_BL, steps, exchange)


def finish_sliced_attention(
    q_BLHF: Tensor, k_BLHF: Tensor, v_BLHV: Tensor, started: attention.Started, *, watch: Watch | None = None
) -> Tensor:
    """o_BLHV of the slice, as `taylor_attention` of the whole sequence gives it. Gradients flow to q, k and v of all slices.

    watch: called with the state after the slice and the smallest normaliser of its tokens.

    >>> class OneSlice:
    ...     # The exchange of a sequence that is a single slice: nothing comes before it.
    ...     def start_prefix(self, moments): return self
    ...     def wait(self): return None
    >>> q_BLHF, k_BLHF, v_BLHV = torch.randn(2, 7, 3, 4), torch.randn(2, 7, 3, 4), torch.randn(2, 7, 3, 8)
    >>> started = start_sliced_attention(k_BLHF, v_BLHV, OneSlice())
    >>> o_BLHV = finish_sliced_attention(q_BLHF, k_BLHF, v_BLHV, started)
    >>> torch.equal(o_BLHV, taylor_attention(q_BLHF, k_BLHF, v_BLHV)[0])
    True
    """
    with torch.autocast(q_BLHF.device.type, enabled=False):
        return attention.SlicedTaylorAttention.apply(q_BLHF, k_BLHF, v_BLHV, started, watch)


def _steps(backend: str, chunk_tokens: int | None, square: bool, *inputs: Tensor) -> attention.Steps:
    load = implementation("taylor_attention", backend, {"reference": lambda: reference, "triton": _triton})
    module = load()
    return attention.Steps(module, module.schedule(chunk_tokens, *inputs, square=square))


def _triton() -> ModuleType:
    # Imported on first use: a machine without Triton runs the reference.
    from based_megatron.kernels.taylor_attention import triton_attention

    return triton_attention
