"""The last rows of earlier slices, sent to those that need them, and the gradients of these rows, sent back.

Legend: B sequences, L tokens of this slice, N rows of the halo, t rows of the tail that others may need.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from based_megatron.parallel.sequence.channel import Pending
from based_megatron.parallel.sequence.plan import Message, SequencePlan


@dataclass(frozen=True)
class HaloExchange:
    """Of one kind of rows, in one layer and micro batch; kernels read it (kernels/exchange.py)."""

    plan: SequencePlan
    kind: str
    layer: int
    wanted: int
    """Rows that each token may look back."""
    keep: bool = False
    """Keep what came, for a second forward pass that recomputes activations."""
    renew: Callable[[Tensor], Tensor] = lambda rows: rows
    """Makes rows that the step before left what they are for this one, whose positions begin anew."""

    @property
    def rows(self) -> int:
        """N, the rows that there are in front of this slice."""
        return self.plan.halo_rows(self.wanted)

    @property
    def tail_rows(self) -> int:
        """t, the rows at the end of this slice that others may need."""
        return min(self.wanted, self.plan.length)

    def start(self, tail: Callable[[], Tensor]) -> Pending[Tensor]:
        """Begin to send the own tail and to receive the halo [B, N, ...]. Rows that do not exist or matter are zeros.

        tail: gives the last t rows [B, t, ...], without gradients; not called in a pass that recomputes.
        """
        key = (self.kind, self.layer)
        if key in self.plan.kept:
            found = self.plan.kept[key]
            assert found is not None
            return Pending.done(found)
        pending = self._start(tail().detach())
        return pending.then(lambda halo: self.plan.kept.setdefault(key, halo)) if self.keep else pending  # type: ignore[arg-type,return-value]

    def start_return(self, dhalo: Tensor) -> Pending[Tensor]:
        """Begin to send the gradient of the halo [B, N, ...] to its owners; what comes is for the own tail, [B, t, ...]."""
        ranks, messages = self.plan.ranks, self.plan.messages(self.wanted)
        shape = (dhalo.shape[0], self.tail_rows, *dhalo.shape[2:])
        own_rows = [min(m.rows, self._length(m.owner)) for m in messages]
        returns = [
            (m, dhalo.new_empty(shape[0], rows, *shape[2:]))
            for m, rows in zip(messages, own_rows, strict=True)
            if m.owner == ranks.rank
        ]
        sends = [
            (m.owner, self._of_message(dhalo, m)[:, m.rows - rows :].contiguous())
            for m, rows in zip(messages, own_rows, strict=True)
            if m.reader == ranks.rank
        ]
        pending = self._exchange("halo", sends, [(m.reader, rows) for m, rows in returns])

        def add_up(_: None) -> Tensor:
            total = dhalo.new_zeros(shape)
            for _m, rows in returns:
                total[:, shape[1] - rows.shape[1] :] += rows
            return total

        return pending.then(add_up)

    def _start(self, tail: Tensor) -> Pending[Tensor]:
        plan, ranks = self.plan, self.plan.ranks
        source = self._continued(tail)
        halo = tail.new_zeros(tail.shape[0], self.rows, *tail.shape[2:])
        sends, parts = [], []
        for m in plan.messages(self.wanted):
            if m.owner == ranks.rank:
                sends.append((m.reader, source[:, source.shape[1] - m.rows :].contiguous()))
            elif m.reader == ranks.rank:
                parts.append((m, tail.new_empty(tail.shape[0], m.rows, *tail.shape[2:])))
        pending = self._exchange("halo", sends, [(m.owner, part) for m, part in parts])
        if plan.carry is not None:
            if ranks.rank == 0:
                halo.copy_(source[:, : self.wanted])
            plan.carry.after[self.kind, self.layer] = self._hand_over(source)

        def put(_: None) -> Tensor:
            for m, part in parts:
                self._of_message(halo, m).copy_(part)
            return halo

        return pending.then(put)

    def _of_message(self, halo: Tensor, m: Message) -> Tensor:
        """The rows of the halo that a message is for."""
        end = self.plan.bounds[m.owner + 1] - self.plan.start + halo.shape[1]
        return halo[:, end - m.rows : end]

    def _exchange(
        self, kind: str, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]
    ) -> Pending[None]:
        channel = self.plan.ranks.halos
        return Pending.done(None) if channel is None else channel.exchange(kind, sends, receives)

    def _length(self, rank: int) -> int:
        return self.plan.bounds[rank + 1] - self.plan.bounds[rank]

    def _continued(self, tail: Tensor) -> Tensor:
        """On the first rank the tail behind the rows that the step before left (zeros where it left none)."""
        carry = self.plan.carry
        if carry is None or self.plan.ranks.rank:
            return tail
        before = carry.before.get((self.kind, self.layer))
        rows = self.renew(before) if before is not None else tail.new_zeros(tail.shape[0], self.wanted, *tail.shape[2:])
        return torch.cat([rows, tail], dim=1)

    def _hand_over(self, source: Tensor) -> Pending[Tensor]:
        """The last `wanted` rows of the sequence go to the first rank, in as many parts as slices hold them."""
        plan, ranks, wanted = self.plan, self.plan.ranks, self.wanted
        length = plan.bounds[-1]
        after = source.new_zeros(source.shape[0], wanted, *source.shape[2:])
        sends, receives = [], []
        for owner in range(ranks.size):
            begin = max(plan.bounds[owner] - (wanted if owner == 0 else 0), length - wanted)
            rows, end = plan.bounds[owner + 1] - begin, plan.bounds[owner + 1] - (length - wanted)
            if rows <= 0:
                continue
            if owner == ranks.rank:
                mine = source[:, source.shape[1] - rows :]
                if owner == 0:
                    after[:, end - rows : end] = mine
                else:
                    sends.append((0, mine.contiguous()))
            elif ranks.rank == 0:
                receives.append(
                    (owner, after[:, end - rows : end], source.new_empty(source.shape[0], rows, *source.shape[2:]))
                )
        pending = self._exchange("carry", sends, [(owner, buffer) for owner, _, buffer in receives])

        def put(_: None) -> Tensor:
            for _owner, place, buffer in receives:
                place.copy_(buffer)
            return after

        return pending.then(put)
