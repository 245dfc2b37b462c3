"""Decayed states between slices: outputs and gradients of slices equal those of the whole sequence, with documents and odd slices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from based_megatron.baselines.operations.scalar_decay import scalar_decay
from based_megatron.baselines.operations.vector_decay import vector_decay
from based_megatron.baselines.slices import state_before
from based_megatron.parallel.sequence.ranks import ContextRanks
from support.sequence import on_threads, plan_for, seeded, telling_documents

BOUNDS = [(0, 9, 20), (0, 1, 2, 11, 13)]
"""Two slices, and four, two of them of one token."""
H, K, V = 2, 3, 4
OPERATIONS = {"scalar": (scalar_decay, ()), "vector": (vector_decay, (K,))}


def inputs_of(batch: int, tokens: int, decays: tuple[int, ...]) -> list[Tensor]:
    """q, k, v and log decays of whole sequences, and what outputs are weighted with."""
    q, k = (seeded(batch, tokens, H, K, seed=seed) for seed in (1, 2))
    v, weights = (seeded(batch, tokens, H, V, seed=seed) for seed in (3, 4))
    return [q, k, v, -seeded(batch, tokens, H, *decays, seed=5).abs(), weights]


def with_gradients(
    operation: Callable[..., Any], *inputs: Tensor, before: Callable[..., Tensor | None], **options: Any
):
    """Outputs, and gradients to q, k, v and decays."""
    *inputs, weights = (x.clone() for x in inputs)
    for x in inputs:
        x.requires_grad_()
    o, _ = operation(*inputs, initial_state_BHKV=before(*inputs[1:]), **options)
    (o * weights).sum().backward()
    return [o.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_slices_equal_the_whole(bounds, packed, name):
    operation, decays = OPERATIONS[name]
    ids = telling_documents(bounds) if packed else None
    whole = inputs_of(2 if ids is None else len(ids), bounds[-1], decays)
    expected = with_gradients(operation, *whole, before=lambda *_: None, document_ids_BT=ids)

    def program(ranks: ContextRanks) -> list[Tensor]:
        plan = plan_for(ranks, bounds, ids)

        def before(k: Tensor, v: Tensor, g: Tensor) -> Tensor | None:
            return state_before(k, v, g if decays else g[..., None], plan)

        own = [x[:, plan.start : plan.end] for x in whole]
        return with_gradients(operation, *own, before=before, document_ids_BT=plan.document_ids())

    found = on_threads(len(bounds) - 1, program)
    for parts, want in zip(zip(*found, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=1), want, rtol=1e-11, atol=1e-11)


def test_nothing_is_sent_where_no_document_crosses():
    bounds = BOUNDS[0]
    ids = torch.arange(20)[None] // 9

    def program(ranks: ContextRanks) -> Tensor | None:
        _, k, v, g, _ = inputs_of(1, 9, (K,))
        return state_before(k, v, g, plan_for(ranks, bounds, ids))

    assert on_threads(2, program) == [None, None]
