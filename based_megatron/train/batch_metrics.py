"""Metrics of micro batches: what they are made of, and the loss of each source of a mixture."""

from collections.abc import Sequence

import torch
from torch import Tensor

from based_megatron.data.batch import MicroBatch
from based_megatron.model.recorder import Recorder
from based_megatron.parallel.transfer import to_device


def record_batches(recorder: Recorder, micro_batches: Sequence[MicroBatch]) -> None:
    """Record, in a step that is logged, the share of tokens without loss and the mean length of documents, known on the host."""
    if not recorder.wanted:
        return
    for batch in micro_batches:
        recorder.record("data/masked_share", 1 - float(batch.loss_mask_BL.mean()), count=batch.loss_mask_BL.numel())
        if batch.documents is not None:
            # A document that a sequence's end cuts counts as two.
            documents = sum(len(starts) for starts in batch.documents.starts)
            tokens = batch.bounds[-1] * len(batch.documents.starts)
            recorder.record("data/document_tokens", tokens / documents, count=documents)


@torch.no_grad()
def record_sources(recorder: Recorder, batch: MicroBatch, loss_BL: Tensor, mask_BL: Tensor) -> None:
    """Record the mean loss of the tokens from each source of a mixture, over all steps of the interval."""
    if not batch.sources:
        return
    names = sorted(set(batch.sources))
    is_from_SB = torch.tensor([[float(source == name) for source in batch.sources] for name in names])
    is_from_SB = to_device(is_from_SB, loss_BL.device)
    totals_S, tokens_S = is_from_SB @ (loss_BL * mask_BL).sum(1).float(), is_from_SB @ mask_BL.sum(1).float()
    for name, total, tokens in zip(names, totals_S, tokens_S, strict=True):
        recorder.record(f"source_loss/{name}", total / tokens.clamp(min=1), count=tokens)
