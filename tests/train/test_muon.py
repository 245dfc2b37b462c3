"""Muon under every partition equals plain Muon on whole parameters in one process."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from based_megatron.checkpoint.load import load_checkpoint
from based_megatron.checkpoint.save import save_checkpoint
from based_megatron.checkpoint.zero import after_load, optimizer_entry, saved_optimizer, zero_fragments
from based_megatron.config import Config, ParallelConfig
from based_megatron.errors import CheckpointError
from based_megatron.model.build import build_model
from based_megatron.parallel.linear import shard_spec
from based_megatron.parallel.sequence.documents import Documents
from based_megatron.parallel.sequence.plan import whole_sequence
from based_megatron.parallel.topology import build_topology
from based_megatron.train.optimizer.muon import newton_schulz
from support.layouts import Run, build_run, gather_unsharded, global_batch, parameters_of, small_config
from support.pool import rank_device

STEPS, LR, DECAY, CLIP = 4, 3e-3, 0.1, 0.5
ADAMW_TENSORS = ("embedding.weight", "norm.weight", ".bias", "conv_weight")


def muon_config(parallel: ParallelConfig | None = None) -> Config:
    config = small_config(parallel, clip_grad_norm=CLIP)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name="muon"))


def orthogonal(g: torch.Tensor) -> torch.Tensor:
    """Five quintic iterations in fp64, written from the formula."""
    x = g.double() / g.double().norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x.to(g.dtype)


def write_oracle(path: Path) -> None:
    """Losses and weights after some steps of plain Muon and AdamW over unsharded parameters."""
    config = muon_config()
    topology = build_topology(config.parallel, rank_device(0))
    (model,) = build_model(config, topology)
    named = {shard_spec(p).name: p for p in model.parameters()}
    plain = [p for name, p in named.items() if name.endswith(ADAMW_TENSORS)]
    kept = [p for name, p in named.items() if name.endswith("conv_weight")]
    rest = [p for p in plain if not any(p is q for q in kept)]
    adamw = torch.optim.AdamW(
        [{"params": kept, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}], lr=LR, betas=(0.9, 0.95)
    )
    averages = {name: torch.zeros_like(p) for name, p in named.items() if not name.endswith(ADAMW_TENSORS)}
    losses = []
    for number in range(STEPS):
        batch = {key: value.to(topology.device) for key, value in global_batch(number, True).items()}
        plan = whole_sequence(Documents.from_ids(batch["ids"]), batch["tokens"].shape[1], topology.device)
        loss = (model(batch["tokens"], plan, batch["labels"]) * batch["mask"]).sum() / batch["mask"].sum()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        losses.append(float(loss.detach()))
        adamw.step()
        with torch.no_grad():
            for name, average in averages.items():
                p = named[name]
                average.mul_(0.95).add_(p.grad, alpha=0.05)
                mixed = 0.05 * p.grad + 0.95 * average
                p.mul_(1 - LR * DECAY)
                dim, parts = shard_spec(p).partition_dim or 0, shard_spec(p).parts
                for part, rows in zip(mixed.split(parts, dim), p.split(parts, dim), strict=True):
                    rows.sub_(LR * 0.2 * math.sqrt(max(part.shape)) * orthogonal(part))
    torch.save({"losses": losses, "weights": {name: p.detach().clone() for name, p in named.items()}}, path)


def train(run: Run, first: int = 0, last: int = STEPS) -> list[float]:
    return [run.train_step(number, True, LR)[0] for number in range(first, last)]


def errors_of_a_layout(path: Path, parallel: ParallelConfig) -> tuple[list[float], dict[str, float]]:
    """Losses on each rank; on rank 0 the largest error of each weight."""
    run = build_run(muon_config(parallel))
    losses = train(run)
    expected = torch.load(path)["weights"]
    weights = gather_unsharded(parameters_of(run))
    return losses, {name: float((weights[name] - expected[name]).abs().max()) for name in weights}


LAYOUTS = {
    "single": (1, ParallelConfig()),
    "tp2": (2, ParallelConfig(tensor=2)),
    "pp2": (2, ParallelConfig(pipeline=2)),
    "dp2-zero1": (2, ParallelConfig()),
    "dp2-zero2": (2, ParallelConfig(zero_stage=2)),
    "tp2-dp2": (4, ParallelConfig(tensor=2)),
    "pp2-cp2": (4, ParallelConfig(pipeline=2, context=2)),
}


@pytest.fixture(scope="module")
def oracle(worker_pool, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("muon") / "oracle.pt"
    worker_pool(1).run(write_oracle, path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_muon_of_a_layout_equals_the_single_process(worker_pool, oracle, layout):
    world_size, parallel = LAYOUTS[layout]
    expected = torch.load(oracle)
    results = worker_pool(world_size).run(errors_of_a_layout, oracle, parallel)
    for losses, _ in results:
        assert losses == pytest.approx(expected["losses"], abs=1e-5)
    errors = results[0][1]
    assert errors.keys() == expected["weights"].keys()
    assert all(error < 1e-5 for error in errors.values()), errors


def save(run: Run, folder: Path) -> Path:
    state = {"optimizer": optimizer_entry(run.engine)}
    return save_checkpoint(folder, 2, zero_fragments(run.engine), state)


def load(run: Run, path: Path) -> None:
    state = load_checkpoint(path, zero_fragments(run.engine))
    after_load(run.engine, saved_optimizer(state))


def save_then_go_on(folder: Path, parallel: ParallelConfig) -> tuple[Path, list[float]]:
    run = build_run(muon_config(parallel))
    train(run, 0, 2)
    path = save(run, folder)
    return path, train(run, 2)


def resume(path: Path, parallel: ParallelConfig) -> list[float]:
    run = build_run(muon_config(parallel))
    load(run, path)
    return train(run, 2)


def test_a_resumed_run_goes_on_bit_for_bit_and_in_another_layout(worker_pool, tmp_path):
    ((path, expected), _) = worker_pool(2).run(save_then_go_on, tmp_path, ParallelConfig())
    assert worker_pool(2).run(resume, path, ParallelConfig()) == [expected] * 2
    for losses in worker_pool(2).run(resume, path, ParallelConfig(tensor=2)):
        assert losses == pytest.approx(expected, abs=1e-5)


def refusal(folder: Path, saved: str) -> str:
    """What a run of the other optimizer says of a checkpoint, and whether its weights can be loaded alone."""
    runs = {"adamw": build_run(small_config()), "muon": build_run(muon_config())}
    path = save(runs.pop(saved), folder)
    (other,) = runs.values()
    with pytest.raises(CheckpointError) as refused:
        load(other, path)
    load_checkpoint(path, zero_fragments(other.engine), weights_only=True)
    after_load(other.engine, None)
    train(other, 0, 1)
    return str(refused.value)


@pytest.mark.parametrize(("saved", "missing"), [("adamw", "momentum"), ("muon", "exp_avg")])
def test_the_state_of_another_optimizer_is_refused_in_one_line(worker_pool, tmp_path, saved, missing):
    (line,) = worker_pool(1).run(refusal, tmp_path, saved)
    assert missing in line and "optimizer.name" in line and "checkpoint.load" in line and "\n" not in line


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_newton_schulz_keeps_singular_vectors_and_brings_singular_values_near_one(shape):
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    singular = torch.linspace(0.1, 3.0, min(shape))
    found = newton_schulz(u * singular @ v, steps=5)
    values = torch.diagonal(u.T @ found @ v.T)
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(found, u * values @ v, rtol=0, atol=1e-4)
