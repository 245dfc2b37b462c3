"""Training in fp8: what of the model runs in it, every layout against the single process, and curves beside those of bf16."""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from based_megatron.config import Config, ParallelConfig
from based_megatron.kernels.fp8 import reference
from based_megatron.parallel.fp8 import fp8_products, takes_fp8
from based_megatron.parallel.host import replaced
from support.layouts import build_run, small_config

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2-zero1": (2, {}),
    "dp2-zero2": (2, {"zero_stage": 2}),
    "dp2-zero3": (2, {"zero_stage": 3}),
    "pp2": (2, {"pipeline": 2}),
    "cp2": (2, {"context": 2}),
}
STEPS, LR = 3, 3e-3


def fp8_config(
    precision: str = "fp8", layers: str = ":", parallel: dict[str, Any] | None = None, **train: Any
) -> Config:
    config = small_config(ParallelConfig(**(parallel or {})), clip_grad_norm=0.5, **train)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision, fp8_layers=layers))


def train(config: Config, steps: int, scale: Callable[[Tensor], Tensor] | None = None) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step; `scale` replaces the choice of the rows' scales."""
    with nullcontext() if scale is None else replaced(reference, power_of_two_scale=scale):
        run = build_run(config)
        return [run.train_step(number % 4, True, LR) for number in range(steps)]


def parts_in_fp8(config: Config) -> tuple[list[str], list[str]]:
    """Names of layers with products in e4m3, and of norms that write it."""
    chunk = build_run(config).step.chunks[0]
    layers = [name for name, part in chunk.named_modules() if fp8_products([part]) and hasattr(part, "product")]
    assert all(takes_fp8(chunk.get_submodule(name)) == (config.parallel.zero_stage < 3) for name in layers)
    return layers, [name for name, part in chunk.named_modules() if getattr(part, "casts_to_fp8", False)]


def test_the_slice_picks_the_layers(worker_pool) -> None:
    layers, norms = worker_pool(1).run(parts_in_fp8, fp8_config(layers="1:-1"))[0]
    assert layers == [
        f"layers.{layer}.{part}" for layer in (1, 2) for part in ("mixer.qkv", "mixer.out_proj", "mlp.fc1", "mlp.fc2")
    ]
    assert norms == [f"layers.{layer}.{part}" for layer in (1, 2) for part in ("mixer_norm", "mlp_norm")]
    assert worker_pool(1).run(parts_in_fp8, fp8_config("bf16"))[0] == ([], [])


def test_norms_in_front_of_recomputed_mixers_and_under_zero3_do_not_cast(worker_pool) -> None:
    """The gradient would be lost: recomputation and ZeRO-3 follow tensors alone."""
    _, norms = worker_pool(1).run(parts_in_fp8, fp8_config(recompute="mixer"))[0]
    assert norms == [f"layers.{layer}.mlp_norm" for layer in range(4)]
    assert worker_pool(1).run(parts_in_fp8, fp8_config(parallel={"zero_stage": 3}))[0][1] == []


@pytest.fixture(scope="module")
def single(worker_pool) -> list[tuple[float, float]]:
    return worker_pool(1).run(train, fp8_config(), STEPS)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_as_the_single_process(worker_pool, single, layout) -> None:
    """Gradients of weights are bf16 under ZeRO-2 and 3 before they are summed; other layouts differ by less."""
    ranks, parallel = LAYOUTS[layout]
    for found in worker_pool(ranks).run(train, fp8_config(parallel=parallel), STEPS):
        for (loss, norm), (wanted_loss, wanted_norm) in zip(found, single, strict=True):
            assert loss == pytest.approx(wanted_loss, abs=2e-3)
            assert norm == pytest.approx(wanted_norm, rel=1e-2)


@pytest.mark.parametrize("recompute", ["mixer", "full"])
def test_recomputed_activations_change_nothing(worker_pool, single, recompute) -> None:
    found = worker_pool(1).run(train, fp8_config(recompute=recompute), STEPS)[0]
    assert found == pytest.approx(single, rel=1e-3)


def too_small(absmax: Tensor) -> Tensor:
    """A scale that saturates all but the small numbers of a row."""
    return torch.exp2(torch.log2(absmax / reference.LARGEST).floor() - 3)


CURVE_STEPS = 40


@pytest.fixture(scope="module")
def curves(worker_pool) -> dict[str, list[float]]:
    """Losses of each step."""
    jobs = {"bf16": ("bf16", None), "fp8": ("fp8", None), "saturated": ("fp8", too_small)}
    return {
        name: [loss for loss, _ in worker_pool(1).run(train, fp8_config(precision), CURVE_STEPS, scale)[0]]
        for name, (precision, scale) in jobs.items()
    }


def distance(curves: dict[str, list[float]], name: str) -> float:
    """Mean distance from the losses of bf16, in nats."""
    return sum(abs(x - y) for x, y in zip(curves[name], curves["bf16"], strict=True)) / CURVE_STEPS


def test_a_curve_in_fp8_stays_beside_that_of_bf16(curves) -> None:
    assert curves["bf16"][-1] < curves["bf16"][0] - 0.5
    assert 1e-4 < distance(curves, "fp8") < 0.03


def test_a_wrong_scale_would_show_in_the_curve(curves) -> None:
    assert distance(curves, "saturated") > 0.1
