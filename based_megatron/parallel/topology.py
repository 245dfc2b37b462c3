"""Process groups of a run. The only file that touches Megatron's global parallel state; others get a Topology value."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from based_megatron.config import ParallelConfig
from based_megatron.errors import ConfigError
from based_megatron.parallel.environment import RankInfo
from based_megatron.parallel.host import environment
from based_megatron.parallel.megatron import ProcessGroupCollection, parallel_state
from based_megatron.parallel.sequence.ranks import ContextRanks, build_context_ranks

FLIGHT_RECORDER, FLIGHT_RECORDER_SIZE = "TORCH_FR_BUFFER_SIZE", "2000"
"""PyTorch keeps so many collectives in memory, for whoever asks what a rank waits for. Your own value counts."""


@dataclass(frozen=True)
class Axis:
    """This rank's place on one axis of the layout."""

    group: dist.ProcessGroup
    rank: int
    size: int


@dataclass(frozen=True)
class Topology:
    """The layout of ranks, in Megatron's order: tensor fastest, then context, data, pipeline."""

    rank: int
    world_size: int
    device: torch.device
    tensor: Axis
    pipeline: Axis
    context: Axis
    sequence: ContextRanks
    """The context ranks once more, with the channels of their exchanges."""
    data: Axis
    data_context: Axis
    """Ranks that hold the same parameters: gradients are summed and ZeRO shards over them."""
    model: Axis
    """Ranks that together hold one copy of the parameters: the gradient norm is summed over them."""
    stage: Axis
    """Ranks that together hold the parameters of one pipeline stage, copies included: tensor x context x data."""
    embedding: Axis | None
    """First and last stage, which share a tied embedding; None with one stage, or on a stage between."""
    process_groups: ProcessGroupCollection
    """All groups in the form that Megatron's layers take."""

    @property
    def is_logger(self) -> bool:
        """True on the one rank that prints and writes logs."""
        return self.rank == 0

    @property
    def last_stage_rank(self) -> int:
        """Global rank of this pipeline's last stage."""
        return dist.get_process_group_ranks(self.pipeline.group)[-1]


def pick_device(requested: str, local_rank: int) -> torch.device:
    """The device of this process. Raises ConfigError if a GPU is asked for and missing, or hidden from Megatron-core."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda but torch sees no GPU here; set train.device=cpu or auto")
    if requested == "cpu" and torch.cuda.is_available():
        raise ConfigError(
            "train.device is cpu on a machine with a GPU; hide it with CUDA_VISIBLE_DEVICES= or set train.device=auto"
        )
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: torch sees {torch.cuda.device_count()}; start at most that many ranks on a node"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def join(info: RankInfo, device: torch.device, timeout_seconds: int) -> None:
    """Connect the ranks: NCCL on GPUs, gloo on CPUs. A collective that outlasts the timeout raises."""
    variables = {"MASTER_ADDR": info.master_addr, "MASTER_PORT": str(info.master_port)}
    variables[FLIGHT_RECORDER] = os.environ.get(FLIGHT_RECORDER, FLIGHT_RECORDER_SIZE)
    with environment(**variables):
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            rank=info.rank,
            world_size=info.world_size,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )


def join_alone(device: torch.device) -> Topology:
    """The layout of a process that is all there is, for programs that build whole models: without a launcher and a port."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return build_topology(ParallelConfig(), device)


def build_topology(parallel: ParallelConfig, device: torch.device, node_ranks: int = 0) -> Topology:
    """Make the groups of a layout over the joined ranks. Every rank calls it, once for each layout.

    node_ranks: ranks of one node, numbered one after another; 0 if unknown.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=parallel.timeout_seconds / 60,  # it makes a timedelta of them
    )
    pipeline = axis_of(parallel_state.get_pipeline_model_parallel_group())
    context = axis_of(parallel_state.get_context_parallel_group())
    timeout = timedelta(seconds=parallel.timeout_seconds)
    sequence = build_context_ranks(context.group, parallel.state_exchange, node_ranks, device, timeout)
    on_edge = pipeline.size > 1 and pipeline.rank in (0, pipeline.size - 1)
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        tensor=axis_of(parallel_state.get_tensor_model_parallel_group()),
        pipeline=pipeline,
        context=context,
        sequence=sequence,
        data=axis_of(parallel_state.get_data_parallel_group()),
        data_context=axis_of(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        model=axis_of(parallel_state.get_model_parallel_group()),
        stage=axis_of(parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)),
        embedding=axis_of(parallel_state.get_embedding_group()) if on_edge else None,
        process_groups=ProcessGroupCollection.use_mpu_process_groups(),
    )


def leave() -> None:
    """Tear the groups down at the end of a run."""
    if dist.is_initialized():
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def leaving() -> Iterator[None]:
    """At the end of the block, leave the groups that this process has joined in it."""
    had_joined = dist.is_initialized()
    try:
        yield
    finally:
        if not had_joined:
            leave()


def axis_of(group: dist.ProcessGroup) -> Axis:
    """This rank's place in a group."""
    return Axis(group, dist.get_rank(group), dist.get_world_size(group))
