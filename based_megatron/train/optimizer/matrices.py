"""Whole matrices out of the pieces that ZeRO and tensor parallelism make of them, for optimizers that need rows and columns.

The ranks of a stage hold pieces of the same matrices. In rounds of as many matrices as ranks, every rank is dealt one: it
receives the matrix' pieces, changes the whole, unsharded matrix, and sends the pieces back to those who hold them.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from based_megatron.checkpoint.fragments import Rectangle, rectangles
from based_megatron.parallel.partitions import Piece
from based_megatron.parallel.sharding import ShardSpec


class DealtMatrices:
    """The matrices of one flat partition and of its counterparts on the other ranks of a stage.

    A change costs two all-to-alls a round, in which each element travels once to the rank that works on it and once to each
    rank that holds it; memory for one matrix a rank; and no work is done twice. Matrices of like size share a round.
    """

    def __init__(self, pieces: Sequence[Piece], group: dist.ProcessGroup) -> None:
        """pieces: of this rank's partition. All ranks of the group call it."""
        self._group, self._rank, size = group, dist.get_rank(group), dist.get_world_size(group)
        of_ranks: list[Sequence[Piece]] = [()] * size
        dist.all_gather_object(of_ranks, tuple(pieces), group=group)
        self._pieces = [{piece.spec.name: piece for piece in theirs} for theirs in of_ranks]
        specs = {piece.spec.name: piece.spec for theirs in of_ranks for piece in theirs}
        names = sorted(specs, key=lambda name: (specs[name].shape, name))
        self._rounds = [names[first : first + size] for first in range(0, len(names), size)]

    def change(self, flat: Tensor, function: Callable[[Tensor, ShardSpec], Tensor]) -> Tensor:
        """What `function` makes of each whole matrix, as a flat tensor of the partition's size; collective.

        function: (matrix of spec.shape, spec) -> a tensor of that shape. Elements of no matrix become zero.
        """
        changed = torch.zeros_like(flat)
        for names in self._rounds:
            mine = names[self._rank] if self._rank < len(names) else None
            holders = [pieces.get(mine) if mine else None for pieces in self._pieces]
            held = [self._pieces[self._rank].get(name) for name in names]
            held += [None] * (len(self._pieces) - len(names))
            matrix, spec = self._collect(flat, held, holders)
            self._spread(function(matrix, spec) if spec else matrix, flat, holders, held, changed)
        return changed

    def _collect(
        self, flat: Tensor, held: list[Piece | None], holders: list[Piece | None]
    ) -> tuple[Tensor, ShardSpec | None]:
        """This rank's matrix of a round, None and an empty one if it was dealt none.

        held: this rank's piece of each rank's matrix; holders: each rank's piece of this rank's.
        """
        send = [piece.of(flat) if piece and piece.owned else flat[:0] for piece in held]
        received = self._exchange(send, [piece.numel if piece and piece.owned else 0 for piece in holders])
        spec = next((piece.spec for piece in holders if piece), None)
        matrix = flat.new_zeros(spec.shape if spec else ())
        for piece, values in zip(holders, received, strict=True):
            if piece and piece.owned:
                for box in rectangles(piece.spec, piece.start, piece.numel):
                    _box(matrix, box).copy_(box.view(values))
        return matrix, spec

    def _spread(
        self,
        matrix: Tensor,
        flat: Tensor,
        holders: list[Piece | None],
        held: list[Piece | None],
        changed: Tensor,
    ) -> None:
        """Send every holder its piece of this rank's matrix, and put what comes from the others in its place."""
        send = []
        for piece in holders:
            values = flat.new_zeros(piece.numel if piece else 0)
            for box in rectangles(piece.spec, piece.start, piece.numel) if piece else []:
                box.view(values).copy_(_box(matrix, box))
            send.append(values)
        received = self._exchange(send, [piece.numel if piece else 0 for piece in held])
        for piece, values in zip(held, received, strict=True):
            if piece:
                piece.of(changed).copy_(values)

    def _exchange(self, send: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """send[r] to rank r; returns what each rank sent here, `sizes` elements."""
        if len(send) == 1:
            return send
        outgoing = torch.cat(send)
        incoming = outgoing.new_empty(sum(sizes))
        dist.all_to_all_single(incoming, outgoing, sizes, [part.numel() for part in send], group=self._group)
        return list(incoming.split(sizes))


def _box(matrix: Tensor, box: Rectangle) -> Tensor:
    return matrix[tuple(slice(o, o + n) for o, n in zip(box.global_offset, box.shape, strict=True))]
