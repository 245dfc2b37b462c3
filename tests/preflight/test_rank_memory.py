"""Predicted bytes against the tensors of real ranks."""

import dataclasses
from typing import Any

import pytest
import torch

from based_megatron.checkpoint.host_memory import copy_bytes
from based_megatron.checkpoint.zero import zero_fragments
from based_megatron.config import Config, ParallelConfig
from based_megatron.parallel.megatron import megatron_runs
from based_megatron.preflight.activations import chunk_activations
from based_megatron.preflight.memory import model_memory, rank_memory, states_bytes
from based_megatron.preflight.shapes import local_parameters, stages_of_rank
from support.layouts import build_run, global_batch, local_micro_batches, small_config


def config_of(parallel: ParallelConfig, precision: Any, pattern: str = "cLSA cS", **train: Any) -> Config:
    config = small_config(parallel, **train)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, layer_pattern=pattern),
        data=dataclasses.replace(config.data, isolate_documents=False),
        train=dataclasses.replace(config.train, precision=precision),
    )


def storage_bytes(tensors) -> int:
    """Bytes of the distinct storages behind tensors."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def kept(parallel: ParallelConfig, precision: str) -> dict[str, tuple[int, int]]:
    """(predicted, real) bytes of this rank after a step."""
    config = config_of(parallel, precision)
    run = build_run(config)
    batches = local_micro_batches(global_batch(0, True), run.topology, 2)
    run.step.accumulate(batches)
    parameters = list(run.engine.module.parameters())
    zero = run.engine._engine.optimizer
    if parallel.zero_stage == 1:
        gradients = [gradient for _, gradient in run.engine.sums()]
    elif parallel.zero_stage == 2:
        gradients = [x for group in zero.averaged_gradients.values() for x in group]
    else:
        gradients = [zero.grad_partitions_flat_buffer]
    gradient_bytes = storage_bytes(gradients)
    run.step.update()
    optimizer = run.engine.optimizer
    masters = [partition.master for partition in optimizer.partitions]
    moments = [x for master in masters for x in optimizer.state(master).values()]
    weights = [p.ds_tensor for p in parameters] if parallel.zero_stage == 3 else parameters
    predicted = model_memory(
        config, run.topology.data_context.size, local_parameters(config, run.topology.pipeline.rank)
    )
    return {
        "weights": (predicted.weights, storage_bytes(weights)),
        "gradients": (predicted.gradients, gradient_bytes),
        "optimizer": (predicted.optimizer, storage_bytes(masters + moments)),
        "host copy": (
            rank_memory(config, run.topology.world_size, run.topology.pipeline.rank).host_checkpoint,
            copy_bytes(zero_fragments(run.engine)),
        ),
    }


@pytest.mark.parametrize(
    ("world_size", "parallel", "precision"),
    [
        (1, ParallelConfig(), "bf16"),
        (1, ParallelConfig(), "fp32"),
        (2, ParallelConfig(tensor=2), "bf16"),
        (2, ParallelConfig(pipeline=2), "bf16"),
        (2, ParallelConfig(), "bf16"),
        (2, ParallelConfig(zero_stage=2), "bf16"),
        (2, ParallelConfig(zero_stage=3), "bf16"),
        (4, ParallelConfig(tensor=2, pipeline=2), "bf16"),
        (4, ParallelConfig(tensor=2, zero_stage=2), "bf16"),
    ],
)
def test_weights_gradients_and_optimizer_are_exact(worker_pool, world_size, parallel, precision):
    for parts in worker_pool(world_size).run(kept, parallel, precision):
        predicted_copy, copy = parts.pop("host copy")
        assert 0.8 * predicted_copy <= copy <= predicted_copy, "padding, and parameters that another rank saves"
        assert {name: predicted for name, (predicted, _) in parts.items()} == {
            name: real for name, (_, real) in parts.items()
        }


def saved(recompute: str, pattern: str, precision: str, parallel: ParallelConfig) -> tuple[int, int]:
    """(predicted, real) bytes that the kernels of a GPU keep between forward and backward of one micro batch."""
    config = config_of(parallel, precision, pattern, backend="triton", recompute=recompute)
    run = build_run(config)
    (chunk,), batch = run.step.chunks, local_micro_batches(global_batch(0, False), run.topology, 2)[0]
    outside = {x.untyped_storage().data_ptr() for x in chunk.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in outside:
            storages[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), megatron_runs():
        loss = chunk(batch.tokens_BL, run.step.plan(batch), batch.labels_BL)
    del loss
    activations = chunk_activations(config, stages_of_rank(config, 0)[0])
    predicted = activations.saved + activations.head_saved + activations.logits + states_bytes(config, 0, 1)
    return predicted, sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(
    ("pattern", "recompute", "precision", "parallel"),
    [
        ("c*4", "none", "bf16", ParallelConfig()),
        ("L*4", "none", "bf16", ParallelConfig()),
        ("S*4", "none", "bf16", ParallelConfig()),
        ("A*4", "none", "bf16", ParallelConfig()),
        ("cLSc", "none", "fp32", ParallelConfig()),
        ("cLSc", "mixer", "bf16", ParallelConfig()),
        ("cLSc", "full", "bf16", ParallelConfig()),
        ("cLSc", "none", "bf16", ParallelConfig(tensor=2)),
        ("cLSc", "mixer", "bf16", ParallelConfig(tensor=2)),
        ("cLSc", "none", "bf16", ParallelConfig(tensor=2, overlap_tensor="collectives")),
        ("cLSc", "none", "bf16", ParallelConfig(tensor=2, sequence_parallel=False)),
        ("cLSc", "none", "bf16", ParallelConfig(context=2)),
    ],
)
def test_saved_activations(worker_pool, pattern, recompute, precision, parallel):
    ranks = parallel.tensor * parallel.context
    found = worker_pool(ranks).run(saved, recompute, pattern, precision, parallel)
    # The first rank of a sequence receives nothing, and needs a little less than what is planned for all.
    predicted, real = max(found, key=lambda pair: pair[1])
    # PyTorch's full attention keeps a little less on a CPU than on a GPU; rotary tables, which are not counted, show where all is tiny.
    assert predicted == pytest.approx(real, rel=0.05 if "A" in pattern else 0.02 if recompute == "none" else 0.04)


@pytest.mark.parametrize(("micro_batches", "held"), [(1, 0), (2, 1)])
def test_stage_2_begins_a_step_without_gradients(micro_batches, held):
    """A long sequence has its peak at the head, where only the second micro batch finds the gradients of the first."""
    config = config_of(ParallelConfig(zero_stage=2), "bf16")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sequence_length_tokens=65536),
        train=dataclasses.replace(config.train, global_batch_sequences=4 * micro_batches),
    )
    predicted, kept_bytes = rank_memory(config, 2, 0), model_memory(config, 2, local_parameters(config, 0)).gradients
    assert (predicted.gradients, kept_bytes > 0) == (held * kept_bytes, True)
