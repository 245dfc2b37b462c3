"""States that decay, on their way between slices of a sequence: what mixers with such a state need for context parallelism.

Legend: B sequences, L tokens of this rank's slice, H heads, K key dim, V value head dim, P ranks, X numbers of a rank, J = K or 1
decays of a head.

    S after slice p = M_p + e^(G_p) (S before it),    S before slice r = sum_(p < r) gate_rp e^(sum of G_s, p < s < r) M_p

where M_p is what the last document of slice p adds to a state of zeros, and G_p the sum of its log decays. Gates are 1 where one
document goes on from the end of slice p to the start of slice r.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from based_megatron.parallel.sequence.plan import SequencePlan
from based_megatron.parallel.sequence.ranks import ContextRanks
from based_megatron.parallel.sequence.states import STATE


def state_before(k_BLHK: Tensor, v_BLHV: Tensor, log_decay_BLHJ: Tensor, plan: SequencePlan) -> Tensor | None:
    """The state [B, H, K, V] before this slice, fp32 or wider; None if no document goes on from one rank to the next.

    Gradients flow to the keys, values and decays of all slices.
    """
    if not plan.crosses:
        return None
    moments_BHKV, total_BHJ = _of_slice(k_BLHK, v_BLHV, log_decay_BLHJ, plan.document_ids())
    sizes = [moments_BHKV[0].numel(), total_BHJ[0].numel()]
    own_BX = torch.cat([moments_BHKV.flatten(1), total_BHJ.flatten(1)], dim=1)
    all_PBX = _GatheredOverRanks.apply(own_BX, plan.ranks)
    moments, totals = (
        part.unflatten(2, like.shape[1:])
        for part, like in zip(all_PBX.split(sizes, dim=2), (moments_BHKV, total_BHJ), strict=True)
    )
    gates_BP = plan.device_rank_gates[:, plan.ranks.rank].to(moments.dtype)
    # All ranks take part in what goes back, the first too, which reads nothing.
    before = torch.zeros_like(moments_BHKV)
    decay_BHJ = torch.zeros_like(total_BHJ)
    for p in reversed(range(plan.ranks.size)):
        gate_B = gates_BP[:, p, None, None, None]
        before = before + gate_B * decay_BHJ.exp()[..., None] * moments[p]
        if p < plan.ranks.rank:
            decay_BHJ = decay_BHJ + totals[p]
    return before


def _of_slice(k: Tensor, v: Tensor, log_decay: Tensor, ids_BL: Tensor | None) -> tuple[Tensor, Tensor]:
    """(what the last document of the slice adds to a state of zeros [B, H, K, V], the sum of all log decays [B, H, J])."""
    dtype = torch.promote_types(log_decay.dtype, torch.float32)
    k, v, g = (x.to(dtype) for x in (k, v, log_decay))
    # Sums from the end: those of the last tokens, which count most, are the most exact.
    since = g.flip(1).cumsum(1).flip(1)
    left = (since - g).exp()
    if ids_BL is not None:
        left = left * (ids_BL == ids_BL[:, -1:])[..., None, None]
    return torch.einsum("blhk,blhv->bhkv", k * left, v), since[:, 0]


class _GatheredOverRanks(torch.autograd.Function):
    """A tensor [B, X] of each context parallel rank to those of all, [P, B, X]."""

    @staticmethod
    def forward(ctx: Any, own_BX: Tensor, ranks: ContextRanks) -> Tensor:
        assert ranks.states is not None
        ctx.ranks = ranks
        return ranks.states.all_gather(STATE, own_BX.contiguous()).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dall_PBX: Tensor) -> tuple[Tensor, None]:
        # What each rank made of this one's tensor, added in the order of ranks.
        return ctx.ranks.states.all_to_all(STATE, dall_PBX.contiguous()).sum(0), None
