"""Faults planted in whole jobs: a nan in a gradient, and so on, at given steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from based_megatron.config import parse_config
from based_megatron.data.batch import MicroBatch
from based_megatron.data.loader import Loader
from based_megatron.data.sources import Sources
from based_megatron.parallel.gradient_sums import gradient_sum
from based_megatron.parallel.linear import shard_spec
from based_megatron.parallel.topology import build_topology
from based_megatron.train import train as module
from based_megatron.train import trainer
from based_megatron.train.schedule import learning_rate
from based_megatron.train.step import build_step
from based_megatron.train.stop import StopVote
from based_megatron.train.train import build_loader
from support.pool import rank_device
from support.runs import command

FIRST_LAYER = "0"
PARAMETER = "layers.1.mlp.fc1.weight"


@dataclass(frozen=True)
class Faults:
    """What goes wrong in a job, by the count of its optimizer steps in this process, from 1."""

    gradients: Mapping[int, float] = field(default_factory=dict)
    """Factor of the gradient of one parameter, on the last data parallel and tensor parallel rank."""
    rates: Mapping[int, float] = field(default_factory=dict)
    """Factor of the learning rate."""
    data: Sequence[int] = ()
    """Steps of the data, from 0, whose tokens are noise."""
    outputs: Mapping[int, float] = field(default_factory=dict)
    """Factor of the output of the first layer, likewise."""


def spoil_gradient(parameter: nn.Parameter, factor: Callable[[], float]) -> None:
    """Multiply a parameter's gradient in every backward pass, wherever it is kept."""

    def spoiled(gradient: Tensor | None) -> Tensor | None:
        if gradient is not None:
            return gradient * factor()
        # A matrix product has added it to the sum already, and autograd was given none.
        total = gradient_sum(parameter)
        assert total is not None
        total.values.mul_(factor())
        return None

    parameter.register_hook(spoiled)


def train_with_faults(run_dir: Path, data: Path, faults: Faults, *overrides: str) -> bool:
    """A job on a rank of a pool, disturbed. Returns whether the run is done."""
    config = parse_config(command(run_dir, data, *overrides)[4:])
    topology = build_topology(config.parallel, rank_device(dist.get_rank()))
    taken = 1

    def spoiled_output(_module: Any, _inputs: Any, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return outputs[0], outputs[1] * faults.outputs.get(taken, 1.0)

    def build_disturbed(chunks: Any, *args: Any) -> Any:
        step = build_step(chunks, *args)
        step.update = counted(step.update)  # type: ignore[method-assign]
        if topology.tensor.rank == topology.tensor.size - 1 and topology.data.rank == topology.data.size - 1:
            for chunk in chunks:
                for parameter in chunk.parameters():
                    if shard_spec(parameter).name == PARAMETER:
                        spoil_gradient(parameter, lambda: faults.gradients.get(taken, 1.0))
                if FIRST_LAYER in chunk.layers:
                    chunk.layers[FIRST_LAYER].register_forward_hook(spoiled_output)
        return step

    def counted(update: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any) -> Any:
            nonlocal taken
            try:
                return update(*given)
            finally:
                taken += 1

        return wrapped

    def build_poisoned(*args: Any) -> Loader:
        loader = build_loader(*args)
        read = loader.micro_batches
        loader.micro_batches = lambda step: list(map(noise, read(step))) if step in faults.data else read(step)  # type: ignore[method-assign]
        return loader

    def rate(*args: Any) -> float:
        return learning_rate(*args) * faults.rates.get(taken, 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "learning_rate", rate)
        patch.setattr(module, "build_step", build_disturbed)
        patch.setattr(module, "build_loader", build_poisoned)
        sources = Sources(config.data, config.train.global_batch_sequences)
        return module.train_in_folder(config, topology, sources, StopVote(run_dir / config.train.stop_file))


def noise(batch: MicroBatch) -> MicroBatch:
    """A batch of random tokens in the place of its own."""
    tokens = torch.randint(0, 300, batch.tokens_BL.shape, generator=torch.Generator().manual_seed(1))
    return replace(batch, tokens_BL=tokens, labels_BL=tokens.flip(1))
