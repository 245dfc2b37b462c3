"""The whole model: output projection, vocabulary padding, precision, names under a pipeline, documents, size."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import build, config_with, here, some_tokens, whole_plan
from torch import Tensor
from torch.nn import functional

from based_megatron.config import ParallelConfig, load_config
from based_megatron.kernels.rotary import rotary_tables
from based_megatron.model.based_model import BasedModel
from based_megatron.model.build import build_model
from based_megatron.model.config import based_config
from based_megatron.parallel.linear import is_tied_copy, shard_spec
from based_megatron.parallel.megatron import megatron_runs
from based_megatron.parallel.sequence.plan import SequencePlan
from based_megatron.parallel.sequence.ranks import ContextRanks
from based_megatron.parallel.stages import split_layers
from support.layouts import topology_of

DOUBLE = torch.float64


def tied_and_untied() -> dict[str, float]:
    """Both forms with the same numbers: loss, and the gradient of a tied embedding as the sum of both."""
    tied, topology = build(DOUBLE)
    untied, _ = build(DOUBLE, tie_embeddings=False)
    assert set(dict(untied.named_parameters())) - set(dict(tied.named_parameters())) == {"output.weight"}
    own = untied.output.weight.detach().clone()
    untied.output.weight.data.copy_(untied.embedding.weight)
    (tokens, labels), plan = some_tokens(topology), whole_plan(topology)
    losses = [model(tokens, plan, labels).sum() for model in (tied, untied)]
    for loss in losses:
        loss.backward()
    both = untied.embedding.weight.grad + untied.output.weight.grad
    return {
        "loss": float((losses[0] - losses[1]).abs()),
        "gradient": float((tied.embedding.weight.grad - both).abs().max()),
        "own draw": float((own - untied.embedding.weight).abs().max()),
    }


def test_a_tied_embedding_is_both_layers(worker_pool):
    (found,) = worker_pool(1).run(tied_and_untied)
    assert found["loss"] < 1e-10 and found["gradient"] < 1e-9 and found["own draw"] > 0.1


def loss_and_logits(dtype: torch.dtype) -> dict[str, Any]:
    model, topology = build(dtype)
    (tokens, labels), plan = some_tokens(topology), whole_plan(topology)
    seen: list[torch.dtype] = []
    for layer in model.layers.values():
        layer.register_forward_hook(lambda module, args, output: seen.extend([args[0].dtype, output[0].dtype]))
    with torch.no_grad():
        loss, logits = model(tokens, plan, labels), model(tokens, plan)
    expected = functional.cross_entropy(logits.permute(1, 2, 0).to(loss.dtype), labels, reduction="none")
    return {
        "error": float((loss - expected).abs().max()),
        "loss": (tuple(loss.shape), loss.dtype),
        "logits": (tuple(logits.shape), logits.dtype),
        "residual": set(seen),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_is_the_cross_entropy_of_the_logits(worker_pool, dtype):
    """The loss and the residual of every layer are fp32 or wider."""
    (found,) = worker_pool(1).run(loss_and_logits, dtype)
    assert found["error"] < 1e-5
    wide = torch.promote_types(dtype, torch.float32)
    assert found["loss"] == ((3, 24), wide) and found["logits"] == ((24, 3, 91), dtype)
    assert found["residual"] == {wide}


@megatron_runs()
def poisoned_padding() -> dict[str, Any]:
    """Changes that the value of a padding row makes: 91 rows lie on two ranks of 64, so rank 1 has 27 and then padding."""
    model, topology = build(DOUBLE, ParallelConfig(tensor=2))
    (tokens, labels), plan = some_tokens(topology), whole_plan(topology)
    plain = model(tokens, plan, labels).detach()
    if topology.tensor.rank == 1:
        model.embedding.weight.data[27:] = 1e3
    loss = model(tokens, plan, labels)
    loss.sum().backward()
    logits = model(tokens, plan)
    return {
        "change": float((loss - plain).abs().max()),
        "gradient": float(model.embedding.weight.grad[27:].abs().max()),
        "last logits": logits[..., 27:].flatten().tolist(),
        "infinite": int(torch.isinf(logits).sum()),
        "rows": len(model.embedding.weight),
    }


def test_padding_of_the_vocabulary_takes_no_part_in_the_softmax(worker_pool):
    first, second = worker_pool(2).run(poisoned_padding)
    assert first["rows"] == second["rows"] == 64
    assert first["change"] == second["change"] == 0.0
    assert first["gradient"] > 0 and second["gradient"] == 0.0
    assert (
        first["infinite"] == 0
        and set(second["last logits"]) == {float("-inf")}
        and second["infinite"] == 24 * 3 * (64 - 27)
    )


def change_by_row(row: int, **model: Any) -> tuple[int, float]:
    """(rows, change of the loss when the embedding row of a token that never occurs does)."""
    built, topology = build(DOUBLE, **model)
    (tokens, labels), plan = some_tokens(topology), whole_plan(topology)
    with torch.no_grad():
        before = built(tokens, plan, labels)
        built.embedding.weight[row] += 1
        return len(built.embedding.weight), float((built(tokens, plan, labels) - before).abs().max())


def test_rows_of_the_vocabulary_multiple_take_part_in_the_softmax(worker_pool):
    """The released models have 50,257 tokens and 50,264 rows."""
    ((rows, change),) = worker_pool(1).run(change_by_row, 95, vocab_multiple=8)
    assert rows == 96 and change > 1e-3


def losses_with_other_tokens(document_ids: Tensor | None) -> Tensor:
    """[24] True for tokens whose loss changes when tokens 0 to 9 of their sequence do."""
    model, topology = build(DOUBLE)
    (tokens, labels), plan = (
        some_tokens(topology),
        whole_plan(topology, document_ids=None if document_ids is None else here(document_ids)),
    )
    other = tokens.clone()
    other[:, :10] = (tokens[:, :10] + 1) % 91
    with torch.no_grad():
        return ((model(tokens, plan, labels) - model(other, plan, labels)).abs() > 1e-12).all(0).cpu()


def test_a_document_does_not_see_the_one_before(worker_pool):
    ids = (torch.arange(24) >= 10).int().expand(3, -1).contiguous()
    (packed,), (whole,) = (worker_pool(1).run(losses_with_other_tokens, each) for each in (ids, None))
    assert packed.tolist() == [True] * 10 + [False] * 14
    assert whole.all()


def rotary_errors() -> float:
    """Errors of the rotary tables of the third slice of four."""
    model, topology = build(torch.float32)
    plan = SequencePlan(ContextRanks(2, 4), (0, 5, 12, 18, 24), None, topology.device)
    found = model._rotary(plan, topology.device)
    assert found is not None
    expected = rotary_tables(here(torch.arange(12, 18)), 8, 1.0, 1e4)
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def test_positions_go_on_over_slices(worker_pool):
    assert worker_pool(1).run(rotary_errors) == [0.0]


def stage_contents(parallel: ParallelConfig, **model: Any) -> dict[str, Any]:
    config = config_with(parallel, **model)
    topology = topology_of(parallel)
    chunks = build_model(config, topology)
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    names = [shard_spec(parameter).name for parameter in parameters]
    copies = [shard_spec(p).name for p in parameters if is_tied_copy(p)]
    return {
        "layers": [[int(i) for i in chunk.layers] for chunk in chunks],
        "copies": copies,
        "ends": sorted(name for name in names if not name.startswith("layers.")),
        "names": {name.split(".")[1] for name in names if name.startswith("layers.")},
    }


def test_stages_keep_the_names_of_the_whole_model(worker_pool):
    first, last = worker_pool(2).run(stage_contents, ParallelConfig(pipeline=2))
    assert first["layers"] == [[0, 1, 2, 3]] and last["layers"] == [[4, 5, 6, 7]]
    assert first["names"] == set("0123") and last["names"] == set("4567")
    assert first["ends"] == ["embedding.weight"] and last["ends"] == ["embedding.weight", "final_norm.weight"]


def test_the_last_stage_holds_a_copy_of_the_tied_embedding(worker_pool):
    """It must be known as one, or its gradient would count twice in the norm."""
    first, last = worker_pool(2).run(stage_contents, ParallelConfig(pipeline=2))
    assert first["copies"] == [] and last["copies"] == ["embedding.weight"]
    assert worker_pool(1).run(stage_contents, ParallelConfig())[0]["copies"] == []


def test_an_untied_pipeline_has_no_copies(worker_pool):
    first, last = worker_pool(2).run(stage_contents, ParallelConfig(pipeline=2), tie_embeddings=False)
    assert first["copies"] == last["copies"] == []
    assert first["ends"] == ["embedding.weight"] and last["ends"] == ["final_norm.weight", "output.weight"]


def test_interleaved_chunks_are_dealt_round(worker_pool):
    first, last = worker_pool(2).run(stage_contents, ParallelConfig(pipeline=2, virtual_pipeline=2))
    assert first["layers"] == [[0, 1], [4, 5]] and last["layers"] == [[2, 3], [6, 7]]


def parameters_of(preset: str) -> int:
    """Parameters of a preset, built without storage."""
    config, topology = load_config(preset), topology_of()
    shared = based_config(config.model, ParallelConfig(), dtype=torch.bfloat16, backend="reference", recompute="none")
    (stage,) = split_layers(shared.num_layers, 0, 1, 1)
    with torch.device("meta"):
        model = BasedModel(shared, stage, topology.process_groups)
    assert dist.get_world_size() == 1
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("preset", "total"), [("based-360m", 362_620_928), ("based-1b", 1_349_453_056)])
def test_parameter_totals_of_the_built_model(worker_pool, preset, total):
    assert worker_pool(1).run(parameters_of, preset) == [total]
