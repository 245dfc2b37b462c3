"""Metrics of the model and its data: the value of a single process under every layout, and a plain computation behind it."""

import dataclasses
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from based_megatron.config import ParallelConfig
from based_megatron.data.batch import MicroBatch
from based_megatron.kernels.packing import PackedLayout
from based_megatron.kernels.taylor_attention import taylor_attention
from based_megatron.model.mixers import layer_mixers
from based_megatron.monitor.hub import Metrics, build_metrics
from based_megatron.parallel.linear import is_tied_copy, shard_spec
from based_megatron.train.batch_metrics import record_batches, record_sources
from based_megatron.train.callbacks.norms import Norms, layer_kind
from support.layouts import build_run, global_batch, local_micro_batches, small_config

LR = 1e-2


def metrics_of(
    parallel: ParallelConfig, wanted: bool = True, recompute: str = "none", precision: str = "fp32"
) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics of a step, the norms that a plain loop over whole gradients and weights gives, on a single rank)."""
    config = small_config(parallel, recompute=recompute)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))
    run = build_run(config)
    metrics = build_metrics(run.topology)
    metrics.wanted, run.step.recorder = wanted, metrics
    sources = ["web", "code", "web", "books", "code", "books", "web", "code"]
    batches = [
        dataclasses.replace(batch, sources=tuple(sources[batch.row : batch.row + 2]))
        for batch in local_micro_batches(global_batch(0, True), run.topology, 2)
    ]
    norms = Norms([mixer.name for mixer in layer_mixers(config.model)])
    trainer: Any = SimpleNamespace(metrics=metrics, step_runner=run.step, gradients=run.engine.gradients)
    run.step.evaluate(batches)
    run.step.accumulate(batches)
    plain: dict[str, float] = {}
    if run.topology.world_size == 1:
        plain.update(norms_of("grad_norm", run.step.chunks, lambda parameter: parameter.grad))
    run.step.update(lambda: norms.on_gradients(trainer))
    norms.post_step(trainer, SimpleNamespace())  # type: ignore[arg-type]
    if run.topology.world_size == 1:
        plain.update(norms_of("weight_norm", run.step.chunks, lambda parameter: parameter))
    return metrics.collect(), plain


def norms_of(name: str, chunks: Any, tensor_of: Any) -> dict[str, float]:
    squares: dict[str, float] = defaultdict(float)
    names = ("gated_conv", "linear_attention", "sliding_window", "full_attention")
    for chunk in chunks:
        for parameter in chunk.parameters():
            if not is_tied_copy(parameter):
                kind = layer_kind(shard_spec(parameter).name, names)
                squares[f"{name}/{kind}"] += float(tensor_of(parameter).detach().double().square().sum())
    return {key: math.sqrt(square) for key, square in squares.items()}


@pytest.fixture(scope="module")
def single(worker_pool) -> dict[str, float]:
    """Metrics of a single process."""
    ((found, plain),) = worker_pool(1).run(metrics_of, ParallelConfig())
    assert len(plain) == 2 * 7 and {key: found[key] for key in plain} == pytest.approx(plain, rel=1e-5)
    return found


def test_what_is_there(single):
    kinds = ("embedding", "full_attention", "gated_conv", "linear_attention", "mlp", "norms", "sliding_window")
    assert list(single) == [
        "data/document_tokens",
        "data/masked_share",
        *(f"grad_norm/{kind}" for kind in kinds),
        *(f"residual_rms/layer_{i:02d}" for i in range(4)),
        "smallest_normaliser/layer_01",
        "source_loss/books",
        "source_loss/code",
        "source_loss/web",
        "state_norm/layer_01",
        *(f"weight_norm/{kind}" for kind in kinds),
    ]


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor=2),
        ParallelConfig(pipeline=2),
        ParallelConfig(pipeline=2, virtual_pipeline=2),
        ParallelConfig(context=2),
        ParallelConfig(zero_stage=1),
        ParallelConfig(zero_stage=2),
        ParallelConfig(zero_stage=3),
        ParallelConfig(tensor=2, zero_stage=2),
    ],
    ids=str,
)
def test_a_layout_has_the_values_of_a_single_process(worker_pool, single, parallel):
    results = worker_pool(2).run(metrics_of, parallel)
    for found, _ in results:
        assert found == results[0][0], "every rank knows them"
        assert list(found) == list(single)
        assert found == pytest.approx(single, rel=2e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_gradients_are_found_where_deepspeed_keeps_them(worker_pool, single, stage):
    for found, _ in worker_pool(2).run(metrics_of, ParallelConfig(zero_stage=stage), precision="bf16"):
        kinds = [key for key in single if key.startswith("grad_norm/")]
        assert [found[key] for key in kinds] == pytest.approx([single[key] for key in kinds], rel=0.05)


@pytest.mark.parametrize("recompute", ["mixer", "full"])
def test_recomputed_passes_count_once(worker_pool, single, recompute):
    ((found, _),) = worker_pool(1).run(metrics_of, ParallelConfig(), recompute=recompute)
    assert found == pytest.approx(single, rel=1e-5)


def test_what_costs_time_is_recorded_in_logged_steps_only(worker_pool):
    ((found, _),) = worker_pool(1).run(metrics_of, ParallelConfig(), wanted=False)
    assert list(found) == ["source_loss/books", "source_loss/code", "source_loss/web"]


def attention_metrics() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(state and smallest normaliser that are watched, and both from their definitions), one document after another."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 9, 3, 4, generator=generator).double() for _ in range(2))
    v, ids = torch.randn(2, 9, 3, 5, generator=generator).double(), torch.tensor([[0] * 9, [0] * 4 + [1] * 5])
    seen: list[Tensor] = []
    taylor_attention(q, k, v, document_ids_BT=ids, watch=lambda *values: seen.extend(values))
    visible = torch.ones(9, 9).tril() * (ids[:, :, None] == ids[:, None, :])
    s = torch.einsum("bihf,bjhf->bhij", q, k) / 2
    smallest = ((1 + s + s.square() / 2) * visible[:, None]).sum(-1).min()
    features = PackedLayout.build(4, q.device, q.dtype).features(k)
    last = (ids == ids[:, -1:]).double()
    state = torch.einsum("bj,bjhr,bjhe->bhre", last, features, torch.cat([v, torch.ones(2, 9, 3, 1)], -1))
    return seen[0], seen[1], state, smallest


def test_attention_shows_its_state_and_its_smallest_normaliser():
    state, smallest, expected_state, expected_smallest = attention_metrics()
    assert torch.allclose(state, expected_state) and torch.allclose(smallest, expected_smallest)


def a_batch() -> MicroBatch:
    batch = local_micro_batches(global_batch(0, True), SimpleNamespace(**PLACE), 4)[0]  # type: ignore[arg-type]
    return dataclasses.replace(batch, sources=("a", "b", "a", "b"))


PLACE = {"data": SimpleNamespace(rank=0, size=1), "context": SimpleNamespace(rank=0, size=1)}


def test_the_data_of_a_batch():
    metrics, batch = Metrics(torch.device("cpu")), a_batch()
    metrics.wanted = True
    record_batches(metrics, [batch])
    assert batch.documents is not None
    lengths = [n for ids in batch.documents.numbers(torch.arange(32)) for n in ids.bincount().tolist()]
    assert metrics.collect() == {
        "data/document_tokens": pytest.approx(sum(lengths) / len(lengths)),
        "data/masked_share": pytest.approx(1 - float(batch.loss_mask_BL.mean()), rel=1e-6),
    }


def test_the_loss_of_each_source():
    metrics, batch = Metrics(torch.device("cpu")), a_batch()
    loss_BL = torch.rand(4, 32, generator=torch.Generator().manual_seed(1))
    nothing = dataclasses.replace(batch, loss_mask_BL=torch.zeros(4, 32))
    record_sources(metrics, batch, loss_BL, batch.loss_mask_BL)
    record_sources(metrics, nothing, loss_BL, nothing.loss_mask_BL)
    rows = {"a": [0, 2], "b": [1, 3]}
    assert metrics.collect() == {
        f"source_loss/{name}": pytest.approx(
            float((loss_BL * batch.loss_mask_BL)[chosen].sum() / batch.loss_mask_BL[chosen].sum()), rel=1e-6
        )
        for name, chosen in rows.items()
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("embedding.weight", "embedding"),
        ("layers.1.mixer.qkv.weight", "second"),
        ("layers.0.mixer_norm.weight", "norms"),
        ("layers.0.mlp_norm.weight", "norms"),
        ("layers.0.mlp.fc1.weight", "mlp"),
        ("final_norm.weight", "norms"),
        ("output.weight", "output"),
    ],
)
def test_kinds_of_layers(name, kind):
    assert layer_kind(name, ["first", "second"]) == kind
