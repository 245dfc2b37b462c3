"""How far each mixer reaches, where documents stop it, and that positions matter only relatively, and only where they should."""

from typing import Any

import pytest
import torch
from small_models import here, shared_config, whole_plan
from torch import Tensor
from torch.nn import functional

from based_megatron.kernels.rotary import rotary_tables
from based_megatron.model.mixers import MIXERS, MixerInputs, MixerSubmodules
from based_megatron.parallel.megatron import ColumnParallelLinear, RowParallelLinear
from support.cases import each
from support.layouts import topology_of

LENGTH = 24


class CountedColumn(ColumnParallelLinear):
    """A projection of somebody else's."""


class CountedRow(RowParallelLinear):
    """A projection of somebody else's."""


def mixer_of(letter: str, submodules: MixerSubmodules | None = None, **model: Any) -> tuple[Any, Any]:
    topology = topology_of()
    config = shared_config(torch.float64, **model)
    mixer = MIXERS[letter](config, submodules or MixerSubmodules(), 1, topology.process_groups)
    for parameter in mixer.parameters():
        parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return here(mixer), topology


def rotary(first: int) -> tuple[Tensor, Tensor]:
    return rotary_tables(here(torch.arange(first, first + LENGTH)), 8, 1.0, 1e4, torch.float64)


def inputs_at(topology: Any, first: int = 0, document_start: int | None = None) -> MixerInputs:
    ids = None if document_start is None else here((torch.arange(LENGTH) >= document_start).int()[None])
    return MixerInputs(whole_plan(topology, LENGTH, ids), rotary(first))


def some_x() -> Tensor:
    return here(torch.randn(LENGTH, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))


def touched(letter: str, kernel: int, window: int, document_start: int | None) -> list[int]:
    """Positions whose output changes when the input at position 7 does."""
    mixer, topology = mixer_of(letter, conv_kernel=kernel, window_left=window)
    inputs, x = inputs_at(topology, document_start=document_start), some_x()
    other = x.clone()
    other[7] += 1
    with torch.no_grad():
        change = mixer(other, inputs=inputs)[0] - mixer(x, inputs=inputs)[0]
    return [t for t in range(LENGTH) if float(change[t].abs().max()) > 1e-12]


# Letter, taps, keys before a query -> positions after its own that a token reaches.
REACH = {
    ("c", 3, 11): 2,
    ("c", 4, 11): 3,
    ("c", 1, 11): 0,
    ("S", 3, 5): 5,
    ("S", 3, 0): 0,
    ("L", 3, 5): LENGTH,
    ("A", 3, 5): LENGTH,
}


@pytest.mark.parametrize(("document_start", "end"), [(None, LENGTH), (9, 9)])
def test_a_token_reaches_this_far_and_never_back(worker_pool, document_start, end):
    """It does not reach into the document that starts two tokens after it."""
    (found,) = worker_pool(1).run(each, touched, [(*case, document_start) for case in REACH])
    expected = {case: list(range(7, min(end, 7 + reach + 1))) for case, reach in REACH.items()}
    assert {case[:3]: positions for case, positions in found.items()} == expected


def by_hand(letter: str, mixer: Any, x: Tensor) -> Tensor:
    """The mixer of one sequence x [T, D] as dense formulas: 4 heads of 8, window 11, 3 taps."""
    weights = dict(mixer.named_parameters())
    if letter == "c":
        u, gate = functional.linear(x, weights["in_proj.weight"], weights["in_proj.bias"]).split([64, 64], dim=-1)
        taps = weights["conv_weight"]
        before = [torch.cat([u.new_zeros(k, 64), u[: LENGTH - k]]) for k in range(3)]
        conv = sum(taps[:, 2 - k] * before[k] for k in range(3))
        return functional.linear(functional.silu(conv) * gate, weights["out_proj.weight"], weights["out_proj.bias"])
    q, k, v = (part.unflatten(-1, (4, 8)).transpose(0, 1) for part in (x @ weights["qkv.weight"].T).chunk(3, dim=-1))
    distance = here(torch.arange(LENGTH)[:, None] - torch.arange(LENGTH))
    if letter == "L":
        seen, square = distance >= 0, "q_norm.weight" in weights
        if "prefix_kv.weight" in weights:
            prefix = (x[:7] @ weights["prefix_kv.weight"].T).chunk(2, dim=-1)
            prefix_k, prefix_v = (part.unflatten(-1, (4, 8)).transpose(0, 1) for part in prefix)
            k, v = torch.cat([k, prefix_k], dim=1), torch.cat([v, prefix_v], dim=1)
            seen = torch.cat([seen, torch.ones_like(seen[:, :7])], dim=1)
        if square:
            q, k = (
                by_hand_norm(x) * weights[f"{name}.weight"].view(4, 1, 8) + weights[f"{name}.bias"].view(4, 1, 8)
                for x, name in ((q, "q_norm"), (k, "k_norm"))
            )
        scores = q @ k.transpose(1, 2) / 8**0.5
        weight = (scores**2 if square else 1 + scores + scores**2 / 2) * seen
        mixed = (weight / (weight.sum(-1, keepdim=True) + (1e-5 if square else 0))) @ v
    else:
        q, k = rotated(q), rotated(k)
        seen = (distance >= 0) & (distance <= (11 if letter == "S" else LENGTH))
        mixed = (q @ k.transpose(1, 2) / 8**0.5).masked_fill(~seen, float("-inf")).softmax(-1) @ v
    return mixed.transpose(0, 1).flatten(1) @ weights["out_proj.weight"].T


def by_hand_norm(x_HTF: Tensor) -> Tensor:
    centred = x_HTF - x_HTF.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + 1e-5) ** 0.5


def rotated(x_HTV: Tensor) -> Tensor:
    """Pairs (r, r + 4) of a head as complex numbers, rotated by position x 10000^(-r / 4)."""
    angles = here(torch.arange(LENGTH)[:, None] * 1e4 ** (-torch.arange(4, dtype=torch.float64) / 4))
    pairs = torch.complex(x_HTV[..., :4], x_HTV[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def formula_error(letter: str, **model: Any) -> float:
    mixer, topology = mixer_of(letter, **model)
    with torch.no_grad():
        found = mixer(some_x(), inputs=inputs_at(topology))[0]
        return float((found - by_hand(letter, mixer, some_x()[:, 0])[:, None]).abs().max())


def test_a_mixer_is_its_formula(worker_pool):
    """This fixes the order of the fused parts: [u | gate], [q | k | v]."""
    (errors,) = worker_pool(1).run(each, formula_error, list(MIXERS))
    assert {letter: error for letter, error in errors.items() if not error < 1e-10} == {}


def test_rebased_linear_attention_is_its_formula(worker_pool):
    """Normed, scaled and shifted queries and keys, each by numbers of its own."""
    (error,) = worker_pool(1).run(formula_error, "L", feature_map="rebased")
    assert error < 1e-10


@pytest.mark.parametrize("feature_map", ["taylor", "rebased"])
def test_linear_attention_with_a_prefix_is_its_formula(worker_pool, feature_map):
    """All tokens see the second keys and values of the first 7; ReBased norms those keys too."""
    (error,) = worker_pool(1).run(formula_error, "L", prefix_tokens=7, feature_map=feature_map)
    assert error < 1e-10


def positions_changed_by(position: int, document_start: int | None) -> list[int]:
    mixer, topology = mixer_of("L", prefix_tokens=7)
    inputs, x = inputs_at(topology, document_start=document_start), some_x()
    other = x.clone()
    other[position] += 1
    with torch.no_grad():
        change = mixer(other, inputs=inputs)[0] - mixer(x, inputs=inputs)[0]
    return [t for t in range(LENGTH) if float(change[t].abs().max()) > 1e-12]


def test_a_prefix_is_seen_by_its_own_document_alone(worker_pool):
    """Whole: by all. Cut by a document that starts at 5: tokens of the second document are no prefix, and see none."""
    cases = [(6, None), (7, None), (4, 5), (6, 5)]
    found = [worker_pool(1).run(positions_changed_by, *case)[0] for case in cases]
    assert found == [list(range(first, end)) for first, end in ((0, LENGTH), (7, LENGTH), (0, 5), (6, LENGTH))]


def shifted_change(letter: str) -> float:
    """Largest change of the output when the whole sequence stands 1000 positions later."""
    mixer, topology = mixer_of(letter)
    with torch.no_grad():
        here, there = (mixer(some_x(), inputs=inputs_at(topology, first))[0] for first in (0, 1000))
    return float((here - there).abs().max())


def test_only_distances_count(worker_pool):
    """Equality is exact without rotary, and to the rounding of the tables with it."""
    (changes,) = worker_pool(1).run(each, shifted_change, list(MIXERS))
    assert changes["c"] == changes["L"] == 0
    assert changes["S"] < 1e-9 and changes["A"] < 1e-9


def unrotated_change(letter: str) -> float:
    """Largest change of the output when positions are taken away."""
    mixer, topology = mixer_of(letter)
    inputs = inputs_at(topology)
    still = MixerInputs(inputs.plan, (torch.ones_like(rotary(0)[0]), torch.zeros_like(rotary(0)[1])))
    with torch.no_grad():
        return float((mixer(some_x(), inputs=inputs)[0] - mixer(some_x(), inputs=still)[0]).abs().max())


def test_positions_are_in_window_and_full_attention_alone(worker_pool):
    (changes,) = worker_pool(1).run(each, unrotated_change, list(MIXERS))
    assert {letter for letter, change in changes.items() if change > 1e-3} == {"S", "A"}
    assert changes["c"] == changes["L"] == 0


def replaced_projections(letter: str) -> set[str]:
    mixer, _ = mixer_of(letter, MixerSubmodules(CountedColumn, CountedRow))
    return {type(module).__name__ for module in mixer.children()}


def test_projections_can_be_replaced(worker_pool):
    (found,) = worker_pool(1).run(each, replaced_projections, list(MIXERS))
    assert found == {letter: {"CountedColumn", "CountedRow"} for letter in MIXERS}
