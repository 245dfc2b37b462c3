"""Every parallel layout does what the single process does: loss, its parts by slice, every gradient, gradient norm, and 5 steps."""

from pathlib import Path

import pytest
import torch

from based_megatron.checkpoint.zero import zero_fragments
from based_megatron.config import ParallelConfig
from support.layouts import GLOBAL_BATCH, Run, build_run, small_config
from support.oracle import load_oracle, write_oracle

STEPS, CLIP, LR = 5, 0.5, 3e-3

LAYOUTS = {
    "single": (1, ParallelConfig()),
    "tp2": (2, ParallelConfig(tensor=2)),
    "tp2-overlap": (2, ParallelConfig(tensor=2, overlap_tensor="collectives")),
    "tp2-without-sequence-parallel": (2, ParallelConfig(tensor=2, sequence_parallel=False)),
    "pp2": (2, ParallelConfig(pipeline=2)),
    "pp2-interleaved": (2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "tp2-pp2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "cp2": (2, ParallelConfig(context=2)),
    "cp4": (4, ParallelConfig(context=4)),
    "tp2-cp2": (4, ParallelConfig(tensor=2, context=2)),
    "pp2-cp2": (4, ParallelConfig(pipeline=2, context=2)),
    "pp2-interleaved-cp2": (4, ParallelConfig(pipeline=2, virtual_pipeline=2, context=2)),
    "dp2-zero1": (2, ParallelConfig()),
    "dp2-zero2": (2, ParallelConfig(zero_stage=2)),
    "dp2-zero3": (2, ParallelConfig(zero_stage=3, overlap_zero=True)),
    "tp2-dp2-zero1": (4, ParallelConfig(tensor=2, overlap_tensor="collectives", overlap_zero=True)),
    "tp2-dp2-zero3": (4, ParallelConfig(tensor=2, zero_stage=3)),
    "cp2-dp2-zero2": (4, ParallelConfig(context=2, zero_stage=2)),
    "pp2-dp2-zero1": (4, ParallelConfig(pipeline=2)),
    "cp4-zero3": (4, ParallelConfig(context=4, zero_stage=3)),
}

SLICES = {
    "cp2": (0, 1, 32),
    "cp4": (0, 1, 14, 15, 32),
    "tp2-cp2": (0, 6, 32),
    "pp2-cp2": (0, 29, 32),
}
"""Uneven ones: of one token, and shorter than the window of 11 and than a convolution's taps."""
EXCHANGES = {
    "cp4-two-level": (4, ParallelConfig(context=4, state_exchange="two_level")),
    "cp4-chain": (4, ParallelConfig(context=4, state_exchange="chain")),
}
VARIANTS = {"rebased": {"feature_map": "rebased"}, "prefix": {"prefix_tokens": 9}}
"""Settings of the model that make another linear attention of it."""
LONG = ("tp2-cp2", "pp2-cp2", "cp4", "cp4-zero3")
LONG_STEPS, LONG_LR = 200, 1e-3
"""At the learning rate of the short runs, fp32 rounding alone grows to 1.2e-4 nats in 200 steps."""


@pytest.fixture(scope="module")
def oracles(worker_pool, tmp_path_factory) -> dict[bool, Path]:
    """Files of the single process' results, packed and not."""
    folder = tmp_path_factory.mktemp("oracle")
    paths = {packed: folder / f"packed-{packed}.pt" for packed in (False, True)}
    for packed, path in paths.items():
        worker_pool(1).run(write_oracle, path, packed, STEPS, CLIP, LR)
    return paths


@pytest.fixture(scope="module")
def variant_oracles(worker_pool, tmp_path_factory) -> dict[str, dict[bool, Path]]:
    """Files of the single process's results for variants of linear attention, packed."""
    folder = tmp_path_factory.mktemp("oracle")
    for name, model in VARIANTS.items():
        worker_pool(1).run(write_oracle, folder / f"{name}.pt", True, 3, CLIP, LONG_LR, model)
    return {name: {True: folder / f"{name}.pt"} for name in VARIANTS}


@pytest.fixture(scope="module")
def long_oracles(worker_pool, tmp_path_factory) -> dict[bool, Path]:
    """Files of the single process's results over many steps, packed."""
    path = tmp_path_factory.mktemp("oracle") / "long.pt"
    worker_pool(1).run(write_oracle, path, True, LONG_STEPS, CLIP, LONG_LR)
    return {True: path}


def compare_with_oracle(
    path: Path, parallel: ParallelConfig, packed: bool, steps: int, bounds: tuple[int, ...], lr: float, train: dict
) -> tuple[list, list, dict]:
    """Results of each rank: losses, norms, and for each parameter (largest gradient error, elements compared, elements owned)."""
    oracle = load_oracle(path)
    run = build_run(small_config(parallel, clip_grad_norm=CLIP, **train), bounds, node_ranks=2)
    losses, norms, gradients = [], [], {}
    held_out, slices = run.held_out(0, packed)
    assert held_out == pytest.approx(oracle["losses"][0], abs=1e-5)
    for found, expected in zip(slices, oracle["slices"], strict=True):
        assert found == pytest.approx(expected, abs=1e-3), "loss and tokens of a slice"
    for number in range(steps):
        loss, norm = run.train_step(number, packed, lr)
        losses.append(loss)
        norms.append(norm)
        gradients = gradients or gradient_errors(run, oracle["gradients"])
    return losses, norms, gradients


def gradient_errors(run: Run, expected: dict[str, torch.Tensor]) -> dict[str, tuple[float, int]]:
    """After the first step, Adam's first moment is (1 - beta1) x the reduced, clipped gradient: it has been all the way."""
    errors: dict[str, tuple[float, int]] = {}
    for fragment in zero_fragments(run.engine):
        name = fragment.spec.name
        worst, owned = errors.get(name, (0.0, 0))
        for rectangle in fragment.rectangles():
            found = rectangle.view(fragment.tensors["exp_avg"]).cpu() / (1 - run.config.optimizer.beta1)
            box = tuple(slice(o, o + n) for o, n in zip(rectangle.global_offset, rectangle.shape, strict=True))
            worst = max(worst, float((found - expected[name][box]).abs().max()))
            owned += found.numel() * fragment.owned
        errors[name] = (worst, owned)
    return errors


def check(
    worker_pool,
    oracles,
    world_size: int,
    parallel: ParallelConfig,
    packed: bool = True,
    steps: int = STEPS,
    bounds: tuple[int, ...] = (),
    norm_error: float = 1e-5,
    lr: float = LR,
    **train,
) -> None:
    oracle = load_oracle(oracles[packed])
    path = oracles[packed]
    results = worker_pool(world_size).run(compare_with_oracle, path, parallel, packed, steps, bounds, lr, train)
    covered = dict.fromkeys(oracle["gradients"], 0)
    for losses, norms, gradients in results:
        assert losses[0] == pytest.approx(oracle["losses"][0], abs=1e-5)
        assert norms[0] == pytest.approx(oracle["norms"][0], rel=norm_error)
        for name, (worst, owned) in gradients.items():
            assert worst < 1e-5 * max(1.0, float(oracle["gradients"][name].abs().max())), name
            covered[name] += owned
        assert losses == pytest.approx(oracle["losses"][:steps], abs=1e-4)
        # Later norms are a tenth of the first, and differences of rounding count ten times as much.
        assert norms[:STEPS] == pytest.approx(oracle["norms"][: min(steps, STEPS)], rel=1e-3)
    assert covered == {name: gradient.numel() for name, gradient in oracle["gradients"].items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_the_single_process(worker_pool, oracles, layout):
    check(worker_pool, oracles, *LAYOUTS[layout])


@pytest.mark.parametrize("layout", ["tp2-cp2", "cp4", "pp2-interleaved"])
def test_layout_equals_the_single_process_without_documents(worker_pool, oracles, layout):
    check(worker_pool, oracles, *LAYOUTS[layout], packed=False, steps=3)


@pytest.mark.parametrize(
    ("layout", "recompute"), [("tp2-cp2", "mixer"), ("pp2-cp2", "full"), ("tp2-dp2-zero3", "full")]
)
def test_recomputed_activations_change_nothing(worker_pool, oracles, layout, recompute):
    check(worker_pool, oracles, *LAYOUTS[layout], steps=3, recompute=recompute)


@pytest.mark.parametrize("layout", SLICES)
def test_slices_may_be_uneven(worker_pool, oracles, layout):
    check(worker_pool, oracles, *LAYOUTS[layout], steps=3, bounds=SLICES[layout])


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        *(("rebased", layout) for layout in ("tp2", "pp2", "cp2", "dp2-zero3")),
        *(("prefix", layout) for layout in ("tp2", "tp2-without-sequence-parallel", "pp2", "dp2-zero3")),
    ],
)
def test_variants_of_linear_attention_in_other_layouts(worker_pool, variant_oracles, variant, layout):
    """Norms of ReBased are cut by heads, its states have fewer rows; a prefix has projections of its own."""
    bounds, model = SLICES.get(layout, ()), VARIANTS[variant]
    check(worker_pool, variant_oracles[variant], *LAYOUTS[layout], steps=3, bounds=bounds, lr=LONG_LR, model=model)


@pytest.mark.parametrize("layout", EXCHANGES)
def test_states_may_take_other_ways(worker_pool, oracles, layout):
    check(worker_pool, oracles, *EXCHANGES[layout], steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LONG)
def test_curves_stay_together_over_slices(worker_pool, long_oracles, layout):
    """Uneven masks, documents and clipping; norms of the first step to 1e-6."""
    world_size, parallel = LAYOUTS[layout]
    micro_batch_sequences = GLOBAL_BATCH // parallel.pipeline
    check(
        worker_pool,
        long_oracles,
        world_size,
        parallel,
        steps=LONG_STEPS,
        norm_error=1e-6,
        lr=LONG_LR,
        micro_batch_sequences=micro_batch_sequences,
    )


def test_clipping_is_active(oracles):
    """Without clipping a wrong norm would not show in the curves."""
    assert min(load_oracle(oracles[True])["norms"]) > 2 * CLIP
