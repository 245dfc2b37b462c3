"""Norms of gradients and weights by kind of layer: where a spike comes from, and what grows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from based_megatron.parallel.partitions import Piece
from based_megatron.train.callbacks.base import Callback, StepReport

if TYPE_CHECKING:
    from based_megatron.train.trainer import Trainer


class Norms(Callback):
    """Records `grad_norm/KIND`, before clipping, and `weight_norm/KIND`, after the update, in steps that are logged."""

    def __init__(self, mixers: Sequence[str]) -> None:
        """mixers: the name of each layer's mixer."""
        self._mixers = mixers

    def on_gradients(self, trainer: Trainer) -> None:
        if trainer.metrics.wanted:
            self._record(trainer, "grad_norm", trainer.gradients())

    def post_step(self, trainer: Trainer, report: StepReport) -> None:
        if trainer.metrics.wanted:
            self._record(trainer, "weight_norm", trainer.step_runner.engine.weights())

    def _record(self, trainer: Trainer, name: str, pieces: Iterable[tuple[Piece, Tensor]]) -> None:
        """Each rank adds the pieces that it owns, whatever the layout; the hub makes one norm of them."""
        norms: dict[str, list[Tensor]] = {}
        for piece, flat in pieces:
            if piece.owned:
                kind = layer_kind(piece.spec.name, self._mixers)
                norms.setdefault(kind, []).append(torch.linalg.vector_norm(flat, dtype=torch.float32))
        for kind, found in norms.items():
            trainer.metrics.record(f"{name}/{kind}", torch.linalg.vector_norm(torch.stack(found)), "norm")


def layer_kind(name: str, mixers: Sequence[str]) -> str:
    """The kind of layer that a parameter belongs to, by its global name: embedding, a mixer's name, mlp, norms or output."""
    part, *rest = name.split(".")
    if part != "layers":
        return "norms" if part == "final_norm" else part
    layer, part = rest[:2]
    if part == "mixer":
        return mixers[int(layer)]
    return part if part == "mlp" else "norms"
