"""The parameters whose gradients may be why a step was skipped."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from based_megatron.monitor.finite import largest_magnitudes
from based_megatron.parallel.partitions import Piece

NAMES_SHOWN = 20
LARGEST_SHOWN = 3


class Suspects:
    """Names of parameters, by their gradients on all ranks: those that are not finite, else those with the largest elements."""

    def __init__(self, gradients: Callable[[], Iterable[tuple[Piece, Tensor]]]) -> None:
        self._gradients = gradients
        self._largest: dict[str, float] = {}

    def look(self) -> None:
        """Look at the gradients of this rank, while they are there. Waits for the device."""
        self._largest = largest_magnitudes((piece.spec.name, flat) for piece, flat in self._gradients())

    def names(self) -> list[str]:
        """The suspects over all ranks (collective), in the order of the model or the largest first."""
        everywhere: list[Any] = [self._largest]
        if dist.is_initialized():
            everywhere = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, self._largest)
        largest: dict[str, float] = {}
        for found in everywhere:
            for name, magnitude in found.items():
                largest[name] = max(largest.get(name, 0.0), math.inf if math.isnan(magnitude) else magnitude)
        if bad := sorted((name for name in largest if math.isinf(largest[name])), key=in_model_order):
            return bad[:NAMES_SHOWN]
        return sorted(largest, key=lambda name: (-largest[name], name))[:LARGEST_SHOWN]


def in_model_order(name: str) -> tuple[int, int, str]:
    """Sorts global names of parameters: the embedding, layers by their number, the final norm, the output projection."""
    part, *rest = name.split(".")
    if part == "layers":
        return 1, int(rest[0]), name
    return {"embedding": 0, "final_norm": 2}.get(part, 3), 0, name
