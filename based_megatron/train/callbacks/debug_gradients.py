"""Which parameters have a gradient that is not finite, and the first layer whose activations are not: `monitor.debug_gradients`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from based_megatron.monitor.finite import not_finite
from based_megatron.train.callbacks.base import Callback
from based_megatron.train.suspects import NAMES_SHOWN, in_model_order

if TYPE_CHECKING:
    from based_megatron.train.trainer import Trainer


class DebugGradients(Callback):
    """Looks at every gradient and at the output of every layer in every step, and waits for the device: for a search only.

    A step with one that is not finite gets an event `not_finite` with the global names of the parameters, over all ranks and
    shards, and the first layer in the order of the model whose output is not finite, if there is one.
    """

    def __init__(self) -> None:
        self._is_finite: dict[str, Tensor] = {}
        """By layer, whether all outputs of this step were finite: a scalar on the device."""

    def on_start(self, trainer: Trainer) -> None:
        for chunk in trainer.step_runner.chunks:
            for name, layer in chunk.layers.items():
                layer.register_forward_hook(lambda _module, _inputs, outputs, name=name: self._note(name, outputs))

    def on_gradients(self, trainer: Trainer) -> None:
        gradients = ((piece.spec.name, flat) for piece, flat in trainer.gradients())
        layers = [int(name) for name, is_finite in self._is_finite.items() if not is_finite]
        self._is_finite = {}
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, (not_finite(gradients), layers))
        parameters = sorted({name for names, _ in everywhere for name in names}, key=in_model_order)
        if parameters:
            first = min((layer for _, found in everywhere for layer in found), default=None)
            trainer.record(
                "not_finite",
                step=trainer.step + 1,
                parameters=parameters[:NAMES_SHOWN],
                parameters_in_all=len(parameters),
                first_layer="none" if first is None else f"layers.{first}",
            )

    def _note(self, name: str, outputs: tuple[Tensor, ...]) -> None:
        is_finite = torch.stack([output.detach().isfinite().all() for output in outputs]).all()
        self._is_finite[name] = is_finite & self._is_finite.get(name, is_finite)
