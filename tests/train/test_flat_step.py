"""The boundary of a bf16 step under ZeRO-1: gradient, norm, update and weights of every layout, and steps that do not count."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from based_megatron.checkpoint.zero import zero_fragments
from based_megatron.config import ParallelConfig
from based_megatron.parallel.linear import shard_spec
from based_megatron.train.optimizer import set_learning_rate
from based_megatron.train.optimizer.groups import decayed_names
from support.layouts import Run, build_run, global_batch, local_micro_batches, small_config
from support.oracle import load_oracle, write_oracle

CLIP, LR, STEPS = 0.5, 3e-3, 3
LAYOUTS = {
    "single": (1, ParallelConfig()),
    "dp2": (2, ParallelConfig()),
    "tp2": (2, ParallelConfig(tensor=2)),
    "pp2": (2, ParallelConfig(pipeline=2)),
    "cp2": (2, ParallelConfig(context=2)),
    "tp2-dp2": (4, ParallelConfig(tensor=2)),
}


def bf16_run(parallel: ParallelConfig, implementation: str = "auto", clip: float = CLIP) -> Run:
    config = small_config(parallel, clip_grad_norm=clip)
    return build_run(
        dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, precision="bf16"),
            optimizer=dataclasses.replace(config.optimizer, implementation=implementation),
        )
    )


def accumulate(run: Run, number: int) -> None:
    set_learning_rate(run.engine, LR)
    run.step.accumulate(local_micro_batches(global_batch(number, True), run.topology, 2))


def numbers(run: Run) -> dict[str, dict[str, Tensor]]:
    """Copies of this rank's masters and moments, by name and kind."""
    return {
        f.spec.name: {kind: x.double().clone() for kind, x in f.tensors.items()} for f in zero_fragments(run.engine)
    }


def together(mine: dict[Any, Any]) -> list[dict[Any, Any]]:
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    return everywhere


def checked_steps(parallel: ParallelConfig, gradients: dict[str, Tensor]) -> dict[str, float]:
    """Largest relative errors over some steps, of all that a step leaves behind, from plain formulas in fp64.

    gradients: of the first step, in fp32, not clipped.
    """
    run = bf16_run(parallel)
    decayed = decayed_names(run.engine.module, run.config.optimizer.weight_decay_mode)
    worst: dict[str, float] = {}

    def note(what: str, found: Tensor, wanted: Tensor) -> None:
        found, wanted = found.cpu().double(), wanted.cpu().double()
        error = float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))
        worst[what] = max(worst.get(what, 0.0), error)

    for number in range(STEPS):
        before, kept = numbers(run), {}
        accumulate(run, number)
        update = run.step.update(
            lambda kept=kept: kept.update(
                {piece.spec.name: (piece, flat.double().clone()) for piece, flat in run.engine.gradients()}
            )
        )
        assert update.applied
        squares = [float(flat.square().sum()) for piece, flat in kept.values() if piece.owned]
        norm = torch.tensor(sum(sum(theirs[0]) for theirs in together({0: squares}))).sqrt()
        note("norm", update.grad_norm, norm)
        now = numbers(run)
        for name, (piece, gradient) in kept.items():
            if not number and piece.spec.local_shape == piece.spec.shape:
                note("gradient", gradient, gradients[name].flatten()[piece.start : piece.start + piece.numel])
            g, old = gradient * min(1.0, CLIP / (float(norm) + 1e-6)), before[name]
            mean = 0.9 * old["exp_avg"] + 0.1 * g
            square = 0.95 * old["exp_avg_sq"] + 0.05 * g * g
            corrected = mean / (1 - 0.9 ** (number + 1)), square / (1 - 0.95 ** (number + 1))
            decay = run.config.optimizer.weight_decay if name in decayed else 0.0
            master = old["model"] * (1 - LR * decay) - LR * corrected[0] / (corrected[1].sqrt() + 1e-8)
            note("moments", torch.cat([now[name]["exp_avg"], now[name]["exp_avg_sq"]]), torch.cat([mean, square]))
            # What it moves by: the weight itself is a thousand times that.
            note("update", now[name]["model"] - old["model"], master - old["model"])
        weights = {shard_spec(p).name: p.detach().flatten() for p in run.engine.module.parameters()}
        for theirs in together(
            {(run.topology.model.rank, f.spec.name): (f.start, f.tensors["model"]) for f in zero_fragments(run.engine)}
        ):
            for (part, name), (start, master) in theirs.items():
                if part == run.topology.model.rank:
                    note("weights", weights[name][start : start + len(master)], master.bfloat16())
    return worst


@pytest.fixture(scope="module")
def oracle(worker_pool, tmp_path_factory) -> dict[str, Any]:
    """A single process in fp32, not clipped."""
    path = tmp_path_factory.mktemp("oracle") / "oracle.pt"
    worker_pool(1).run(write_oracle, path, True, 1, 1e9, LR)
    return load_oracle(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_part_of_a_step_is_its_formula(worker_pool, oracle, layout):
    world_size, parallel = LAYOUTS[layout]
    results = worker_pool(world_size).run(checked_steps, parallel, oracle["gradients"])
    assert any("gradient" in worst for worst in results)
    for worst in results:
        assert worst.pop("gradient", 0) < 0.06, "bf16 activations"
        assert worst.pop("weights") == 0
        assert worst.pop("update") < 1e-3, "the last bit of a weight is so much of what it moves by"
        assert all(error < 1e-5 for error in worst.values()), worst


def losses_of(parallel: ParallelConfig, implementation: str) -> list[tuple[float, float]]:
    run = bf16_run(parallel, implementation)
    return [run.train_step(number, True, LR) for number in range(STEPS)]


def test_implementations_have_the_same_bits_on_a_cpu(worker_pool):
    """The update that waits for the norm and the one that does not."""
    ours, torchs = (worker_pool(2).run(losses_of, ParallelConfig(), name) for name in ("auto", "torch"))
    assert ours == torchs


def refused_step(parallel: ParallelConfig, implementation: str) -> None:
    """A step that is judged bad, between two good ones, against a run that never takes it."""
    run, other = bf16_run(parallel, implementation), bf16_run(parallel, implementation)
    seen: list[int] = []
    for each in (run, other):
        accumulate(each, 0)
        assert each.step.update().applied
    before = numbers(run)
    accumulate(run, 1)
    update = run.step.update(
        None,
        lambda norm: torch.ones((), dtype=torch.bool, device=norm.device),
        lambda: seen.append(sum(bool(flat.any()) for _, flat in run.engine.gradients())),
    )
    assert not update.applied and update.grad_norm.isfinite() and seen[0] > 0, "gradients are there to be looked at"
    assert run.engine.optimizer.scalars() == {"step": 1}
    for name, kinds in numbers(run).items():
        assert all(torch.equal(x, before[name][kind]) for kind, x in kinds.items()), name
    for each in (run, other):
        accumulate(each, 2)
        assert each.step.update(None, lambda norm: torch.zeros((), dtype=torch.bool, device=norm.device)).applied
    wanted = numbers(other)
    for name, kinds in numbers(run).items():
        assert all(torch.equal(x, wanted[name][kind]) for kind, x in kinds.items()), name


@pytest.mark.parametrize("implementation", ["auto", "torch"])
def test_a_refused_step_leaves_no_trace(worker_pool, implementation):
    worker_pool(2).run(refused_step, ParallelConfig(), implementation)


def unclipped_step() -> tuple[float, float, float]:
    """(norm, Adam's first moment over a tenth of the gradient with clipping, and without)."""
    ratios = []
    for clip in (CLIP, 0.0):
        run, sums = bf16_run(ParallelConfig(), clip=clip), []
        accumulate(run, 0)
        norm = run.step.update(
            lambda run=run, sums=sums: sums.append(norm_of(flat for _, flat in run.engine.gradients()))
        )
        moments = norm_of(f.tensors["exp_avg"] for f in zero_fragments(run.engine))
        ratios.append(moments / (0.1 * sums[0]))
    return float(norm.grad_norm), *ratios


def norm_of(tensors: Any) -> float:
    return float(torch.cat([x.double().flatten() for x in tensors]).norm())


def test_clipping_is_off_at_zero(worker_pool):
    ((norm, clipped, whole),) = worker_pool(1).run(unclipped_step)
    assert norm > 2 * CLIP and clipped == pytest.approx(CLIP / norm, rel=1e-4) and whole == pytest.approx(1, rel=1e-5)
