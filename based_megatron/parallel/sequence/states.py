"""States of linear attention on their way between slices, as the kernels' fused attention asks for them (kernels/exchange.py)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from based_megatron.parallel.sequence.channel import Pending
from based_megatron.parallel.sequence.plan import SequencePlan
from based_megatron.parallel.sequence.scan import start_gated_sum

STATE = "state"


@dataclass(frozen=True)
class StateExchange:
    """Of one layer in one micro batch. Forward asks for the state before the slice, backward for the adjoint state after it."""

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
        found = self._continued(moments) if self.plan.carry is not None else self._prefix(moments)
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
        mine = self.plan.gates[:, :, self.plan.ranks.rank]
        return found.then(lambda state: state if mine.any() else None)

    def _prefix(self, moments: Callable[[], Tensor]) -> Pending[Tensor | None]:
        if not self.plan.crosses:
            return Pending.done(None)
        found = start_gated_sum(moments(), self.plan)
        mine = self.plan.gates[:, self.plan.ranks.rank]
        return found.then(lambda state: state if mine.any() else None)

    def _continued(self, moments: Callable[[], Tensor]) -> Pending[Tensor | None]:
        """The first slice starts from what the step before left, and passes it on if its document goes on."""
        plan, own = self.plan, moments()
        carry, ranks = plan.carry, plan.ranks
        assert carry is not None
        key, carried = (STATE, self.layer), None
        before = carry.before.get(key)
        if ranks.rank == 0 and before is not None and plan.documents is not None and any(plan.documents.tokens_before):
            carried = before * _per_row(plan.device_continues, own)
            own = own + carried * _per_row(plan.device_opens, own)
        prefix: Pending[Tensor | None] = Pending.done(carried)
        if plan.crosses:
            prefix = start_gated_sum(own, plan).then(lambda state: state if ranks.rank else carried)

        def leave(state: Tensor | None) -> Tensor | None:
            if (handed := self._hand_over(own, state)) is not None:
                carry.after[key] = handed
            return state

        return prefix.then(leave)

    def _hand_over(self, own: Tensor, state: Tensor | None) -> Pending[Tensor] | None:
        """The state at the end of the sequence goes to the first rank; the ranks between have nothing to do."""
        plan, ranks = self.plan, self.plan.ranks
        last = ranks.size - 1
        if ranks.rank == last and last and state is not None:
            own = own + state * _per_row(plan.device_opens, own)
        if last == 0:
            return Pending.done(own)
        assert ranks.halos is not None
        if ranks.rank == last:
            return ranks.halos.exchange("carry", [(0, own.contiguous())], []).then(lambda _: own)
        if ranks.rank:
            return None
        arriving = torch.empty_like(own)
        return ranks.halos.exchange("carry", [], [(last, arriving)]).then(lambda _: arriving)


def _per_row(gates_B: Tensor, like: Tensor) -> Tensor:
    return gates_B.to(like.dtype).view(-1, *([1] * (like.ndim - 1)))
