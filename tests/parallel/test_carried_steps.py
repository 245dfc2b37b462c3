"""Steps of the whole model that start from carried states are parts of one long sequence: its losses, whatever the slices.

Gradients stop at the start of a step. Those over slices equal those of one rank, and those of one rank equal a long sequence whose
earlier parts are constants, which is what finite differences of the part's own inputs show. Exchanges and operations alone are in
test_sequence_carried.py.
"""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from based_megatron.config import Config, ParallelConfig
from based_megatron.data.batch import MicroBatch
from based_megatron.model.based_model import BasedModel
from based_megatron.model.build import build_model
from based_megatron.parallel.linear import shard_spec
from based_megatron.parallel.sequence.carried import CarriedState, CarriedStates
from based_megatron.parallel.sequence.documents import Documents
from based_megatron.parallel.sequence.plan import SequencePlan, whole_sequence
from based_megatron.parallel.topology import Topology, build_topology
from based_megatron.train.carried import build_carried_states
from based_megatron.train.optimizer import build_engine
from based_megatron.train.step import build_step
from support.layouts import VOCAB, small_config
from support.pool import rank_device
from support.sequence import documents_of_part, gap, spoil_what_has_ended

LENGTH, STEPS = 12, 4
SLICES = {1: [(0, 12)], 2: [(0, 6, 12), (0, 1, 12)], 4: [(0, 3, 6, 9, 12), (0, 1, 2, 11, 12)]}
"""Shorter than the window of 11 before, so that rows come from several slices and from the step before."""


def long_ids() -> Tensor:
    """Documents of [rows, STEPS x LENGTH] tokens: one that goes on for all steps, ends at, before and after the start of one."""
    total = LENGTH * STEPS
    starts: list[list[int]] = [
        [],
        [LENGTH, 2 * LENGTH],
        [LENGTH - 1, 3 * LENGTH - 2],
        [LENGTH + 1, 30, 31],
        list(range(1, total, 5)),
    ]
    ids = torch.zeros(len(starts), total, dtype=torch.int32)
    for row, places in enumerate(starts):
        for place in places:
            ids[row, place:] += 1
    return ids


def part_of(ids: Tensor, step: int) -> Documents:
    """The documents of one step."""
    return documents_of_part(ids, step * LENGTH, (step + 1) * LENGTH)


def model_of_steps(recompute: str = "none") -> tuple[BasedModel, Topology]:
    """A model in fp64 over slices, with every mixer that carries."""
    config = small_config(ParallelConfig(context=dist.get_world_size()), recompute=recompute)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, layer_pattern="cLSLc"))
    topology = build_topology(config.parallel, rank_device(dist.get_rank()))
    (model,) = build_model(config, topology, torch.float64)
    return model, topology


def tokens_of(ids: Tensor) -> Tensor:
    """Random tokens, and one more for the last label."""
    tokens = torch.randint(0, VOCAB, (len(ids), ids.shape[1] + 1), generator=torch.Generator().manual_seed(3))
    return tokens.to(rank_device(dist.get_rank()))


def carried_losses(bounds: tuple[int, ...], recompute: str) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Errors of this slice's losses of every step, and the gradients of all steps' losses, summed over ranks."""
    model, topology = model_of_steps(recompute)
    ids = long_ids()
    tokens = tokens_of(ids)
    with torch.no_grad():
        whole = model(
            tokens[:, :-1], whole_sequence(Documents.from_ids(ids), LENGTH * STEPS, topology.device), tokens[:, 1:]
        )
    carried, errors = CarriedState(), {}
    for step in range(STEPS):
        plan = SequencePlan(topology.sequence, bounds, part_of(ids, step), topology.device, carried)
        here = slice(step * LENGTH + plan.start, step * LENGTH + plan.end)
        losses = model(tokens[:, :-1][:, here].contiguous(), plan, tokens[:, 1:][:, here].contiguous())
        losses.sum().backward()
        errors[f"step {step}"] = gap(losses.detach(), whole[:, here])
        carried = carried.next(LENGTH)
    gradients = {shard_spec(p).name: p.grad.clone() for p in model.parameters() if p.grad is not None}
    for gradient in gradients.values():
        dist.all_reduce(gradient, group=topology.context.group)
    return errors, {name: gradient.cpu() for name, gradient in gradients.items()}


@pytest.fixture(scope="module")
def of_one_rank(worker_pool) -> dict[str, Tensor]:
    ((_, gradients),) = worker_pool(1).run(carried_losses, *SLICES[1], "none")
    return gradients


@pytest.mark.parametrize(
    ("bounds", "recompute"),
    [(bounds, "none") for size in SLICES for bounds in SLICES[size]]
    + [((0, 1, 12), "full"), ((0, 3, 6, 9, 12), "mixer")],
)
def test_steps_that_carry_states_are_one_long_sequence(worker_pool, of_one_rank, bounds, recompute):
    for errors, gradients in worker_pool(len(bounds) - 1).run(carried_losses, bounds, recompute):
        # The tables of rotary angles are fp32, and carried keys are rotated twice.
        assert len(errors) == STEPS and all(error < 1e-6 for error in errors.values()), errors
        assert errors["step 0"] < 1e-11
        assert gradients.keys() == of_one_rank.keys()
        for name, gradient in gradients.items():
            assert gap(gradient, of_one_rank[name]) < 1e-11 * max(1.0, float(gradient.abs().max())), name


def errors_after_a_gap(bounds: tuple[int, ...], missing: tuple[int, ...]) -> list[float]:
    """Errors of this slice's losses of the steps after those that did not count, whose states are NaN."""
    model, topology = model_of_steps()
    ids = long_ids()
    tokens = tokens_of(ids)
    kept = [i for i in range(LENGTH * STEPS) if i // LENGTH not in missing]
    with torch.no_grad():
        without = whole_sequence(Documents.from_ids(ids[:, kept]), len(kept), topology.device)
        whole = model(tokens[:, :-1][:, kept].contiguous(), without, tokens[:, 1:][:, kept].contiguous())
    carried, errors = CarriedStates({0: CarriedState()}, {}), []
    for step in range(STEPS):
        before, documents = carried.by_row[0], part_of(ids, step).with_past(carried.past.known)
        plan = SequencePlan(topology.sequence, bounds, documents, topology.device, before)
        here = slice(step * LENGTH + plan.start, step * LENGTH + plan.end)
        with torch.no_grad():
            losses = model(tokens[:, :-1][:, here].contiguous(), plan, tokens[:, 1:][:, here].contiguous())
        carried.receive()
        if step in missing:
            for left in before.receive().values():
                left.fill_(torch.nan)
        else:
            begin = kept.index(here.start)
            errors.append(gap(losses, whole[:, begin : begin + plan.length]))
        carried.advance(LENGTH, counts=step not in missing)
    return errors


@pytest.mark.parametrize("missing", [(1,), (0, 2), (1, 2)])
@pytest.mark.parametrize("bounds", [(0, 12), (0, 1, 12)])
def test_a_step_that_did_not_count_never_was(worker_pool, bounds, missing):
    """A document that goes through it goes on from before it; one that began in it begins anew, and sees nothing of an older one."""
    for errors in worker_pool(len(bounds) - 1).run(errors_after_a_gap, bounds, missing):
        # The tables of rotary angles are fp32, and carried keys are rotated twice.
        assert len(errors) == STEPS - len(missing) and all(error < 1e-6 for error in errors), errors


def nan_errors(bounds: tuple[int, ...]) -> dict[str, float]:
    """How far losses, gradients and the next carried state differ if all that no document goes on with is NaN."""
    model, topology = model_of_steps()
    ids = long_ids()
    tokens = tokens_of(ids)

    def run(step: int, carried: CarriedState) -> tuple[Tensor, dict[str, Tensor], CarriedState]:
        plan = SequencePlan(topology.sequence, bounds, part_of(ids, step), topology.device, carried)
        here = slice(step * LENGTH + plan.start, step * LENGTH + plan.end)
        model.zero_grad()
        losses = model(tokens[:, :-1][:, here].contiguous(), plan, tokens[:, 1:][:, here].contiguous())
        losses.sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return losses.detach(), gradients, carried.next(LENGTH)

    carried, errors = CarriedState(), {}
    for step in range(STEPS):
        spoiled = CarriedState({key: x.clone() for key, x in carried.before.items()}, carried.past)
        layers = spoil_what_has_ended(spoiled, part_of(ids, step))
        assert layers == (5 if step and topology.context.rank == 0 else 0)
        losses, gradients, after = run(step, carried)
        losses_of_nan, gradients_of_nan, after_nan = run(step, spoiled)
        errors[f"losses {step}"] = gap(losses_of_nan, losses)
        errors |= {f"{name} {step}": gap(gradients_of_nan[name], gradient) for name, gradient in gradients.items()}
        errors |= {f"{key} {step}": gap(after_nan.before[key], x) for key, x in after.before.items()}
        carried = after
    return errors


def test_a_nan_in_what_no_document_goes_on_with_reaches_nothing(worker_pool):
    """States of sequences that begin a document, and rows before a document's start, are selected out: 0 x NaN is NaN."""
    for errors in worker_pool(2).run(nan_errors, (0, 1, 12)):
        assert len(errors) > STEPS * 10 and {name: error for name, error in errors.items() if error != 0.0} == {}


def detached_gradient_errors() -> dict[str, float]:
    """One rank: gradients of the last step's loss to the tokens' embeddings, against differences of that loss."""
    model, topology = model_of_steps()
    ids = torch.zeros(1, 2 * LENGTH, dtype=torch.int32)
    tokens = tokens_of(ids)
    first = SequencePlan(topology.sequence, (0, LENGTH), part_of(ids, 0), topology.device, CarriedState())
    with torch.no_grad():
        model(tokens[:, :LENGTH], first, tokens[:, 1 : LENGTH + 1])
    carried = first.carried.next(LENGTH)

    def loss() -> Tensor:
        again = CarriedState(carried.before, carried.past)
        plan = SequencePlan(topology.sequence, (0, LENGTH), part_of(ids, 1), topology.device, again)
        return model(tokens[:, LENGTH:-1], plan, tokens[:, LENGTH + 1 :]).sum()

    loss().backward()
    errors: dict[str, float] = {}
    parameters: Any = model.named_parameters()
    for name, parameter in parameters:
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        direction = direction.to(parameter.device)
        with torch.no_grad():
            values = []
            for step in (1e-6, -2e-6):
                parameter += step * direction
                values.append(float(loss()))
            parameter += 1e-6 * direction
        slope = (values[0] - values[1]) / 2e-6
        errors[name] = abs(slope - float((parameter.grad * direction).sum())) / max(1.0, abs(slope))
    return errors


def test_gradients_stop_at_the_start_of_a_step(worker_pool):
    """The past is a constant: it was made with the weights of its own step."""
    (errors,) = worker_pool(1).run(detached_gradient_errors)
    assert len(errors) > 10 and all(error < 1e-6 for error in errors.values()), errors


ROWS = 6


def rows_and_ids() -> tuple[Tensor, Tensor]:
    """Tokens [ROWS, STEPS x LENGTH + 1] and document ids; as many rows as two stages can take in turn."""
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH * STEPS + 1), generator=torch.Generator().manual_seed(4))
    ids = long_ids()
    return tokens, torch.cat([ids, ids[: ROWS - len(ids)]])


def config_of_rows(parallel: ParallelConfig | None = None, precision: str = "fp32") -> Config:
    config = small_config(parallel, micro_batch_sequences=1)
    train = dataclasses.replace(config.train, global_batch_sequences=ROWS, precision=precision)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, layer_pattern="cLSLc"), train=train)


def losses_of_long_rows() -> tuple[list[float], list[float]]:
    """Mean losses of each step's part of the rows, within the whole rows and apart from them."""
    config, (tokens, ids) = config_of_rows(), rows_and_ids()
    topology = build_topology(config.parallel, rank_device(0))
    (model,) = build_model(config, topology, torch.float64)
    tokens = tokens.to(topology.device)

    def losses(part: slice) -> Tensor:
        inputs, labels = tokens[:, :-1][:, part].contiguous(), tokens[:, 1:][:, part].contiguous()
        return model(inputs, whole_sequence(Documents.from_ids(ids[:, part]), inputs.shape[1], topology.device), labels)

    parts = [slice(step * LENGTH, (step + 1) * LENGTH) for step in range(STEPS)]
    with torch.no_grad():
        whole = losses(slice(0, STEPS * LENGTH))
        return [float(whole[:, part].mean()) for part in parts], [float(losses(part).mean()) for part in parts]


def losses_of_steps(parallel: ParallelConfig, precision: str) -> tuple[list[float], list[float], bool]:
    """Mean losses of training steps, of evaluations between them, and whether carried states keep their declared form."""
    config, (tokens, ids) = config_of_rows(parallel, precision), rows_and_ids()
    topology = build_topology(parallel, rank_device(dist.get_rank()))
    chunks = build_model(config, topology)
    carried = build_carried_states(config, chunks, topology, range(ROWS))
    step_runner = build_step(chunks, build_engine(chunks, config, topology), topology, parallel.zero_stage, carried)
    declared, losses, evaluated = forms(carried.by_row), [], []
    for step in range(STEPS):
        part = slice(step * LENGTH, (step + 1) * LENGTH)
        documents = part_of(ids, step)
        batches = [
            MicroBatch(
                tokens[row : row + 1, :-1][:, part],
                tokens[row : row + 1, 1:][:, part],
                torch.ones(1, LENGTH),
                Documents(documents.starts[row : row + 1], documents.tokens_before[row : row + 1]),
                (0, LENGTH),
                row,
            )
            for row in range(ROWS)
        ]
        losses.append(float(step_runner.accumulate(batches).mean))
        carried.advance(LENGTH, counts=True)
        evaluated.append(float(step_runner.evaluate(batches).mean))
    return losses, evaluated, forms(carried.by_row) == declared


def forms(by_row: dict[int, CarriedState]) -> list[tuple]:
    return [(row, key, x.shape, x.dtype) for row, state in by_row.items() for key, x in state.before.items()]


@pytest.mark.parametrize(
    ("size", "parallel", "precision", "error"),
    [
        (1, ParallelConfig(), "fp32", 1e-5),
        (2, ParallelConfig(pipeline=2, virtual_pipeline=2), "fp32", 1e-5),
        (2, ParallelConfig(tensor=2, zero_stage=2), "bf16", 0.02),
    ],
)
def test_the_training_step_carries_and_evaluation_does_not(worker_pool, size, parallel, precision, error):
    """Micro batches of one row each; their carried states have the form that the mixers declare."""
    ((within, apart),) = worker_pool(1).run(losses_of_long_rows)
    assert min(abs(a - b) for a, b in zip(within[1:], apart[1:], strict=True)) > 10 * 1e-5
    for losses, evaluated, keeps_form in worker_pool(size).run(losses_of_steps, parallel, precision):
        assert losses == pytest.approx(within, abs=error)
        assert evaluated == pytest.approx(apart, abs=error)
        assert keeps_form
