"""How far each mixer reaches, where documents stop it, and that positions matter only relatively, and only where they should."""

from typing import Any

import pytest
import torch
from small_models import shared_config, topology_of, whole_plan
from torch import Tensor

from based_megatron.kernels.rotary import rotary_tables
from based_megatron.model.mixers import MIXERS, MixerInputs, MixerSubmodules
from based_megatron.parallel.megatron import ColumnParallelLinear, RowParallelLinear

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
    return mixer, topology


def rotary(first: int) -> tuple[Tensor, Tensor]:
    return rotary_tables(torch.arange(first, first + LENGTH), 8, 1.0, 1e4, torch.float64)


def inputs_at(topology: Any, first: int = 0, document_start: int | None = None) -> MixerInputs:
    ids = None if document_start is None else (torch.arange(LENGTH) >= document_start).int()[None]
    return MixerInputs(whole_plan(topology, LENGTH, ids), rotary(first))


def some_x() -> Tensor:
    return torch.randn(LENGTH, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def touched(letter: str, position: int, document_start: int | None, **model: Any) -> list[int]:
    """Positions whose output changes when the input at `position` does."""
    mixer, topology = mixer_of(letter, **model)
    inputs, x = inputs_at(topology, document_start=document_start), some_x()
    other = x.clone()
    other[position] += 1
    with torch.no_grad():
        change = mixer(other, inputs=inputs)[0] - mixer(x, inputs=inputs)[0]
    return [t for t in range(LENGTH) if float(change[t].abs().max()) > 1e-12]


REACH = [
    ("c", {"conv_kernel": 3}, 2),
    ("c", {"conv_kernel": 4}, 3),
    ("c", {"conv_kernel": 1}, 0),
    ("S", {"window_left": 5}, 5),
    ("S", {"window_left": 0}, 0),
    ("L", {}, LENGTH),
    ("A", {}, LENGTH),
]


@pytest.mark.parametrize(("letter", "model", "reach"), REACH)
def test_a_token_reaches_this_far_and_never_back(worker_pool, letter, model, reach):
    (found,) = worker_pool(1).run(touched, letter, 7, None, **model)
    assert found == list(range(7, min(LENGTH, 7 + reach + 1)))


@pytest.mark.parametrize(("letter", "model", "reach"), REACH)
def test_a_token_does_not_reach_into_the_next_document(worker_pool, letter, model, reach):
    (found,) = worker_pool(1).run(touched, letter, 7, 9, **model)
    assert found == list(range(7, min(9, 7 + reach + 1)))


def shifted_change(letter: str) -> float:
    """Largest change of the output when the whole sequence stands 1000 positions later."""
    mixer, topology = mixer_of(letter)
    with torch.no_grad():
        here, there = (mixer(some_x(), inputs=inputs_at(topology, first))[0] for first in (0, 1000))
    return float((here - there).abs().max())


@pytest.mark.parametrize("letter", MIXERS)
def test_only_distances_count(worker_pool, letter):
    """Exactly so without rotary; to the rounding of the tables with it."""
    (change,) = worker_pool(1).run(shifted_change, letter)
    assert change < 1e-9 if MIXERS[letter].rotates else change == 0


def unrotated_change(letter: str) -> float:
    """Largest change of the output when positions are taken away."""
    mixer, topology = mixer_of(letter)
    inputs = inputs_at(topology)
    still = MixerInputs(inputs.plan, (torch.ones_like(rotary(0)[0]), torch.zeros_like(rotary(0)[1])))
    with torch.no_grad():
        return float((mixer(some_x(), inputs=inputs)[0] - mixer(some_x(), inputs=still)[0]).abs().max())


@pytest.mark.parametrize("letter", MIXERS)
def test_positions_are_in_window_and_full_attention_alone(worker_pool, letter):
    (change,) = worker_pool(1).run(unrotated_change, letter)
    assert (change > 1e-3) == (letter in "SA")


def replaced_projections(letter: str) -> set[str]:
    mixer, _ = mixer_of(letter, MixerSubmodules(CountedColumn, CountedRow))
    return {type(module).__name__ for module in mixer.children()}


@pytest.mark.parametrize("letter", MIXERS)
def test_projections_can_be_replaced(worker_pool, letter):
    assert worker_pool(1).run(replaced_projections, letter) == [{"CountedColumn", "CountedRow"}]
