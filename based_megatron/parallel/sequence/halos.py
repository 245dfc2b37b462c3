"""Halos: the last rows of earlier slices, sent to the slices that look back at them, and the gradients of these rows, sent back.

Legend: B sequences, L tokens of this slice, N rows of the halo, t boundary rows: the last of this slice, which others may need.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from based_megatron.parallel.sequence.carried import STEP_BEFORE
from based_megatron.parallel.sequence.channel import Pending
from based_megatron.parallel.sequence.messages import Arrived, Message, Parcel, deliver, sum_of_rows
from based_megatron.parallel.sequence.plan import SequencePlan


@dataclass(frozen=True)
class HaloExchange:
    """The exchange of one kind of rows, in one layer and micro batch; kernels read it (kernels/exchange.py)."""

    plan: SequencePlan
    kind: str
    layer: int
    wanted: int
    """Rows that each token may look back."""
    keep: bool = False
    """Keep what came, for a second forward pass that recomputes activations."""
    renew: Callable[[Tensor], Tensor] = lambda rows: rows
    """Makes rows of this step, whose positions begin anew, out of those that the step before left."""

    @property
    def rows(self) -> int:
        """N, the rows that there are in front of this slice."""
        return self.plan.halo_rows(self.wanted)

    @property
    def boundary_rows(self) -> int:
        """t, the rows at the end of this slice that others may need."""
        return min(self.wanted, self.plan.length)

    def start(self, boundary: Callable[[], Tensor]) -> Pending[Tensor]:
        """Begin to send boundary rows and to receive the halo [B, N, ...]. Rows that do not exist or matter are zeros.

        boundary: gives the last t rows [B, t, ...], without gradients; not called in a pass that recomputes.
        """
        key = (self.kind, self.layer)
        if key in self.plan.kept:
            found = self.plan.kept[key]
            assert found is not None
            return Pending.done(found)
        pending = self._start(boundary().detach())
        return pending.then(lambda halo: self.plan.kept.setdefault(key, halo)) if self.keep else pending  # type: ignore[arg-type,return-value]

    def start_return(self, dhalo: Tensor) -> Pending[Tensor]:
        """Begin to send the gradient of the halo [B, N, ...] to its owners; what comes is for the boundary rows, [B, t, ...].

        Gradients stop at the start of a step: rows that the step before left get none.
        """
        plan = self.plan
        halo_start = plan.start - dhalo.shape[1]
        parcels = [Parcel(m.reader, m.owner, m) for m in plan.halo_messages(self.wanted) if m.owner != STEP_BEFORE]
        arriving = deliver(
            plan.ranks, "halo", parcels, lambda m: dhalo[:, m.within(halo_start)], lambda m: _empty_rows(m, dhalo)
        )
        return arriving.then(lambda arrived: sum_of_rows(arrived, plan.end - self.boundary_rows, plan.end, dhalo))

    def _start(self, boundary: Tensor) -> Pending[Tensor]:
        plan, size = self.plan, self.plan.bounds[-1]
        owners = {m.owner for m in plan.messages(self.wanted) if plan.holds(m.owner)}
        sources = {owner: self._last_rows(owner, boundary) for owner in owners}
        arriving = self._deliver("halo", plan.halo_messages(self.wanted), sources, boundary)
        if carried := plan.carried_messages(self.wanted):
            plan.carried.after[self.kind, self.layer] = self._deliver("carried", carried, sources, boundary).then(
                lambda arrived: sum_of_rows(arrived, size - self.wanted, size, boundary) if arrived else None
            )
        return arriving.then(lambda arrived: sum_of_rows(arrived, plan.start - self.rows, plan.start, boundary))

    def _last_rows(self, owner: int, boundary: Tensor) -> Tensor:
        """The last rows of a slice that this rank holds: its own, or that of the step before."""
        if owner != STEP_BEFORE:
            return boundary
        before = self.plan.carried.before.get((self.kind, self.layer))
        if before is None:
            return boundary.new_zeros(boundary.shape[0], self.wanted, *boundary.shape[2:])
        rows, ids = self.renew(before), self.plan.document_ids(self.wanted)
        if ids is None:
            return rows
        # Selected, not multiplied: rows of a document that has ended may be infinite or not a number.
        seen = (ids[:, : self.wanted] >= 0).view(*rows.shape[:2], *([1] * (rows.ndim - 2)))
        return torch.where(seen, rows, 0.0)

    def _deliver(
        self, kind: str, messages: Sequence[Message], sources: dict[int, Tensor], like: Tensor
    ) -> Pending[Arrived]:
        """sources: the last rows of the slices that this rank holds, by number."""
        plan = self.plan

        def content(message: Message) -> Tensor:
            rows = sources[message.owner]
            return rows[:, message.within(plan.bounds[message.owner + 1] - rows.shape[1])]

        parcels = [plan.parcel(message) for message in messages]
        return deliver(plan.ranks, kind, parcels, content, lambda message: _empty_rows(message, like))


def _empty_rows(message: Message, like: Tensor) -> Tensor:
    return like.new_empty(like.shape[0], message.rows, *like.shape[2:])
