"""bf16 runs, and gradients that are not finite."""

import dataclasses

import pytest
import torch

from based_megatron.checkpoint.zero import zero_fragments
from based_megatron.config import ParallelConfig
from support.layouts import build_run, global_batch, local_micro_batches, small_config
from support.oracle import load_oracle, write_oracle

STEPS, LR = 6, 3e-3


def bf16_losses(parallel: ParallelConfig) -> list[float]:
    config = small_config(parallel, clip_grad_norm=1.0)
    run = build_run(dataclasses.replace(config, train=dataclasses.replace(config.train, precision="bf16")))
    return [run.train_step(number, True, LR)[0] for number in range(STEPS)]


@pytest.fixture(scope="module")
def expected(worker_pool, tmp_path_factory) -> list[float]:
    """Losses of a single process in fp32."""
    path = tmp_path_factory.mktemp("oracle") / "oracle.pt"
    worker_pool(1).run(write_oracle, path, True, STEPS, 1.0, LR)
    return load_oracle(path)["losses"]


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, ParallelConfig()),
        (2, ParallelConfig(zero_stage=1)),
        (2, ParallelConfig(zero_stage=2)),
        (2, ParallelConfig(zero_stage=3)),
        (2, ParallelConfig(pipeline=2)),
        (2, ParallelConfig(tensor=2)),
    ],
)
def test_bf16_stays_near_fp32(worker_pool, expected, world_size, parallel):
    for losses in worker_pool(world_size).run(bf16_losses, parallel):
        assert losses == pytest.approx(expected, abs=0.02)
        assert losses != pytest.approx(expected, abs=1e-6), "this ran in fp32"


def step_with_a_nan(parallel: ParallelConfig, precision: str) -> tuple[float, float, bool, bool]:
    """(norm of a poisoned step, of a good one after it, weights unchanged by the first, changed by the second)."""
    config = small_config(parallel, clip_grad_norm=1.0)
    run = build_run(dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision)))
    before = weights(run)
    batches = local_micro_batches(global_batch(0, True), run.topology, 2)
    if run.topology.data_context.rank == run.topology.data_context.size - 1:
        parameter = run.step.chunks[0].final_norm.weight
        handle = parameter.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
    run.step.accumulate(batches)
    update = run.step.update()
    if run.topology.data_context.rank == run.topology.data_context.size - 1:
        handle.remove()
    unchanged = all(torch.equal(before[name], now) for name, now in weights(run).items())
    _, good = run.train_step(1, True, LR)
    assert not update.applied
    return (
        float(update.grad_norm),
        good,
        unchanged,
        any(not torch.equal(before[name], now) for name, now in weights(run).items()),
    )


def weights(run) -> dict[str, torch.Tensor]:
    """This rank's master weights."""
    return {fragment.spec.name: fragment.tensors["model"].clone() for fragment in zero_fragments(run.engine)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "parallel", [ParallelConfig(zero_stage=stage) for stage in (1, 2, 3)] + [ParallelConfig(context=2)]
)
def test_a_gradient_that_is_not_finite_changes_no_weight(worker_pool, parallel, precision):
    for bad, good, unchanged, changed in worker_pool(2).run(step_with_a_nan, parallel, precision):
        assert not torch.isfinite(torch.tensor(bad)) and unchanged
        assert torch.isfinite(torch.tensor(good)) and changed
