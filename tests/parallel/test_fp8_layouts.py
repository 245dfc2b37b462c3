"""Training in fp8: what of the model runs in it, every layout against the single process, and curves beside those of bf16."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from based_megatron.checkpoint.zero import zero_fragments
from based_megatron.config import Config, ParallelConfig
from based_megatron.kernels.fp8 import reference
from based_megatron.model.build import build_model
from based_megatron.parallel.fp8 import fp8_products, takes_fp8
from based_megatron.parallel.host import replaced
from based_megatron.train.optimizer import build_engine
from based_megatron.train.step import build_step
from support.layouts import Run, build_run, small_config, topology_of

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
    return replace(config, train=replace(config.train, precision=precision, fp8_layers=layers))


def in_fp32(config: Config) -> Run:
    """The products of fp8 in a model of fp32, where layouts differ by nothing but them."""
    topology = topology_of(config.parallel)
    chunks = build_model(config, topology, torch.float32)
    config = replace(config, train=replace(config.train, precision="fp32"))
    engine = build_engine(chunks, config, topology)
    return Run(topology, build_step(chunks, engine, topology, config.parallel.zero_stage), engine, config)


def train_in_fp32(config: Config) -> list[float]:
    """Loss and gradient norm of each step."""
    run = in_fp32(config)
    return [value for number in range(STEPS) for value in run.train_step(number, True, LR)]


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
def single(worker_pool) -> list[float]:
    return worker_pool(1).run(train_in_fp32, fp8_config())[0]


@pytest.fixture(scope="module")
def scaled(worker_pool) -> list[float]:
    """ZeRO-2 and 3 divide the loss by its tokens before backward, no power of two: gradients are rounded elsewhere."""
    return worker_pool(1).run(train_in_fp32, fp8_config(parallel={"zero_stage": 2}))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_as_the_single_process(worker_pool, single, scaled, layout) -> None:
    """A rounding of fp32 may turn one of e4m3, which the next steps see."""
    ranks, parallel = LAYOUTS[layout]
    wanted = scaled if "zero_stage" in parallel else single
    for found in worker_pool(ranks).run(train_in_fp32, fp8_config(parallel=parallel)):
        assert found[:2] == pytest.approx(wanted[:2], rel=1e-4)
        assert found == pytest.approx(wanted, rel=3e-3)


def test_the_single_process_runs_in_fp8(worker_pool, single) -> None:
    plain = worker_pool(1).run(train_in_fp32, fp8_config("fp32"))[0]
    assert abs(plain[0] - single[0]) > 1e-3


@pytest.mark.parametrize("recompute", ["mixer", "full"])
def test_recomputed_activations_change_nothing(worker_pool, single, recompute) -> None:
    found = worker_pool(1).run(train_in_fp32, fp8_config(recompute=recompute))[0]
    assert found == pytest.approx(single, rel=1e-4)


def saved(config: Config) -> list[tuple[Any, ...]]:
    """What a checkpoint has of each parameter."""
    return [
        (fragment.spec, fragment.start, {name: (x.shape, x.dtype) for name, x in fragment.tensors.items()})
        for fragment in zero_fragments(build_run(config).engine)
    ]


def test_checkpoints_are_those_of_bf16(worker_pool) -> None:
    found, wanted = (worker_pool(1).run(saved, fp8_config(precision))[0] for precision in ("fp8", "bf16"))
    assert found == wanted and len(found) > 20


def too_small(absmax: Tensor) -> Tensor:
    """A scale that saturates all but the small numbers of a row."""
    return torch.exp2(torch.log2(absmax / reference.LARGEST).floor() - 3)


CURVE_STEPS, CURVE_LR = 40, 1e-3


def curve(precision: str, scale: Callable[[Tensor], Tensor] | None = None) -> list[float]:
    """Losses over four batches, again and again, in bf16; `scale` replaces the choice of the rows' scales."""
    config = fp8_config(precision)
    config = replace(config, model=replace(config.model, init_std=0.05))
    with nullcontext() if scale is None else replaced(reference, power_of_two_scale=scale):
        run = build_run(config)
        return [run.train_step(number % 4, True, CURVE_LR)[0] for number in range(CURVE_STEPS)]


@pytest.fixture(scope="module")
def curves(worker_pool) -> dict[str, list[float]]:
    jobs = {"bf16": ("bf16",), "fp8": ("fp8",), "saturated": ("fp8", too_small)}
    return {name: worker_pool(1).run(curve, *job)[0] for name, job in jobs.items()}


def distance(curves: dict[str, list[float]], name: str) -> float:
    """Mean distance from the losses of bf16, in nats."""
    return sum(abs(x - y) for x, y in zip(curves[name], curves["bf16"], strict=True)) / CURVE_STEPS


@pytest.mark.slow
def test_a_curve_in_fp8_stays_beside_that_of_bf16(curves) -> None:
    assert curves["bf16"][-1] < curves["bf16"][0] - 0.5
    assert 1e-4 < distance(curves, "fp8") < 0.02


@pytest.mark.slow
def test_a_wrong_scale_would_show_in_the_curve(curves) -> None:
    assert distance(curves, "saturated") > 0.1
