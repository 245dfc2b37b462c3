"""One optimizer step: micro batches through the model, gradients into DeepSpeed.

Losses and gradients are sums over tokens, divided once by the token count of the whole global batch: masks, packed documents
and uneven micro batches weigh each token alike.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from based_megatron.data.batch import MicroBatch
from based_megatron.data.slices import MOST_SLICES
from based_megatron.model.based_model import BasedModel
from based_megatron.model.recorder import SILENT, Recorder
from based_megatron.parallel.gradient_sums import gradient
from based_megatron.parallel.linear import grouped_by
from based_megatron.parallel.megatron import pipeline_schedule
from based_megatron.parallel.sequence.carried import CarriedState, CarriedStates, NothingCarried
from based_megatron.parallel.sequence.plan import SequencePlan
from based_megatron.parallel.topology import Topology
from based_megatron.parallel.transfer import to_device
from based_megatron.train.batch_metrics import record_batches, record_sources


@dataclass(frozen=True)
class LossSum:
    """Summed loss in nats and the tokens it is over, of the whole global batch: fp64 scalars on the device, equal on every rank."""

    total: Tensor
    tokens: Tensor
    slices: Tensor | None = None
    """Both for each slice [slices, 2], of any tokens, if the micro batches have slices."""

    @property
    def mean(self) -> Tensor:
        return self.total / self.tokens.clamp(min=1)


@dataclass(frozen=True)
class Update:
    """What became of the gradient of a step."""

    grad_norm: Tensor
    """Its global norm before clipping, an fp64 scalar on the device; infinite if it was not finite."""
    applied: bool
    """False if the step was skipped: weights, optimizer and carried states are as before. The host knows, without waiting."""


class OwnWork(Protocol):
    """Takes the time of what a rank computes before it waits for ranks with other data."""

    def begin_own(self) -> None:
        """The work begins."""

    def end_own(self) -> None:
        """The work ends."""


class NobodyAsks:
    """Takes no time."""

    def begin_own(self) -> None:
        return None

    def end_own(self) -> None:
        return None


class Step:
    """Runs micro batches through this rank's model chunks. Subclasses differ in when gradients are reduced."""

    def __init__(
        self,
        chunks: list[BasedModel],
        engine: Any,
        topology: Topology,
        carried: CarriedStates | None = None,
        recorder: Recorder = SILENT,
    ) -> None:
        self.chunks, self.engine, self.topology, self._carried = chunks, engine, topology, carried
        self.recorder = recorder
        self._length_tokens = 0
        self._own: OwnWork = NobodyAsks()

    def accumulate(self, micro_batches: list[MicroBatch], own: OwnWork | None = None) -> LossSum:
        """Forward and backward of all micro batches of an optimizer step; gradients are then ready for `update`.

        own: told when this rank's own work begins and ends, without waiting for ranks with other data.
        With carried states, steps must come in order: each begins with what the last one that was not skipped has left.
        """
        self._own = own or NobodyAsks()
        record_batches(self.recorder, micro_batches)
        loss = self._accumulate(micro_batches)
        if self._carried is not None:
            self._carried.receive()
            self._length_tokens = micro_batches[0].bounds[-1]
        return loss

    def _accumulate(self, micro_batches: list[MicroBatch]) -> LossSum:
        raise NotImplementedError

    @torch.no_grad()
    def evaluate(self, micro_batches: list[MicroBatch]) -> LossSum:
        """Forward only. All micro batches have slices, or none has."""
        has_slices = micro_batches[0].slices_BL is not None
        return self.global_sum(self._evaluate(micro_batches), MOST_SLICES if has_slices else 0)

    def _evaluate(self, micro_batches: list[MicroBatch]) -> list[Tensor]:
        raise NotImplementedError

    def logits(self, batch: MicroBatch) -> Tensor | None:
        """This rank's logits [L, B, U] of one micro batch on the last stage, None on others."""
        raise NotImplementedError

    def update(self, *hooks: Any) -> Update:
        """Reduce, clip, step; leaves weights and carried states alone if the gradient is not finite, or judged bad.

        hooks: `on_gradients`, `judge` and `on_skip` of ZeroEngine.step.
        """
        applied = self.engine.step(*hooks)
        if self._carried is not None:
            self._carried.advance(self._length_tokens, counts=applied)
        norm = self.engine.get_global_grad_norm()
        return Update(torch.as_tensor(norm, dtype=torch.float64, device=self.topology.device), applied)

    def miss(self, tokens: int) -> None:
        """Step over so many tokens of each row: documents that go through them go on from before."""
        if self._carried is not None:
            self._carried.past = self._carried.past.missed(tokens)

    def plan(self, batch: MicroBatch) -> SequencePlan:
        """The place of this rank's slice in the whole sequences. Nothing is carried into or out of a pass without gradients."""
        documents = batch.documents
        carried: CarriedState = NothingCarried()
        if self._carried is not None and torch.is_grad_enabled():
            carried = self._carried.by_row[batch.row]
        if documents is not None:
            # A run that begins here, or resumes without carried states, has no past.
            documents = documents.with_past(carried.past.known)
        return SequencePlan(self.topology.sequence, batch.bounds, documents, self.topology.device, carried)

    def to_device(self, tensor: Tensor) -> Tensor:
        return to_device(tensor, self.topology.device)

    def loss_sum(self, loss_BL: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(summed loss, tokens, both as an fp64 row, above those of slices), the form that Megatron's schedules take."""
        mask_BL = self.to_device(batch.loss_mask_BL)
        if torch.is_grad_enabled():
            record_sources(self.recorder, batch, loss_BL, mask_BL)
        total, tokens = (loss_BL * mask_BL).sum(), mask_BL.sum()
        sums = torch.stack([total.detach().double(), tokens.double()])[None]
        if batch.slices_BL is not None:
            sums = torch.cat([sums, _slice_sums(loss_BL.detach(), self.to_device(batch.slices_BL))])
        # Weights of masked tokens are no whole numbers, but those of a sequence add up to one.
        return total, tokens.round().to(torch.int), sums

    def global_sum(self, losses: list[Tensor], slices: int = 0) -> LossSum:
        """Sum rows of (loss, tokens) of this rank's micro batches over data and context ranks; the last stage knows them."""
        none = torch.zeros(1 + slices, 2, dtype=torch.float64, device=self.topology.device)
        sums = torch.stack([none, *losses]).sum(0)
        dist.all_reduce(sums, group=self.topology.data_context.group)
        dist.broadcast(sums, src=self.topology.last_stage_rank, group=self.topology.pipeline.group)
        return LossSum(sums[0, 0], sums[0, 1], sums[1:] if slices else None)


class ScheduledStep(Step):
    """ZeRO-1: Megatron's pipeline schedules (one stage, 1F1B, interleaved), then one reduction."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.schedule = pipeline_schedule()
        self.chunks[0].config.finalize_model_grads_func = self._finalize

    def _accumulate(self, micro_batches: list[MicroBatch]) -> LossSum:
        self._own.begin_own()
        return self.global_sum(self._run(micro_batches, self.loss_sum, forward_only=False))

    def _evaluate(self, micro_batches: list[MicroBatch]) -> list[Tensor]:
        return self._run(micro_batches, self.loss_sum, forward_only=True)

    @torch.no_grad()
    def logits(self, batch: MicroBatch) -> Tensor | None:
        # The interleaved schedule needs as many micro batches as stages.
        copies = self.topology.pipeline.size if len(self.chunks) > 1 else 1
        found = self._run([batch] * copies, None, forward_only=True)
        return found[0] if found else None

    def _run(
        self, micro_batches: list[MicroBatch], loss: Callable[..., Any] | None, forward_only: bool
    ) -> list[Tensor]:
        batch_size, length = micro_batches[0].tokens_BL.shape
        iterators = [iter(micro_batches) for _ in self.chunks]
        return self.schedule(
            forward_step_func=lambda data, chunk: self._forward(data, chunk, loss),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=length * self.topology.context.size,
            micro_batch_size=batch_size,
            forward_only=forward_only,
            collect_non_loss_data=loss is None,
        )

    def _forward(
        self, data: Iterator[MicroBatch], chunk: BasedModel, loss: Callable[..., Any] | None
    ) -> tuple[Tensor, Any]:
        batch = next(data)
        if loss is None:
            return chunk(self.to_device(batch.tokens_BL), self.plan(batch)), lambda output, **_: output
        labels_BL = self.to_device(batch.labels_BL)
        output = chunk(self.to_device(batch.tokens_BL), self.plan(batch), labels_BL, self.recorder)
        return output, lambda output: loss(output, batch)

    def _finalize(self, chunks: list[BasedModel], num_tokens: Tensor | None, *_: Any, **__: Any) -> None:
        """Megatron's hook after the last backward: what must be summed before DeepSpeed averages over data x context ranks."""
        assert num_tokens is not None
        self._own.end_own()
        topology = self.topology
        dist.broadcast(num_tokens, src=topology.last_stage_rank, group=topology.pipeline.group)
        dist.all_reduce(num_tokens, group=topology.data_context.group)
        self.engine.scale_gradients(topology.data_context.size / num_tokens.clamp(min=1).double())
        parameters = [parameter for chunk in self.chunks for parameter in chunk.parameters()]
        _sum_sequence_parallel(grouped_by(parameters, "sequence_parallel"), topology)
        if topology.embedding is not None and self.chunks[0].config.model.tie_embeddings:
            tied = self.chunks[-1] if topology.pipeline.rank else self.chunks[0]
            dist.all_reduce(gradient(tied.embedding.weight), group=topology.embedding.group)


class EngineStep(Step):
    """ZeRO-2 and 3, one stage: DeepSpeed reduces inside each backward, so each loss is scaled beforehand."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.topology.tensor.size > 1:
            for parameter in grouped_by(self.chunks[0].parameters(), "sequence_parallel"):
                parameter.register_hook(self._sum_over_tensor)

    def _accumulate(self, micro_batches: list[MicroBatch]) -> LossSum:
        tokens = torch.stack([batch.loss_mask_BL.sum() for batch in micro_batches]).sum().to(self.topology.device)
        dist.all_reduce(tokens, group=self.topology.data_context.group)
        scale = self.topology.data_context.size / tokens.clamp(min=1)
        pairs: list[Tensor] = []
        self._own.begin_own()
        for batch in micro_batches:
            total, _, pair = self._loss(batch)
            if not pairs:
                self._own.end_own()  # from here on each backward waits in its reductions
            self.engine.backward(total * scale)
            pairs.append(pair)
        return self.global_sum(pairs)

    def _evaluate(self, micro_batches: list[MicroBatch]) -> list[Tensor]:
        return [self._loss(batch)[2] for batch in micro_batches]

    @torch.no_grad()
    def logits(self, batch: MicroBatch) -> Tensor | None:
        return self.engine(self.to_device(batch.tokens_BL), self.plan(batch))

    def _loss(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        labels_BL = self.to_device(batch.labels_BL)
        output = self.engine(self.to_device(batch.tokens_BL), self.plan(batch), labels_BL, self.recorder)
        return self.loss_sum(output, batch)

    def _sum_over_tensor(self, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad, group=self.topology.tensor.group)
        return grad


def build_step(
    chunks: list[BasedModel],
    engine: Any,
    topology: Topology,
    zero_stage: int,
    carried: CarriedStates | None = None,
    recorder: Recorder = SILENT,
) -> Step:
    """The step of a layout."""
    return (ScheduledStep if zero_stage == 1 else EngineStep)(chunks, engine, topology, carried, recorder)


def _slice_sums(loss_BL: Tensor, slices_BL: Tensor) -> Tensor:
    """Summed loss and tokens of each slice, fp64: a product, because sums by index have no fixed order on a GPU."""
    numbers = torch.arange(MOST_SLICES, device=slices_BL.device)
    is_in = (slices_BL.flatten() == numbers[:, None]).double()
    loss = loss_BL.flatten().double()
    return is_in @ torch.stack([loss, torch.ones_like(loss)], 1)


def _sum_sequence_parallel(parameters: list[Any], topology: Topology) -> None:
    """Norms and biases outside the tensor parallel regions saw only this rank's tokens."""
    if topology.tensor.size == 1 or not parameters:
        return
    grads = [grad for parameter in parameters if (grad := gradient(parameter)) is not None]
    flat = _flatten_dense_tensors(grads)
    dist.all_reduce(flat, group=topology.tensor.group)
    for grad, summed in zip(grads, _unflatten_dense_tensors(flat, grads), strict=True):
        grad.copy_(summed)
