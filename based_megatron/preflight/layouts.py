"""Layouts that can run and fit where the given one does not, the fastest first."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from based_megatron.config import Config
from based_megatron.preflight.checks import layout_refusals
from based_megatron.preflight.gpus import Gpu
from based_megatron.preflight.memory import RankMemory, worst_rank
from based_megatron.preflight.time import RunTime, run_time

MARGIN = 0.92
"""Share of a device's memory that may be planned: the rest is fragmentation, and what a prediction misses."""
TENSOR, PIPELINE, CONTEXT, MICRO_BATCH = (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16)
RECOMPUTE: tuple[Literal["none", "mixer", "full"], ...] = ("none", "mixer", "full")


@dataclass(frozen=True)
class Layout:
    """A config that runs, and how it differs from the one asked for."""

    config: Config
    changes: dict[str, str | int]
    """New values, by key."""
    memory: RankMemory
    time: RunTime


def fits(memory: RankMemory, gpu: Gpu) -> bool:
    """Whether a rank has room, with a margin."""
    return memory.total <= MARGIN * gpu.memory_bytes


def propose(config: Config, nodes: int, gpus_per_node: int, gpu: Gpu, count: int = 3) -> list[Layout]:
    """The fastest layouts that fit, of those with the global batch that is asked for, and of those with a larger one.

    A larger batch takes fewer steps for as many tokens.
    """
    ranks, found = nodes * gpus_per_node, []
    for candidates in _candidates(config, ranks, gpus_per_node):
        fitting = _first_that_fits(candidates, ranks, gpu)
        if fitting is not None:
            candidate, memory = fitting
            time = run_time(candidate, nodes, gpus_per_node, gpu)
            found.append(Layout(candidate, _changes(config, candidate), memory, time))
    found.sort(key=lambda layout: (layout.time.total_seconds, len(layout.changes)))
    wanted = config.train.global_batch_sequences
    same = [layout for layout in found if layout.config.train.global_batch_sequences == wanted]
    larger = [layout for layout in found if layout.config.train.global_batch_sequences > wanted]
    return same[:count] + sorted(larger, key=lambda layout: layout.config.train.global_batch_sequences)[:1]


def _first_that_fits(candidates: list[Config], ranks: int, gpu: Gpu) -> tuple[Config, RankMemory] | None:
    for candidate in candidates:
        if layout_refusals(candidate, ranks):
            continue
        memory = worst_rank(candidate, ranks)
        if fits(memory, gpu):
            return candidate, memory
    return None


def _candidates(config: Config, ranks: int, gpus_per_node: int) -> Iterator[list[Config]]:
    """Ways to save memory in one layout of ranks and micro batch, the fastest first."""
    train, parallel = config.train, config.parallel
    for tensor, pipeline, context, micro_batch in itertools.product(TENSOR, PIPELINE, CONTEXT, MICRO_BATCH):
        model = tensor * pipeline * context
        if ranks % model or tensor > gpus_per_node:
            continue
        virtual = parallel.virtual_pipeline if pipeline == parallel.pipeline else 1
        per_step = micro_batch * (ranks // model)
        batch = -(-train.global_batch_sequences // per_step) * per_step
        steps = -(-train.steps * train.global_batch_sequences // batch)
        layout = dataclasses.replace(
            parallel, tensor=tensor, pipeline=pipeline, context=context, virtual_pipeline=virtual
        )
        sizes = dataclasses.replace(train, micro_batch_sequences=micro_batch, global_batch_sequences=batch, steps=steps)
        stages = (1, 2) if pipeline == 1 else (1,)
        yield [
            dataclasses.replace(
                config,
                parallel=dataclasses.replace(layout, zero_stage=stage),
                train=dataclasses.replace(sizes, recompute=recompute),
            )
            for stage, recompute in itertools.product(stages, RECOMPUTE)
        ]


def _changes(before: Config, after: Config) -> dict[str, str | int]:
    return {
        f"{section}.{key}": value
        for section in ("parallel", "train")
        for key, value in vars(getattr(after, section)).items()
        if value != getattr(getattr(before, section), key)
    }
