"""Process groups of a layout: the ranks of each axis, and the groups that DeepSpeed gets."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from based_megatron.config import ParallelConfig
from based_megatron.errors import ConfigError
from based_megatron.parallel.deepspeed import DeepSpeedGroups
from based_megatron.parallel.topology import Axis, build_topology, pick_device
from support.cases import each
from support.pool import JOIN_SECONDS, rank_device

AXES = ["tensor", "context", "data", "pipeline", "data_context", "model", "embedding"]


def groups_around(parallel: ParallelConfig) -> dict[str, Any]:
    """Global ranks of each axis' group, with this rank's place checked against its position in it."""
    topology = build_topology(parallel, rank_device(dist.get_rank()))
    found: dict[str, Any] = {"logger": topology.is_logger, "last stage": topology.last_stage_rank}
    for name in AXES:
        axis: Axis | None = getattr(topology, name)
        if axis is None:
            found[name] = None
            continue
        ranks = dist.get_process_group_ranks(axis.group)
        assert (ranks[axis.rank], len(ranks)) == (dist.get_rank(), axis.size), name
        found[name] = ranks
    return found


# For each layout of four ranks: the groups of rank 1.
LAYOUTS: list[tuple[ParallelConfig, dict[str, Any]]] = [
    (
        ParallelConfig(),
        dict(
            tensor=[1],
            context=[1],
            data=[0, 1, 2, 3],
            pipeline=[1],
            data_context=[0, 1, 2, 3],
            model=[1],
            embedding=None,
        ),
    ),
    (
        ParallelConfig(tensor=2, context=2),
        dict(tensor=[0, 1], context=[1, 3], data=[1], pipeline=[1], data_context=[1, 3], model=[0, 1], embedding=None),
    ),
    (
        ParallelConfig(context=2),
        dict(
            tensor=[1], context=[0, 1], data=[1, 3], pipeline=[1], data_context=[0, 1, 2, 3], model=[1], embedding=None
        ),
    ),
    (
        ParallelConfig(tensor=2, pipeline=2),
        dict(
            tensor=[0, 1],
            context=[1],
            data=[1],
            pipeline=[1, 3],
            data_context=[1],
            model=[0, 1, 2, 3],
            embedding=[1, 3],
        ),
    ),
    (
        ParallelConfig(pipeline=4),
        dict(
            tensor=[1],
            context=[1],
            data=[1],
            pipeline=[0, 1, 2, 3],
            data_context=[1],
            model=[0, 1, 2, 3],
            embedding=None,
        ),
    ),
    (
        ParallelConfig(pipeline=2, virtual_pipeline=2),
        dict(
            tensor=[1], context=[1], data=[0, 1], pipeline=[1, 3], data_context=[0, 1], model=[1, 3], embedding=[1, 3]
        ),
    ),
]


@pytest.fixture(scope="module")
def layouts(worker_pool) -> list[dict[Any, dict[str, Any]]]:
    """The groups of every layout, as each of four ranks sees them."""
    return worker_pool(4).run(each, groups_around, [parallel for parallel, _ in LAYOUTS])


@pytest.mark.parametrize(("parallel", "groups"), LAYOUTS)
def test_groups_of_rank_1_are_in_megatrons_order(layouts, parallel, groups):
    """Megatron's order: tensor fastest, then context, data, pipeline."""
    found = layouts[1][parallel]
    assert {name: found[name] for name in AXES} == groups
    assert found["last stage"] == groups["pipeline"][-1]


def test_rank_0_logs_alone(layouts):
    assert [rank[ParallelConfig(pipeline=4)]["logger"] for rank in layouts] == [True, False, False, False]


def test_only_the_end_stages_share_the_embedding(layouts):
    assert [rank[ParallelConfig(pipeline=4)]["embedding"] for rank in layouts] == [[0, 3], None, None, [0, 3]]


def deepspeed_view(parallel: ParallelConfig) -> dict[str, Any]:
    groups = DeepSpeedGroups(build_topology(parallel, rank_device(dist.get_rank())))
    ranks = dist.get_process_group_ranks
    found: dict[str, Any] = {}
    for kind in ("model_parallel", "tensor_model_parallel", "pipeline_model_parallel", "data_parallel"):
        group = getattr(groups, f"get_{kind}_group")()
        rank, size = getattr(groups, f"get_{kind}_rank")(), getattr(groups, f"get_{kind}_world_size")()
        assert (rank, size) == (dist.get_rank(group), dist.get_world_size(group)), kind
        found[kind] = ranks(group)
    assert groups.get_data_parallel_group_ranks() == found["data_parallel"]
    assert groups.get_tensor_model_parallel_src_rank() == found["tensor_model_parallel"][0]
    found["ulysses"] = [name for name in dir(groups) if "sequence" in name]
    return found


def test_deepspeed_shards_over_data_and_context(worker_pool):
    """It sums the gradient norm over tensor and pipeline ranks; methods of Ulysses would make it sum gradients."""
    context, model = ParallelConfig(context=2), ParallelConfig(tensor=2, pipeline=2)
    for rank, found in enumerate(worker_pool(4).run(each, deepspeed_view, [context, model])):
        assert found[context]["data_parallel"] == [0, 1, 2, 3] and found[context]["model_parallel"] == [rank]
        assert found[context]["ulysses"] == []
        assert found[model]["data_parallel"] == [rank] and found[model]["model_parallel"] == [0, 1, 2, 3]
        assert found[model]["tensor_model_parallel"] == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert found[model]["pipeline_model_parallel"] == [rank % 2, rank % 2 + 2]


def timeouts_seconds(timeout_seconds: int) -> dict[str, float]:
    """By group, the seconds after which a collective of it raises."""
    device = rank_device(dist.get_rank())
    topology = build_topology(ParallelConfig(tensor=2, pipeline=2, timeout_seconds=timeout_seconds), device)
    groups = {name: axis.group for name in AXES if (axis := getattr(topology, name)) is not None}
    groups |= {"world": dist.group.WORLD}
    return {name: group._get_backend(device).options._timeout.total_seconds() for name, group in groups.items()}


def test_every_group_has_the_timeout_of_the_config(worker_pool):
    """Not in whole minutes, as Megatron-core counts, and not torch's 10 or 30."""
    for found in worker_pool(4).run(timeouts_seconds, 47):
        assert found.pop("world") == JOIN_SECONDS
        assert set(found.values()) == {47.0} and len(found) >= len(AXES) - 1


@pytest.fixture
def machine(monkeypatch):
    """machine(n) pretends that torch sees n GPUs; returns the list of devices that are then chosen."""

    def pretend(gpus: int) -> list[int]:
        chosen: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return pretend


@pytest.mark.parametrize("requested", ["auto", "cpu"])
def test_the_device_is_the_cpu_without_a_gpu(machine, requested):
    chosen = machine(0)
    assert pick_device(requested, 3) == torch.device("cpu") and chosen == []


@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_the_device_is_the_gpu_of_the_local_rank(machine, requested):
    chosen = machine(2)
    assert pick_device(requested, 1) == torch.device("cuda", 1) and chosen == [1]


@pytest.mark.parametrize(
    ("gpus", "requested", "local_rank", "expected"),
    [
        (0, "cuda", 0, r"train\.device is cuda but torch sees no GPU"),
        (1, "cpu", 0, "CUDA_VISIBLE_DEVICES= or set"),  # Megatron-core would use the GPU in places
        (2, "auto", 2, "local rank 2 has no GPU: torch sees 2"),
    ],
)
def test_a_device_that_cannot_be_had_is_refused(machine, gpus, requested, local_rank, expected):
    machine(gpus)
    with pytest.raises(ConfigError, match=expected):
        pick_device(requested, local_rank)
