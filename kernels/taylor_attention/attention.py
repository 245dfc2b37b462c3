"""Taylor attention with its gradients, put together from the steps that a backend has.

Legend: B batch, T tokens of this slice, H heads, F feature dim, V value head dim, R rows of a packed state, E = V + 1.

    forward    scan_keys (k, v) -> states, given the one that enters -> attend (q, k, v) -> o, z
    backward   output_gradients (do, o, z) -> g, gz -> scan_queries (q, g, gz) -> query_gradients, given the states ->
               adjoint states, given the one that enters from the right -> key_gradients

A chunk scan knows its moments before it knows what enters it. Over slices of a sequence, the exchange of moments goes on meanwhile:
forward during what the caller does between `start` and `finish` (the projection of the queries), backward during dq.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from based_megatron.kernels.exchange import Pending, StateExchange
from based_megatron.kernels.layout import unit_last_stride

Watch = Callable[[Tensor, Tensor], None]
"""Is given the state after the sequence, [B, H, R, E], and the smallest normaliser of its tokens, a scalar."""


@dataclass(frozen=True)
class Steps:
    """The backend that runs the steps, and its schedule."""

    backend: ModuleType
    """`reference` or `triton_attention`: both have the functions named above."""
    schedule: Any
    """Sizes of chunks and tiles, and whether weights are squares alone, from the backend's `schedule`."""


class TaylorAttention(Function):
    """(q, k, v, initial state or None, document ids or None) to (o, final state or None)."""

    @staticmethod
    def forward(
        ctx: Any, q_BTHF: Tensor, k_BTHF: Tensor, v_BTHV: Tensor, initial_BHRE: Tensor | None, ids_BT: Tensor | None,
        steps: Steps, wants_final: bool, watch: Watch | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        q_BTHF, k_BTHF, v_BTHV = (unit_last_stride(x) for x in (q_BTHF, k_BTHF, v_BTHV))
        scan = steps.backend.scan_keys(k_BTHF, v_BTHV, ids_BT, steps.schedule)
        o_BTHV, z = _attend(ctx, q_BTHF, k_BTHF, v_BTHV, ids_BT, steps, scan.states(initial_BHRE))
        ctx.has_initial = initial_BHRE is not None
        ctx.set_materialize_grads(False)
        final = _passed_on(initial_BHRE, scan.moments(), ids_BT) if wants_final or watch is not None else None
        if watch is not None and final is not None:
            watch(final, steps.backend.smallest_normaliser(z))
        return o_BTHV, final if wants_final else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BTHV: Tensor | None, dfinal_BHRE: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients, moments = _gradients(ctx, do_BTHV, lambda _: _Given(dfinal_BHRE))
        dinitial = _passed_on(dfinal_BHRE, moments(), ctx.saved_tensors[5]) if ctx.has_initial else None
        return *gradients, dinitial, None, None, None, None


class TaylorMoments(Function):
    """(k, v, document ids or None) to the moments of the last token's document."""

    @staticmethod
    def forward(ctx: Any, k_BTHF: Tensor, v_BTHV: Tensor, ids_BT: Tensor | None, steps: Steps) -> Tensor:
        k_BTHF, v_BTHV = unit_last_stride(k_BTHF), unit_last_stride(v_BTHV)
        ctx.save_for_backward(k_BTHF, v_BTHV, ids_BT)
        ctx.steps = steps
        return steps.backend.scan_keys(k_BTHF, v_BTHV, ids_BT, steps.schedule).moments()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstate_BHRE: Tensor) -> tuple[Tensor | None, ...]:
        """As of attention to which no output gradient comes: the keys stand in for its queries."""
        k_BTHF, v_BTHV, ids_BT = ctx.saved_tensors
        backend, schedule = ctx.steps.backend, ctx.steps.schedule
        g, gz = backend.no_output_gradients(v_BTHV)
        scan = backend.scan_queries(k_BTHF, g, gz, ids_BT, schedule)
        dk_BTHF, dv_BTHV = backend.key_gradients(
            k_BTHF, k_BTHF, v_BTHV, g, gz, ids_BT, scan.states(dstate_BHRE.contiguous()), schedule
        )
        return dk_BTHF, dv_BTHV, None, None


@dataclass(frozen=True)
class Started:
    """Attention over a slice of a sequence whose queries are still to come."""

    k_BTHF: Tensor
    v_BTHV: Tensor
    ids_BT: Tensor | None
    steps: Steps
    scan: Any
    state_before: Pending[Tensor | None]
    exchange: StateExchange


@torch.no_grad()
def start(k_BTHF: Tensor, v_BTHV: Tensor, ids_BT: Tensor | None, steps: Steps, exchange: StateExchange) -> Started:
    """Begin attention: scan the keys and send their moments on the way."""
    k_BTHF, v_BTHV = unit_last_stride(k_BTHF.detach()), unit_last_stride(v_BTHV.detach())
    scan = steps.backend.scan_keys(k_BTHF, v_BTHV, ids_BT, steps.schedule)
    return Started(k_BTHF, v_BTHV, ids_BT, steps, scan, exchange.start_prefix(scan.moments), exchange)


class SlicedTaylorAttention(Function):
    """(q, k, v, what `start` made of k and v) to o."""

    @staticmethod
    def forward(
        ctx: Any, q_BTHF: Tensor, k_BTHF: Tensor, v_BTHV: Tensor, started: Started, watch: Watch | None
    ) -> Tensor:
        scan, steps, ids_BT, before = started.scan, started.steps, started.ids_BT, started.state_before.wait()
        ctx.exchange = started.exchange
        q_BTHF = unit_last_stride(q_BTHF)
        o_BTHV, z = _attend(ctx, q_BTHF, started.k_BTHF, started.v_BTHV, ids_BT, steps, scan.states(before))
        if watch is not None:
            watch(_passed_on(before, scan.moments(), ids_BT), steps.backend.smallest_normaliser(z))
        return o_BTHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BTHV: Tensor) -> tuple[Tensor | None, ...]:
        gradients, _ = _gradients(ctx, do_BTHV, ctx.exchange.start_suffix)
        return *gradients, None, None


def _attend(
    ctx: Any, q_BTHF: Tensor, k_BTHF: Tensor, v_BTHV: Tensor, ids_BT: Tensor | None, steps: Steps, states: tuple
) -> tuple[Tensor, Tensor]:
    o_BTHV, z = steps.backend.attend(q_BTHF, k_BTHF, v_BTHV, ids_BT, states, steps.schedule)
    ctx.save_for_backward(q_BTHF, k_BTHF, v_BTHV, o_BTHV, z, ids_BT, *states)
    ctx.steps, ctx.states_type = steps, type(states)
    return o_BTHV, z


def _gradients(
    ctx: Any, do_BTHV: Tensor | None, start_suffix: Callable[[Callable[[], Tensor]], Pending[Tensor | None]]
) -> tuple[tuple[Tensor, Tensor, Tensor], Callable[[], Tensor]]:
    """(dq, dk, dv), and what gives the adjoint moments. What enters from the right is asked for first and needed last."""
    q_BTHF, k_BTHF, v_BTHV, o_BTHV, z, ids_BT, *states = ctx.saved_tensors
    backend, schedule = ctx.steps.backend, ctx.steps.schedule
    do_BTHV = torch.zeros_like(o_BTHV) if do_BTHV is None else unit_last_stride(do_BTHV)
    g, gz = backend.output_gradients(do_BTHV, o_BTHV, z)
    scan = backend.scan_queries(q_BTHF, g, gz, ids_BT, schedule)
    state_after = start_suffix(scan.moments)
    inputs = (q_BTHF, k_BTHF, v_BTHV, g, gz, ids_BT)
    dq_BTHF = backend.query_gradients(*inputs, ctx.states_type._make(states), schedule)
    dk_BTHF, dv_BTHV = backend.key_gradients(*inputs, scan.states(state_after.wait()), schedule)
    return (dq_BTHF, dk_BTHF, dv_BTHV), scan.moments


@dataclass(frozen=True)
class _Given:
    """A state that is there already."""

    state_BHRE: Tensor | None

    def wait(self) -> Tensor | None:
        return self.state_BHRE


def _passed_on(state_BHRE: Tensor | None, moments_BHRE: Tensor, ids_BT: Tensor | None) -> Tensor:
    """The state on the other side of a slice: its moments, plus what entered if one document goes all the way through."""
    if state_BHRE is None:
        return moments_BHRE
    if ids_BT is not None:
        is_open_B = (ids_BT[:, 0] == ids_BT[:, -1]).to(state_BHRE.dtype)
        state_BHRE = state_BHRE * is_open_B[:, None, None, None]
    return moments_BHRE + state_BHRE
