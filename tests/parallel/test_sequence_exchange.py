"""States and halos over slices of a sequence equal the whole sequence, in value and gradient, in fp64.

Every rank computes the whole sequence too, from the same seed, and reports how far its slice is from it. Legend as in
sequence/plan.py.
"""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from based_megatron.config import ModelConfig, ParallelConfig
from based_megatron.kernels.rotary import rotary_tables
from based_megatron.model.config import based_config
from based_megatron.model.mixers import MIXERS, MixerInputs, MixerSubmodules
from based_megatron.model.mixers.linear_attention import TaylorLinearAttention
from based_megatron.parallel.sequence.exchange import exclusive_prefix, with_halo
from based_megatron.parallel.sequence.plan import SequencePlan
from based_megatron.parallel.topology import Axis, Topology, build_topology
from support.cases import each
from support.pool import rank_device

EXACT = 1e-12


def world_axis() -> Axis:
    assert dist.group.WORLD is not None
    return Axis(dist.group.WORLD, dist.get_rank(), dist.get_world_size())


def documents(length: int, size: int) -> Tensor:
    """Ids [B, S] with the starts that matter; each row is another case."""
    total = length * size
    starts: list[list[int]] = [
        [],  # one document over all slices
        [length],  # on the boundary of the second slice
        [length - 1],  # the last token of the first slice
        [length + 1],  # the second token of the second slice
        [p * length for p in range(1, size)],  # every slice its own document
        [length * (size - 1) + length // 2, total - 1],  # two in the last slice
        [length // 2],  # inside the first slice
        [total // 2, total // 2 + 1],  # a document of one token
        list(range(1, total)),  # every token its own document
    ]
    ids = torch.zeros(len(starts), total, dtype=torch.int32)
    for row, places in enumerate(starts):
        for place in places:
            if 0 < place < total:
                ids[row, place:] += 1
    return ids


def flows(ids_S: Tensor, length: int, earlier: int, later: int) -> bool:
    """Whether one document runs from the last token of one slice to the first of a later one."""
    return earlier < later and len(set(ids_S[(earlier + 1) * length - 1 : later * length + 1].tolist())) == 1


def gap(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None and expected is not None and found.shape == expected.shape
    return float((found - expected).abs().max()) if found.numel() else 0.0


def seeded(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def prefix_errors(length: int, packed: bool) -> dict[str, float]:
    """Errors of the prefix and of its gradient against the sum written out over pairs of slices."""
    axis = world_axis()
    ids = documents(length, axis.size)
    rows = len(ids)
    states = seeded(axis.size, rows, 2, 3, seed=1).requires_grad_()
    cotangents = seeded(axis.size, rows, 2, 3, seed=2)
    gates = torch.tensor(
        [
            [[float(flows(ids[b] if packed else ids[0], length, p, r)) for b in range(rows)] for p in range(axis.size)]
            for r in range(axis.size)
        ],
        dtype=torch.float64,
    )
    expected = torch.einsum("rpb,pb...->rb...", gates, states)
    expected.backward(cotangents)

    plan = SequencePlan.build(ids if packed else None, length, axis, torch.device("cpu"))
    mine = states.detach()[axis.rank].clone().requires_grad_()
    found = exclusive_prefix(mine, plan)
    assert found is not None and states.grad is not None
    found.backward(cotangents[axis.rank])
    return {"value": gap(found, expected[axis.rank]), "gradient": gap(mine.grad, states.grad[axis.rank])}


def wrong(errors: dict[Any, dict[str, float]]) -> dict[Any, dict[str, float]]:
    """The cases that are not exact."""
    return {case: found for case, found in errors.items() if not max(found.values()) < EXACT}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_the_prefix_is_the_sum_over_earlier_slices_of_the_document(worker_pool, size, packed):
    for errors in worker_pool(size).run(each, prefix_errors, [(length, packed) for length in (1, 2, 5)]):
        assert wrong(errors) == {}


def prefix_beside_a_huge_state() -> tuple[float, float]:
    """Largest (prefix of the first rank, change of the last rank's prefix) when the last rank's own state is 1e30."""
    axis = world_axis()
    plan = SequencePlan.build(None, 4, axis, torch.device("cpu"))
    state = torch.full((1, 3), 0.1, dtype=torch.float32)
    plain = exclusive_prefix(state, plan)
    beside = exclusive_prefix(state * (1e30 if axis.rank == axis.size - 1 else 1), plan)
    assert plain is not None and beside is not None
    return float(plain.abs().max()), float((beside - plain).abs().max())


def test_the_prefix_is_never_a_difference(worker_pool):
    """`Inclusive minus own` would lose every digit here, and leave rounding on the first rank."""
    results = worker_pool(4).run(prefix_beside_a_huge_state)
    assert results[0][0] == 0.0
    assert [changed for _, changed in results] == [0.0] * 4


def test_one_rank_needs_no_prefix_and_no_halo():
    plan = SequencePlan.build(documents(4, 1), 4, Axis(None, 0, 1), torch.device("cpu"))  # type: ignore[arg-type]
    x = torch.rand(9, 4, 2)
    assert exclusive_prefix(x, plan) is None and with_halo(x, 3, plan) is x


def halo_errors(length: int, wanted: int) -> dict[str, float]:
    """Errors of the halo and of its gradient against a slice of the whole."""
    axis = world_axis()
    ids = documents(length, axis.size)
    whole = seeded(len(ids), axis.size * length, 2, 3, seed=3).requires_grad_()
    plan = SequencePlan.build(ids, length, axis, torch.device("cpu"))
    reach = [slice(max(0, rank * length - wanted), (rank + 1) * length) for rank in range(axis.size)]
    cotangents = [seeded(*whole[:, part].shape, seed=10 + rank) for rank, part in enumerate(reach)]
    torch.stack([(whole[:, part] * g).sum() for part, g in zip(reach, cotangents, strict=True)]).sum().backward()

    here = slice(axis.rank * length, (axis.rank + 1) * length)
    mine = whole.detach()[:, here].clone().requires_grad_()
    found = with_halo(mine, wanted, plan)
    found.backward(cotangents[axis.rank])
    assert whole.grad is not None
    return {
        "value": gap(found, whole[:, reach[axis.rank]]),
        "gradient": gap(mine.grad, whole.grad[:, here]),
        "ids": gap(plan.document_ids(wanted), ids[:, reach[axis.rank]]),
        "rows": abs(plan.halo_rows(wanted) - (found.shape[1] - length)),
    }


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("size", [2, 4])
def test_a_halo_is_the_tokens_before_the_slice(worker_pool, size, length):
    """Shorter than, as long as, and longer than a slice, two slices, and the sequence."""
    for errors in worker_pool(size).run(each, halo_errors, [(length, rows) for rows in (0, 1, 2, 3, 4, 7, 9, 100)]):
        assert wrong(errors) == {}


def mixer_errors(
    letter: str, lengths: list[int], dtype: torch.dtype = torch.float64, backend: str = "reference", **model: Any
) -> dict[str, float]:
    """Errors of a mixer over slices against the same mixer over the whole: output, input gradient, weight gradients."""
    parallel = ParallelConfig(context=dist.get_world_size())
    topology = build_topology(parallel, rank_device(dist.get_rank()))
    mixer = small_mixer(letter, topology, parallel, dtype, backend, model)
    axis = topology.context
    errors: dict[str, float] = {}
    for length, packed in itertools.product(lengths, [False, True]):
        ids = documents(length, axis.size) if packed else None
        x = seeded(length * axis.size, 9, 16, seed=20).to(dtype)
        cotangent = seeded(*x.shape, seed=21).to(dtype)
        here = slice(axis.rank * length, (axis.rank + 1) * length)
        whole = run_mixer(mixer, x, cotangent, SequencePlan.build(ids, len(x), Axis(axis.group, 0, 1), topology.device))
        mine = run_mixer(mixer, x[here], cotangent[here], SequencePlan.build(ids, length, axis, topology.device))
        weights = [name for name in mine if name not in ("output", "input")]
        for name in weights:
            dist.all_reduce(mine[name], group=axis.group)
        case = f"slices of {length}, {'packed' if packed else 'one document'}: "
        parts = {name: whole[name][here] if name in ("output", "input") else whole[name] for name in mine}
        errors |= {case + name: gap(mine[name], part) / float(part.abs().max()) for name, part in parts.items()}
    return errors


def small_mixer(
    letter: str, topology: Topology, parallel: ParallelConfig, dtype: torch.dtype, backend: str, model: dict[str, Any]
) -> Any:
    """A small mixer, with the same weights on every rank."""
    settings = ModelConfig(
        layer_pattern=letter, hidden_size=16, ffn_hidden_size=16, num_heads=2, feature_dim=4, window_left=5
    )
    config = based_config(
        dataclasses.replace(settings, **model), parallel, dtype=dtype, backend=backend, recompute="none"
    )
    mixer = MIXERS[letter](config, MixerSubmodules(), 1, topology.process_groups)
    for number, parameter in enumerate(mixer.parameters()):
        parameter.data.copy_(seeded(*parameter.shape, seed=number) / 2)
    return mixer


def run_mixer(mixer: Any, x: Tensor, cotangent: Tensor, plan: SequencePlan) -> dict[str, Tensor]:
    """Output and all gradients."""
    x = x.clone().requires_grad_()
    rotary = rotary_tables(torch.arange(plan.start, plan.start + plan.length), 8, 1.0, 1e4, x.dtype)
    mixer.zero_grad()
    output = mixer(x, inputs=MixerInputs(plan, rotary))[0]
    output.backward(cotangent)
    assert x.grad is not None
    gradients = {name: parameter.grad.clone() for name, parameter in mixer.named_parameters()}
    return {"output": output.detach(), "input": x.grad, **gradients}


@pytest.mark.parametrize(
    ("letter", "model"),
    [
        ("c", {}),
        ("c", {"conv_kernel": 4}),
        ("c", {"conv_kernel": 1}),
        ("L", {}),
        ("S", {}),
        ("S", {"window_left": 0}),
        ("A", {}),
    ],
)
def test_a_mixer_over_four_slices_is_the_mixer_over_the_whole(worker_pool, letter, model):
    """A window of 5 before is longer than slices of 1 and 3; 4 taps reach over three slices of 1."""
    for errors in worker_pool(4).run(mixer_errors, letter, [1, 3, 8], **model):
        assert len(errors) > 2 * 3 * 3
        assert {case: error for case, error in errors.items() if not error < EXACT} == {}


@pytest.mark.parametrize("letter", ["c", "L", "S"])
def test_the_kernels_over_two_slices_are_the_kernels_over_the_whole(worker_pool, letter):
    """States, halos and their gradients through the Triton kernels, interpreted on a CPU."""
    for errors in worker_pool(2).run(mixer_errors, letter, [3, 20], torch.float32, "triton"):
        assert {case: error for case, error in errors.items() if not error < 1e-5} == {}


def test_the_state_of_a_slice_comes_from_the_kernels(monkeypatch):
    """Its reference would be right, and many times slower on a GPU."""
    asked: list[str] = []

    def segment_state(*args: Any, backend: str) -> Tensor:
        asked.append(backend)
        raise NotImplementedError

    monkeypatch.setattr("based_megatron.model.mixers.linear_attention.segment_state", segment_state)
    mixer = SimpleNamespace(
        qkv=lambda x: (x, None), heads=1, local_parts=[4, 4, 4], config=SimpleNamespace(backend="triton")
    )
    plan = SimpleNamespace(document_ids=lambda: None, axis=SimpleNamespace(size=2))
    with pytest.raises(NotImplementedError):
        TaylorLinearAttention.forward(mixer, torch.zeros(3, 1, 12), inputs=SimpleNamespace(plan=plan))
    assert asked == ["triton"]
