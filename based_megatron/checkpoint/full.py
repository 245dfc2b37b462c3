"""Whole, unsharded weights out of a checkpoint and into one, in a single process."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from based_megatron.checkpoint.fragments import Fragment
from based_megatron.checkpoint.load import MODEL, read_state, stored_shapes
from based_megatron.checkpoint.metadata import read_metadata
from based_megatron.checkpoint.ranks import ALONE, without_dcp_warning
from based_megatron.checkpoint.reader import RangeReader
from based_megatron.checkpoint.rectangles import stored_name
from based_megatron.checkpoint.save import save_checkpoint
from based_megatron.checkpoint.store import FOLDER, deleted, is_gone, resolve_checkpoint
from based_megatron.config import Config, from_dict, to_dict
from based_megatron.errors import CheckpointError
from based_megatron.parallel.sharding import ShardSpec

MOST_READS = 10
"""Times that a checkpoint may be deleted under its reader."""


@dataclass(frozen=True)
class Whole:
    """A checkpoint as one process reads it: weights without a layout, and what is known of their training."""

    path: Path
    weights: dict[str, Tensor]
    """fp32, CPU, unsharded, by global name."""
    state: dict[str, Any]
    """What state.json says."""
    config: Config
    """The config that they were trained with."""


def read_full(path: Path) -> tuple[dict[str, Tensor], Config]:
    """Weights and config of read_whole, with its errors."""
    whole = read_whole(path)
    return whole.weights, whole.config


def read_whole(path: Path) -> Whole:
    """The whole of a checkpoint.

    `path` is one checkpoint, or a run folder or its checkpoints folder: the newest valid one is then read, and damaged
    ones are named on stderr. The run may be going on: where it deletes the checkpoint that is being read, its newest one is read.
    Raises CheckpointError if there is none.
    """
    for _ in range(MOST_READS):
        found = resolve_checkpoint(path, on_skip=lambda line: print(line, file=sys.stderr), ranks=ALONE)
        try:
            return _read(found)
        except CheckpointError:
            if not is_gone(found):
                raise
            if found == path:
                break
    raise deleted(found)


def _read(path: Path) -> Whole:
    weights = {
        name.removeprefix(stored_name(MODEL, "")): torch.empty(shape)
        for name, shape in stored_shapes(path).items()
        if name.startswith(stored_name(MODEL, ""))
    }
    try:
        with without_dcp_warning(ALONE):
            dcp.load(
                {stored_name(MODEL, name): tensor for name, tensor in weights.items()},
                storage_reader=RangeReader(path, read_metadata(path)),
                planner=dcp.DefaultLoadPlanner(flatten_state_dict=False),
                no_dist=True,
            )
    except dcp.CheckpointException as error:
        raise CheckpointError(f"cannot read {path}: {ALONE.first_failure(error)}") from error
    state = read_state(path)
    return Whole(path, weights, state, from_dict(state["config"], where=str(path)))


def write_full(path: Path, state_dict: Mapping[str, Tensor], config: Config) -> Path:
    """Write weights as checkpoint 0 of the run folder `path`, to start training from or to export; returns its folder.

    It has no moments: load_checkpoint reads it with weights_only=True.
    """
    fragments = [
        Fragment(
            spec=ShardSpec(name, tuple(tensor.shape)),
            start=0,
            numel=tensor.numel(),
            tensors={MODEL: tensor.detach().to("cpu", torch.float32).reshape(-1)},
        )
        for name, tensor in state_dict.items()
    ]
    return save_checkpoint(path / FOLDER, 0, fragments, {"config": to_dict(config)}, ranks=ALONE)
