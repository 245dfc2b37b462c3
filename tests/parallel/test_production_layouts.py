"""What trains in production, Triton kernels and bf16, does in every layout what the reference does in one process in fp32."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from based_megatron.checkpoint.zero import zero_fragments
from based_megatron.config import ParallelConfig
from support.layouts import GLOBAL_BATCH, Run, build_run, small_config
from support.oracle import load_oracle, write_oracle

CLIP = 0.5
LAYOUTS = {
    "tp2": (2, ParallelConfig(tensor=2)),
    "tp2-overlap": (2, ParallelConfig(tensor=2, overlap_tensor="collectives")),
    "pp2": (2, ParallelConfig(pipeline=2)),
    "cp2": (2, ParallelConfig(context=2)),
    "dp2-zero1": (2, ParallelConfig(overlap_zero=True)),
    "dp2-zero3": (2, ParallelConfig(zero_stage=3)),
}
SLOW = dict.fromkeys(("tp2", "dp2-zero3"), pytest.mark.slow)
"""Others have most of what these have."""
PRODUCTS = {
    "tp2-pp2-cp2": (8, ParallelConfig(tensor=2, pipeline=2, context=2)),
    "tp2-pp2-interleaved-dp2": (8, ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2)),
    "tp2-cp2-dp2-zero3": (8, ParallelConfig(tensor=2, context=2, zero_stage=3)),
}
BOUNDS = {"cp2": (0, 10, 32), "tp2-pp2-cp2": (0, 10, 32), "tp2-cp2-dp2-zero3": (0, 10, 32)}
"""Uneven slices, the first shorter than a window."""
PRODUCTION = {"bf16": {"backend": "triton", "precision": "bf16"}, "fp32": {"backend": "triton", "precision": "fp32"}}
PRECISIONS = ["bf16", pytest.param("fp32", marks=pytest.mark.slow)]
Errors = Callable[[str], dict[str, float]]


@pytest.fixture(scope="module")
def oracle(worker_pool, tmp_path_factory) -> Path:
    """A file of the first step of a single process, packed, in fp32 by the reference."""
    path = tmp_path_factory.mktemp("oracle") / "one step.pt"
    worker_pool(1).run(write_oracle, path, True, 1, CLIP, 3e-3)
    return path


def first_step(
    parallel: ParallelConfig, bounds: tuple[int, ...], path: Path, train: dict[str, str]
) -> tuple[float, float, dict[str, tuple[float, int]]]:
    """Loss and gradient norm, and for each parameter that this rank owns a part of its squared error and number of elements."""
    config = small_config(parallel, clip_grad_norm=CLIP, micro_batch_sequences=GLOBAL_BATCH // 4, **train)
    run = build_run(config, bounds)
    return *run.train_step(0, True), squared_errors(run, load_oracle(path)["gradients"])


def squared_errors(run: Run, expected: dict) -> dict[str, tuple[float, int]]:
    """After the first step, Adam's first moment is (1 - beta1) x the reduced, clipped gradient: it has been all the way."""
    found: dict[str, tuple[float, int]] = {}
    for fragment in (fragment for fragment in zero_fragments(run.engine) if fragment.owned):
        for rectangle in fragment.rectangles():
            gradient = rectangle.view(fragment.tensors["exp_avg"]).cpu() / (1 - run.config.optimizer.beta1)
            box = tuple(slice(o, o + n) for o, n in zip(rectangle.global_offset, rectangle.shape, strict=True))
            error, elements = found.get(fragment.spec.name, (0.0, 0))
            error += float((gradient - expected[fragment.spec.name][box]).square().sum())
            found[fragment.spec.name] = (error, elements + gradient.numel())
    return found


def relative_errors(results: list, expected: dict) -> dict[str, float]:
    """The norm of each gradient's error over the gradient's norm, all ranks' parts together."""
    errors = {}
    for name, gradient in expected.items():
        parts = [errors_of_rank[name] for *_, errors_of_rank in results if name in errors_of_rank]
        assert sum(elements for _, elements in parts) == gradient.numel(), name
        errors[name] = (sum(error for error, _ in parts) / float(gradient.square().sum())) ** 0.5
    return errors


@pytest.fixture(scope="module")
def single(worker_pool, oracle) -> Errors:
    """Relative errors of the single process in a precision."""

    @functools.cache
    def errors(precision: str) -> dict[str, float]:
        results = worker_pool(1).run(first_step, ParallelConfig(), (), oracle, PRODUCTION[precision])
        return relative_errors(results, load_oracle(oracle)["gradients"])

    return errors


def check(worker_pool, oracle: Path, single: Errors, layout: str, precision: str) -> None:
    """Loss, norm and gradients: those of a layout may be no further from fp32's than those of a single process are."""
    world_size, parallel = (LAYOUTS | PRODUCTS)[layout]
    expected = load_oracle(oracle)
    results = worker_pool(world_size).run(first_step, parallel, BOUNDS.get(layout, ()), oracle, PRODUCTION[precision])
    near = 1e-5 if precision == "fp32" else 1e-2
    for loss, norm, _ in results:
        assert loss == pytest.approx(expected["losses"][0], rel=near)
        assert norm == pytest.approx(expected["norms"][0], rel=near)
    for name, error in relative_errors(results, expected["gradients"]).items():
        assert error < 2 * single(precision)[name] + near, name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_kernels_in_one_process_are_near_the_reference(single, precision):
    assert max(single(precision).values()) < {"bf16": 0.05, "fp32": 1e-5}[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", [pytest.param(name, marks=SLOW.get(name, ())) for name in LAYOUTS])
def test_a_layout_of_production_equals_the_single_process(worker_pool, oracle, single, layout, precision):
    check(worker_pool, oracle, single, layout, precision)


@pytest.mark.slow
@pytest.mark.parametrize("layout", PRODUCTS)
def test_a_product_of_three_on_eight_ranks_equals_the_single_process(worker_pool, oracle, single, layout):
    check(worker_pool, oracle, single, layout, "bf16")
