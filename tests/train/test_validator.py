"""Validation: when it runs, on what, and the same loss under every layout."""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from based_megatron.config import ParallelConfig, load_config
from based_megatron.data.batch import MicroBatch
from based_megatron.data.slices import NO_SLICE
from based_megatron.train.callbacks.validator import Validator, fill_up
from based_megatron.train.step import LossSum
from support.layouts import build_run, global_batch, local_micro_batches, small_config


def batches(count: int) -> list[MicroBatch]:
    return [
        MicroBatch(torch.full((2, 3), i), torch.full((2, 3), i + 1), torch.ones(2, 3), None, (0, 3))
        for i in range(count)
    ]


@pytest.mark.parametrize(("count", "multiple", "total"), [(3, 2, 4), (4, 2, 4), (1, 4, 4), (5, 4, 8), (3, 1, 3)])
def test_micro_batches_are_filled_up_with_empty_ones(count, multiple, total):
    filled = fill_up(batches(count), multiple)
    assert len(filled) == total
    for i, batch in enumerate(filled):
        assert bool((batch.tokens_BL == min(i, count - 1)).all()) and bool(
            (batch.labels_BL == min(i, count - 1) + 1).all()
        )
        assert bool((batch.loss_mask_BL == (1 if i < count else 0)).all()), "only the held-out ones count"
        assert batch.slices_BL is None


def test_what_fills_up_is_in_no_slice():
    sliced = [dataclasses.replace(batch, slices_BL=torch.full((2, 3), 5, dtype=torch.uint8)) for batch in batches(3)]
    assert [int(batch.slices_BL.max()) for batch in fill_up(sliced, 2)] == [5, 5, 5, NO_SLICE]


class FakeTrainer:
    """Evaluates to the number of micro batches it is given."""

    def __init__(self, interval_steps: int, steps: int) -> None:
        config = load_config("tiny")
        self.config = dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, steps=steps),
            validation=dataclasses.replace(config.validation, interval_steps=interval_steps),
        )
        self.step_runner: Any = self
        self.losses: list[float] = []

    def evaluate(self, given: list[MicroBatch]) -> LossSum:
        return LossSum(torch.tensor(2.0 * len(given)), torch.tensor(4.0))

    def doing(self, phase: str) -> AbstractContextManager[None]:
        assert phase == "validation"
        return nullcontext()

    def validated(self, loss: float) -> None:
        self.losses.append(loss)


def test_it_runs_at_every_interval_and_at_the_end():
    validator, ran = Validator(batches(3), pipeline_size=2), []
    for step in range(1, 8):
        trainer: Any = FakeTrainer(interval_steps=3, steps=7)
        validator.post_step(trainer, SimpleNamespace(step=step))  # type: ignore[arg-type]
        ran += [(step, loss) for loss in trainer.losses]
    assert ran == [(3, 2.0), (6, 2.0), (7, 2.0)]


def validation_loss(parallel: ParallelConfig) -> tuple[float, float, bool]:
    """(loss of three of four micro batches, loss of a training step after it, whether gradients were left)."""
    run = build_run(small_config(parallel))
    chosen = local_micro_batches(global_batch(0, True), run.topology, 1)[:3]
    trainer: Any = FakeTrainer(interval_steps=1, steps=1)
    trainer.step_runner = run.step
    Validator(chosen, run.topology.pipeline.size).post_step(trainer, SimpleNamespace(step=1))  # type: ignore[arg-type]
    left = any(p.grad is not None for chunk in run.step.chunks for p in chunk.parameters())
    return trainer.losses[0], run.train_step(0, True)[0], left


@pytest.fixture(scope="module")
def single(worker_pool) -> tuple[float, float]:
    """(validation loss, training loss) of a single process."""
    ((held_out, trained, left),) = worker_pool(1).run(validation_loss, ParallelConfig())
    assert not left and abs(held_out - trained) > 1e-3
    return held_out, trained


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor=2),
        ParallelConfig(context=2),
        ParallelConfig(pipeline=2),
        ParallelConfig(pipeline=2, virtual_pipeline=2),
    ],
)
def test_the_loss_is_that_of_one_process_and_leaves_nothing_behind(worker_pool, single, parallel):
    held_out, trained = single
    for found in worker_pool(2).run(validation_loss, parallel):
        assert found == (pytest.approx(held_out, abs=1e-5), pytest.approx(trained, abs=1e-5), False)
