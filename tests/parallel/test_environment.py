"""Ranks as torchrun, SLURM or nobody set them in the environment."""

import socket

import pytest

from based_megatron.errors import ConfigError
from based_megatron.parallel.environment import RankInfo, rank_from_environment

MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "20123"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"} | MASTER
SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "2"} | MASTER


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    "environment, expected",
    [
        (TORCHRUN, RankInfo(5, 8, 1, "node1", 20123)),
        (SRUN, RankInfo(3, 4, 2, "node1", 20123)),
        (SRUN | TORCHRUN, RankInfo(5, 8, 1, "node1", 20123)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | MASTER, RankInfo(0, 1, 0, "node1", 20123)),
    ],
    ids=["torchrun", "srun", "torchrun inside an srun step", "one rank of torchrun"],
)
def test_the_rank_is_what_the_launcher_has_set(environment, expected):
    assert rank_from_environment(environment) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"},
        {"SLURM_NTASKS": "4"},
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"},
        {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"},
    ],
    ids=["nothing", "a stale address", "shell of salloc", "batch script without srun", "srun of one task"],
)
def test_a_single_process_takes_a_free_port(environment):
    info = rank_from_environment(environment)
    assert (info.rank, info.world_size, info.local_rank, info.master_addr) == (0, 1, 0, "127.0.0.1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", info.master_port))


@pytest.mark.parametrize("complete", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_each_missing_variable_is_named(complete):
    for name in without(complete, "SLURM_STEP_ID"):
        with pytest.raises(ConfigError, match=name):
            rank_from_environment(without(complete, name))


@pytest.mark.parametrize(
    "change",
    [
        {"RANK": "8"},
        {"RANK": "-1"},
        {"LOCAL_RANK": "6"},
        {"WORLD_SIZE": "many"},
        {"MASTER_PORT": ""},
        {"MASTER_ADDR": ""},
    ],
    ids=str,
)
def test_impossible_values_are_refused(change):
    with pytest.raises(ConfigError):
        rank_from_environment(TORCHRUN | change)


@pytest.mark.parametrize(
    ("variables", "node_ranks"),
    [
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "2"}, 2),
        (TORCHRUN, 0),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, 2),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4"}, 4),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2,1(x2)"}, 0),  # nodes differ
        (SRUN, 0),
    ],
)
def test_nodes_with_equal_numbers_of_ranks_are_known(variables, node_ranks):
    """Exchanges between slices go by nodes where ranks fill them evenly."""
    assert rank_from_environment(variables).node_ranks == node_ranks
