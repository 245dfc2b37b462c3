"""Continues a few prompts while training, on whatever layout the run has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor

from based_megatron.config.validate import slice_multiple
from based_megatron.data.batch import MicroBatch
from based_megatron.inference.batching import Request
from based_megatron.inference.engine import Engine
from based_megatron.inference.sampling import Sampling
from based_megatron.model.based_model import BasedModel
from based_megatron.model.mixers import has_states
from based_megatron.parallel.megatron import gather_from_tensor_model_parallel_region
from based_megatron.parallel.sequence.documents import Documents
from based_megatron.parallel.sequence.slices import even_bounds, slice_of
from based_megatron.train.callbacks.base import Callback, StepReport

if TYPE_CHECKING:
    from based_megatron.train.trainer import Trainer


class Sampler(Callback):
    """Greedy continuations: by the engine where a rank has the whole model, else by whole forward passes, which are slow."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def post_step(self, trainer: Trainer, report: StepReport) -> None:
        if report.step % trainer.config.monitor.sample_interval_steps:
            return
        for prompt in trainer.config.monitor.sample_prompts:
            with trainer.doing("sample"):
                text = self._continue(trainer, prompt)
            trainer.record("sample", prompt=prompt, text=text)

    def _continue(self, trainer: Trainer, prompt: str) -> str:
        monitor, length = trainer.config.monitor, trainer.config.data.sequence_length_tokens
        ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids[: length - 1] or [0]
        return self._tokenizer.decode(continuation(trainer, ids, min(monitor.sample_tokens, length - len(ids))))


def continuation(trainer: Trainer, ids: list[int], tokens: int) -> list[int]:
    """The likeliest tokens after `ids`, one after the other; equal on every rank (collective)."""
    model = whole_model(trainer)
    if model is None:
        found: list[int] = []
        while len(found) < tokens:
            found.append(next_token(trainer, ids + found))
        return found
    request = Request(tuple(ids), Sampling(max_new_tokens=tokens, temperature=0))
    updates = Engine(model, graphs=False).generate([request], slots=1)
    return [token for update in updates for token in update.tokens]


def whole_model(trainer: Trainer) -> BasedModel | None:
    """The model that this rank trains, if the engine can decode it: whole, in weights that it holds, with states of constant size."""
    config = trainer.config
    layout = config.parallel
    # With ZeRO's messages under way during computation, only a forward pass waits for the weights that it reads.
    is_elsewhere = layout.tensor > 1 or layout.pipeline > 1 or layout.zero_stage == 3 or layout.overlap_zero
    if is_elsewhere or config.train.precision == "fp8" or not has_states(config.model):
        return None
    (model,) = trainer.step_runner.chunks
    return model


def next_token(trainer: Trainer, ids: list[int]) -> int:
    """The likeliest token after `ids`; equal on every rank (collective)."""
    config, topology = trainer.config, trainer.topology
    batch = _batch(ids, trainer)
    logits_LBU = trainer.step_runner.logits(batch)
    found = torch.zeros(1, dtype=torch.int64, device=topology.device)
    if logits_LBU is not None:
        begin, end = batch.bounds[topology.context.rank : topology.context.rank + 2]
        owner = begin < len(ids) <= end
        position = len(ids) - 1 - begin if owner else 0
        logits_U: Tensor = gather_from_tensor_model_parallel_region(logits_LBU[position, :1].contiguous())[0]
        if owner and topology.data.rank == 0 and topology.tensor.rank == 0:
            found += logits_U[: config.model.vocab_size].argmax()
    dist.all_reduce(found)
    return int(found)


def _batch(ids: list[int], trainer: Trainer) -> MicroBatch:
    """The prompt in the shape of a training micro batch; what follows it cannot be seen from its last token.

    A prefix that all tokens see (model.prefix_tokens) ends with the prompt: what follows is a document of its own.
    """
    config, context = trainer.config, trainer.topology.context
    length = config.data.sequence_length_tokens
    bounds = even_bounds(length, context.size, slice_multiple(config.parallel))
    tokens_BS = torch.zeros(config.train.micro_batch_sequences, length, dtype=torch.int64)
    tokens_BS[:, : len(ids)] = torch.tensor(ids)
    tokens_BL = tokens_BS[:, slice_of(bounds, context.rank)].contiguous()
    prefix_ends = [len(ids)] if config.model.prefix_tokens else []
    starts = torch.tensor([0, *prefix_ends])
    documents = Documents((starts,) * len(tokens_BS)) if config.data.isolate_documents or prefix_ends else None
    return MicroBatch(tokens_BL, tokens_BL, torch.zeros_like(tokens_BL, dtype=torch.float32), documents, bounds)
