"""Causal normalised Taylor linear attention with a packed state.

Legend: B batch, T local sequence, H heads, F feature dim, V value head dim, R = 1 + F + F(F+1)/2 packed rows.

A state is [B, H, R, V + 1]: the moments sum_j packed(k_j) [v_j; 1]^T without weights. Row 0 sums [v; 1], rows 1..F sum
k_a [v; 1], then k_a k_b [v; 1] for a <= b in row-major order. It is fp32, or fp64 for fp64 inputs. States of
consecutive pieces of one document add up.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from based_megatron.kernels.backend import implementation
from based_megatron.kernels.packing import packed_rows
from based_megatron.kernels.taylor_attention import reference

__all__ = ["recurrent_step", "segment_state", "taylor_attention"]


def taylor_attention(
    q_BTHF: Tensor,
    k_BTHF: Tensor,
    v_BTHV: Tensor,
    *,
    initial_state_BHRV: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    return_final_state: bool = False,
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
        chunk_tokens: tokens computed at a time; changes speed and memory, not the result. None picks what suits the
            device: a GPU wants fewer, larger steps.
        backend: a name from `resolve_backend`.

    Returns: o_BTHV in the dtype of v, and the final state [B, H, R, V + 1] or None. Gradients flow to q, k, v and the
    initial state, from both outputs.

    Source: Arora et al. 2024 (arXiv 2402.18668), without its epsilon: w >= 1/2, so the normaliser is never small.
    """
    B, T, H, F = q_BTHF.shape
    state_shape = (B, H, packed_rows(F), v_BTHV.shape[-1] + 1)
    assert initial_state_BHRV is None or initial_state_BHRV.shape == state_shape, (
        initial_state_BHRV.shape,
        state_shape,
    )
    assert document_ids_BT is None or document_ids_BT.shape[1] == T, (document_ids_BT.shape, T)
    run = implementation(
        "taylor_attention", backend, {"reference": reference.taylor_attention, "triton": _triton_attention}
    )
    o_BTHV, final_state_BHRV = run(q_BTHF, k_BTHF, v_BTHV, initial_state_BHRV, document_ids_BT, chunk_tokens)
    return o_BTHV, final_state_BHRV if return_final_state else None


def segment_state(
    k_BTHF: Tensor,
    v_BTHV: Tensor,
    document_ids_BT: Tensor | None = None,
    *,
    chunk_tokens: int | None = None,
    backend: str = "reference",
) -> Tensor:
    """Moments of the tokens in the last token's document: the final state of `taylor_attention` from a zero state.

    Needs no queries and no earlier state, so a sequence-parallel rank can send it before computing its outputs.
    Returns: [B, H, R, V + 1]; gradients flow to k and v.
    """
    T = k_BTHF.shape[1]
    assert document_ids_BT is None or document_ids_BT.shape[1] == T, (document_ids_BT.shape, T)
    run = implementation("segment_state", backend, {"reference": reference.segment_state, "triton": _triton_state})
    return run(k_BTHF, v_BTHV, document_ids_BT, chunk_tokens)


def recurrent_step(
    q_BHF: Tensor, k_BHF: Tensor, v_BHV: Tensor, state_BHRV: Tensor, *, backend: str = "reference"
) -> tuple[Tensor, Tensor]:
    """One decoding step: absorb (k, v) into the state [B, H, R, V + 1], then attend with q.

    Returns: o_BHV in the dtype of v, and the new state; the old one is left as it was.
    """
    run = implementation("recurrent_step", backend, {"reference": reference.recurrent_step})
    return run(q_BHF, k_BHF, v_BHV, state_BHRV)


def _triton_attention(*args: Any) -> tuple[Tensor, Tensor]:
    # Imported on first use: a machine without Triton runs the reference.
    from based_megatron.kernels.taylor_attention import triton_attention

    return triton_attention.taylor_attention(*args)


def _triton_state(*args: Any) -> Tensor:
    from based_megatron.kernels.taylor_attention import triton_attention

    return triton_attention.segment_state(*args)
