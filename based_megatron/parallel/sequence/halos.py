"""Boundary rows, sent to the slices that look back at them, and the gradients of these rows, sent back.

Legend: B sequences, L tokens of this slice, N rows of the halo, t boundary rows: the last of this slice, which others may need.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from based_megatron.parallel.sequence.channel import Pending
from based_megatron.parallel.sequence.messages import Message, Parcel, deliver
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
    """Turns rows as the step before left them into those of this step, whose positions begin anew."""

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

        The step before is over: rows that it left get none.
        """
        plan, t = self.plan, self.boundary_rows
        halo_start, boundary_start = plan.start - dhalo.shape[1], plan.end - t
        parcels = [Parcel(m.reader, m.owner, m) for m in plan.halo_messages(self.wanted) if m.owner >= 0]
        pending = deliver(
            plan.ranks, "halo", parcels, lambda m: dhalo[:, m.within(halo_start)], lambda m: _empty(dhalo, m.rows)
        )

        def add_up(returned: list[tuple[Message, Tensor]]) -> Tensor:
            total = dhalo.new_zeros(dhalo.shape[0], t, *dhalo.shape[2:])
            for m, drows in returned:
                total[:, m.within(boundary_start)] += drows
            return total

        return pending.then(add_up)

    def _start(self, boundary: Tensor) -> Pending[Tensor]:
        plan = self.plan
        now, later = plan.halo_messages(self.wanted), plan.carried_messages(self.wanted)
        sources = {m.owner: self._last_rows(m.owner, boundary) for m in (*now, *later) if plan.holds(m.owner)}

        def rows_of(m: Message) -> Tensor:
            rows = sources[m.owner]
            return rows[:, m.within(plan.bounds[m.owner + 1] - rows.shape[1])]

        def begin(kind: str, messages: tuple[Message, ...]) -> Pending[list[tuple[Message, Tensor]]]:
            parcels = [plan.parcel(m) for m in messages]
            return deliver(plan.ranks, kind, parcels, rows_of, lambda m: _empty(boundary, m.rows))

        def put(arrived: list[tuple[Message, Tensor]], count: int, end: int) -> Tensor:
            """`count` rows before the position `end`."""
            found = boundary.new_zeros(boundary.shape[0], count, *boundary.shape[2:])
            for m, rows in arrived:
                found[:, m.within(end - count)] = rows
            return found

        arriving = begin("halo", now)
        if later:
            plan.carried.after[self.kind, self.layer] = begin("carried", later).then(
                lambda arrived: put(arrived, self.wanted, plan.bounds[-1]) if arrived else None
            )
        return arriving.then(lambda arrived: put(arrived, self.rows, plan.start))

    def _last_rows(self, number: int, boundary: Tensor) -> Tensor:
        """The last rows of a slice that this rank holds: its own, or that of the step before."""
        if number == self.plan.ranks.rank:
            return boundary
        left = self.plan.carried.before.get((self.kind, self.layer))
        if left is None:
            return boundary.new_zeros(boundary.shape[0], self.wanted, *boundary.shape[2:])
        rows, ids = self.renew(left), self.plan.document_ids(self.wanted)
        if ids is None:
            return rows
        # Selected, not multiplied: what a document that has ended left may be infinite or not a number.
        seen = (ids[:, : self.wanted] >= 0).view(*rows.shape[:2], *([1] * (rows.ndim - 2)))
        return torch.where(seen, rows, 0.0)


def _empty(like: Tensor, rows: int) -> Tensor:
    return like.new_empty(like.shape[0], rows, *like.shape[2:])
