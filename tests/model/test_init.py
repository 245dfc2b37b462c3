"""Initial weights: the released distributions, and the same numbers under every layout."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import config_with

from based_megatron.config import ModelConfig, ParallelConfig
from based_megatron.model.build import build_model
from based_megatron.model.init import initial_weight
from based_megatron.parallel.linear import is_tied_copy, shard_spec
from support.layouts import gather_unsharded, topology_of

MODEL = ModelConfig(layer_pattern="cLSA*2", init_std=0.05)
SHAPE = (500, 400)


def draw(name: str, shape: tuple[int, ...] = SHAPE, seed: int = 3) -> torch.Tensor:
    return initial_weight(name, shape, MODEL, seed)


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("embedding.weight", 0.05),
        ("output.weight", 0.05),
        ("layers.0.mixer.in_proj.weight", 0.05),
        ("layers.1.mixer.qkv.weight", 0.05),
        ("layers.1.mlp.fc1.weight", 0.05),
        # Back to the residual: / sqrt(2 x 8 layers).
        ("layers.0.mixer.out_proj.weight", 0.0125),
        ("layers.7.mixer.out_proj.weight", 0.0125),
        ("layers.1.mlp.fc2.weight", 0.0125),
    ],
)
def test_weights_are_normal(name, std):
    """200,000 draws: the mean is known to std / 447, the deviation to 0.16 %; four of these are allowed."""
    weight = draw(name)
    assert float(weight.mean()) == pytest.approx(0, abs=4 * std / 447)
    assert float(weight.std()) == pytest.approx(std, rel=0.0064)
    assert float(weight.abs().max()) > 4 * std, "not cut off"


@pytest.mark.parametrize("taps", [3, 4])
def test_taps_are_uniform_over_their_fan_in(taps):
    bound = 1 / math.sqrt(taps)
    weight = draw("layers.0.mixer.conv_weight", (50_000, taps))
    assert bound * 0.999 < float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)


@pytest.mark.parametrize("name", ["final_norm.weight", "layers.3.mixer_norm.weight", "layers.3.mlp_norm.weight"])
def test_norms_are_one(name):
    assert torch.equal(draw(name, (64,)), torch.ones(64))


@pytest.mark.parametrize("name", ["layers.0.mixer.in_proj.bias", "layers.0.mixer.out_proj.bias"])
def test_biases_are_zero(name):
    assert torch.equal(draw(name, (64,)), torch.zeros(64))


def test_every_name_and_seed_has_its_own_draw():
    names = ["layers.0.mlp.fc1.weight", "layers.1.mlp.fc1.weight", "layers.10.mlp.fc1.weight", "embedding.weight"]
    draws = [draw(name, (8,), seed) for name in names for seed in (3, 4)]
    assert len({tuple(values.tolist()) for values in draws}) == len(draws)


def test_the_global_generator_has_no_part_in_it():
    torch.manual_seed(0)
    first = draw("embedding.weight", (8,))
    torch.manual_seed(1)
    assert torch.equal(draw("embedding.weight", (8,)), first)


def checksums(parallel: ParallelConfig) -> dict[str, Any]:
    """Name, shape and exact sum of every unsharded parameter, on rank 0."""
    config = config_with(parallel)
    topology = topology_of(parallel)
    chunks = build_model(config, topology)
    pieces = {
        shard_spec(p).name: (shard_spec(p), p.detach().cpu().double())
        for chunk in chunks
        for p in chunk.parameters()
        if not is_tied_copy(p)
    }
    full = gather_unsharded(pieces)
    weigh = {name: torch.arange(1, 1 + value.numel()).reshape(value.shape) for name, value in full.items()}
    sums = {name: (tuple(value.shape), float((value * weigh[name]).sum())) for name, value in full.items()}
    copies = [p for chunk in chunks for p in chunk.parameters() if is_tied_copy(p)]
    for copy in copies:
        whole = initial_weight("embedding.weight", shard_spec(copy).shape, config.model, config.train.seed)
        assert dist.get_rank() and torch.equal(copy.cpu(), shard_spec(copy).cut(whole))
    return sums


@pytest.fixture(scope="module")
def single(worker_pool) -> dict[str, Any]:
    """The checksums of a single process."""
    return worker_pool(1).run(checksums, ParallelConfig())[0]


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor=2),
        ParallelConfig(pipeline=2),
        ParallelConfig(pipeline=2, virtual_pipeline=2),
        ParallelConfig(context=2),
    ],
)
def test_every_layout_starts_with_the_same_bits(worker_pool, single, parallel):
    assert worker_pool(2).run(checksums, parallel)[0] == single


def test_names_and_shapes_of_every_mixer(single):
    """Width 32, MLP 48, 4 heads with features of 8, 3 taps over 64 channels; unsharded."""
    found = {name: shape for name, (shape, _) in single.items()}
    conv = {"in_proj.weight": (128, 32), "in_proj.bias": (128,), "conv_weight": (64, 3)}
    mixers: dict[str, dict[str, tuple[int, ...]]] = {
        "c": {**conv, "out_proj.weight": (32, 64), "out_proj.bias": (32,)},
        "L": {"qkv.weight": (96, 32), "out_proj.weight": (32, 32)},
        "S": {"qkv.weight": (96, 32), "out_proj.weight": (32, 32)},
        "A": {"qkv.weight": (96, 32), "out_proj.weight": (32, 32)},
    }
    expected: dict[str, tuple[int, ...]] = {"embedding.weight": (91, 32), "final_norm.weight": (32,)}
    for i, letter in enumerate("cLSAcLSc"):
        expected |= {f"layers.{i}.mixer.{name}": shape for name, shape in mixers[letter].items()}
        expected |= {f"layers.{i}.{norm}.weight": (32,) for norm in ("mixer_norm", "mlp_norm")}
        expected |= {f"layers.{i}.mlp.fc1.weight": (96, 32), f"layers.{i}.mlp.fc2.weight": (32, 48)}
    assert found == expected
