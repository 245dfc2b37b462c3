"""States of linear attention on their way between slices, as the kernels' fused attention asks for them (kernels/exchange.py).

Legend: B sequences, H heads, R rows of a state, V value head dim, P ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from based_megatron.parallel.sequence.carried import STEP_BEFORE
from based_megatron.parallel.sequence.channel import Pending
from based_megatron.parallel.sequence.messages import deliver
from based_megatron.parallel.sequence.plan import SequencePlan
from based_megatron.parallel.sequence.scan import start_gated_sum

STATE = "state"


@dataclass(frozen=True)
class StateExchange:
    """The exchange of one layer in one micro batch.

    Forward asks for the state before the slice, backward for the adjoint state after it.
    """

    plan: SequencePlan
    layer: int
    keep: bool = False
    """Keep what came, for a second forward pass that recomputes activations."""

    def start_prefix(self, moments: Callable[[], Tensor]) -> Pending[Tensor | None]:
        """Begin to find the state before this slice: [B, H, R, V + 1], or None where no earlier token matters.

        moments: gives the moments of the slice's last document; not called if nobody needs them.
        """
        key = (STATE, self.layer)
        if key in self.plan.kept:
            return Pending.done(self.plan.kept[key])
        found = self._prefix(moments)
        if self.keep:
            found = found.then(lambda state: self.plan.kept.setdefault(key, state))
        return found

    def start_suffix(self, moments: Callable[[], Tensor]) -> Pending[Tensor | None]:
        """Begin to find the adjoint state after this slice: the gradient to its final state, or None.

        moments: gives the adjoint moments of the slice's first document.
        """
        if not self.plan.crosses:
            return Pending.done(None)
        found = start_gated_sum(moments(), self.plan, reverse=True)
        needed = self.plan.rank_gates[:, :, self.plan.ranks.rank].any()
        return found.then(lambda state: state if needed else None)

    def _prefix(self, moments: Callable[[], Tensor]) -> Pending[Tensor | None]:
        plan, rank = self.plan, self.plan.ranks.rank
        if not plan.gates.any():
            return Pending.done(None)
        own, carried = moments(), self._carried()
        found: Pending[Tensor | None] = Pending.done(carried)
        if plan.crosses:
            # A carried state is on the first rank alone, and no other state flows into that rank's slice.
            needed = carried is None and bool(plan.rank_gates[:, rank].any())
            summed = start_gated_sum(self._after(own, carried), plan)
            found = summed.then(lambda state: state if needed else carried)
        return found.then(lambda before: self._hand_on(own, before))

    def _carried(self) -> Tensor | None:
        """The carried state of the sequences whose document goes on in this slice, zeros for others; None if there is none."""
        before = self.plan.carried.before.get((STATE, self.layer))
        if before is None or not self.plan.flows_anywhere(STEP_BEFORE, 0):
            return None
        return _select(self.plan.flows(STEP_BEFORE, 0), before)

    def _after(self, own: Tensor, before: Tensor | None) -> Tensor:
        """The state after this slice, of its last document, from the slice's moments and the state before it."""
        if before is None:
            return own
        rank = self.plan.ranks.rank
        return own + _select(self.plan.flows(rank - 1, rank + 1), before)

    def _hand_on(self, own: Tensor, before: Tensor | None) -> Tensor | None:
        """Begin to send the state after the sequence to the next step. Returns the state before this slice, as it is."""
        plan = self.plan
        # The slice that has the last row of the sequence also has the state after it.
        if parcels := [plan.parcel(message) for message in plan.carried_messages(rows=1)]:
            arriving = deliver(
                plan.ranks, "carried", parcels, lambda _: self._after(own, before), lambda _: torch.empty_like(own)
            )
            plan.carried.after[STATE, self.layer] = arriving.then(lambda arrived: arrived[0][1] if arrived else None)
        return before


def _select(chosen_B: Tensor, state: Tensor) -> Tensor:
    """The state of chosen sequences, zeros for others. Not a product: a state that is not a number must not come through."""
    return torch.where(chosen_B.view(-1, *([1] * (state.ndim - 1))), state, 0.0)
