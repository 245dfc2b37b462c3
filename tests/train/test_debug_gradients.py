"""A planted nan is found by its global name, wherever the layout puts it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from based_megatron.config import parse_config
from based_megatron.data.sources import Sources
from based_megatron.parallel.linear import shard_spec
from based_megatron.parallel.topology import build_topology
from based_megatron.train import train as module
from based_megatron.train.step import build_step
from based_megatron.train.stop import StopVote
from based_megatron.train.suspects import in_model_order
from support.faults import spoil_gradient
from support.pool import rank_device
from support.runs import command, events

JOB = (
    "--train.steps", "3", "--monitor.debug-gradients", "--monitor.log-interval-steps", "3",
    "--checkpoint.interval-steps", "0", "--validation.interval-steps", "0",
)  # fmt: skip


def train_with_a_nan(run_dir: Path, data: Path, where: str, *overrides: str) -> None:
    """A job whose second step has a nan: in the gradient of a parameter, or in the output of a layer, on one rank."""
    config = parse_config(command(run_dir, data, *JOB, *overrides)[4:])
    topology = build_topology(config.parallel, rank_device(torch.distributed.get_rank()))
    steps_done = 0

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        return x * float("nan") if steps_done == 1 else x

    def build_poisoned(chunks: Any, *args: Any) -> Any:
        step = build_step(chunks, *args)
        update = step.update

        def counted(*given: Any) -> Any:
            nonlocal steps_done
            steps_done += 1
            return update(*given)

        step.update = counted  # type: ignore[method-assign]
        is_mine = topology.tensor.rank == topology.tensor.size - 1 and topology.data.rank == topology.data.size - 1
        for chunk in chunks if is_mine else []:
            for parameter in chunk.parameters():
                if shard_spec(parameter).name == where:
                    spoil_gradient(parameter, lambda: float("nan") if steps_done == 1 else 1.0)
            if where.startswith("output of "):
                layer = chunk.layers[where.removeprefix("output of ")]
                layer.register_forward_hook(lambda _m, _i, outputs: (outputs[0], poisoned(outputs[1])))
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "build_step", build_poisoned)
        sources = Sources(config.data, config.train.global_batch_sequences)
        module.train_in_folder(config, topology, sources, StopVote(run_dir / "stop"))


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ()),
        (2, ("--parallel.tensor", "2")),
        (2, ("--parallel.zero-stage", "1")),
        (2, ("--parallel.zero-stage", "2")),
        (2, ("--parallel.zero-stage", "3")),
        (2, ("--parallel.pipeline", "2")),
        (1, ("--train.precision", "bf16")),
    ],
    ids=str,
)
def test_the_parameter_is_named(worker_pool, corpus, tmp_path, world_size, overrides):
    name = "layers.2.mixer.qkv.weight"
    worker_pool(world_size).run(train_with_a_nan, tmp_path, corpus, name, *overrides)
    (found,) = events(tmp_path, "not_finite")
    assert (found["step"], found["parameters"], found["first_layer"]) == (2, [name], "none")
    assert [event["step"] for event in events(tmp_path, "skip")] == [2]


@pytest.mark.parametrize("overrides", [("--parallel.tensor", "2"), ("--train.recompute", "full")], ids=str)
def test_the_first_layer_is_named(worker_pool, corpus, tmp_path, overrides):
    world_size = 2 if "--parallel.tensor" in overrides else 1
    worker_pool(world_size).run(train_with_a_nan, tmp_path, corpus, "output of 1", *overrides)
    (found,) = events(tmp_path, "not_finite")
    assert found["first_layer"] == "layers.1" and found["parameters_in_all"] > 5


def test_names_come_in_the_order_of_the_model():
    names = [
        "embedding.weight",
        "layers.2.mlp.fc1.weight",
        "layers.10.mixer.qkv.weight",
        "final_norm.weight",
        "output.weight",
    ]
    assert sorted(reversed(names), key=in_model_order) == names
