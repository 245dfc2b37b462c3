"""The rank of this process, as the variables of torchrun or SLURM have it."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from based_megatron.errors import ConfigError


@dataclass(frozen=True)
class RankInfo:
    """Place of this process among all ranks of a run."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    node_ranks: int = 0
    """Number of ranks on every node, which are numbered one after another; 0 if unknown, or if nodes differ."""


def rank_from_environment(environment: Mapping[str, str] = os.environ) -> RankInfo:
    """Rank that torchrun's variables give, else those of an srun step (one task per rank); a run of one process if there are none.

    A shell of salloc and a batch script have some of SLURM's variables too; only srun sets SLURM_STEP_ID, so only its
    tasks are ranks. A run of one process needs no address: it takes a free port of this machine.
    Raises ConfigError if only some of a launcher's variables are set, or if they make no sense.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        rank, world_size, local_rank = _integers(environment, "RANK", "WORLD_SIZE", "LOCAL_RANK")
        node_ranks = environment.get("LOCAL_WORLD_SIZE", "")
    elif "SLURM_STEP_ID" in environment:
        rank, world_size, local_rank = _integers(environment, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        # For example "8(x4)"; "8(x3),4" where nodes differ.
        node_ranks = re.sub(r"\(x\d+\)$", "", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    else:
        return RankInfo(0, 1, 0, "127.0.0.1", _free_port())
    if not (0 <= rank < world_size and 0 <= local_rank <= rank):
        raise ConfigError(
            f"rank {rank} of {world_size} (local rank {local_rank}) is impossible; start ranks with `based launch`"
        )
    if world_size == 1 and "MASTER_ADDR" not in environment:
        return RankInfo(0, 1, 0, "127.0.0.1", _free_port())
    (master_port,) = _integers(environment, "MASTER_PORT")
    if not environment.get("MASTER_ADDR"):
        raise ConfigError(f"MASTER_ADDR is not set for {world_size} ranks; start them with `based launch`")
    known_node_ranks = int(node_ranks) if node_ranks.isdecimal() else 0
    return RankInfo(rank, world_size, local_rank, environment["MASTER_ADDR"], master_port, known_node_ranks)


def _integers(environment: Mapping[str, str], *names: str) -> list[int]:
    missing = [name for name in names if name not in environment]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} not set for this rank; start ranks with `based launch` or torchrun")
    for name in names:
        if not environment[name].isdecimal():
            raise ConfigError(f"{name} is {environment[name]!r}, not a number; start ranks with `based launch`")
    return [int(environment[name]) for name in names]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
