"""The loss of sequences with a prefix that all tokens see (JRT, arXiv 2407.05483): its labels, masked tokens and weights.

    loss of a sequence = (mean over next tokens + 0.25 mean over masked tokens) / 1.25

Next tokens count where the prefix does not show them; a part of the tokens of the prefix is masked, to be predicted in place. The weights
of a sequence add up to its next tokens, so that sequences weigh as they do without a prefix. Under isolated documents the prefix ends
with the first document.

Legend: B sequences, L tokens.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from based_megatron.config import Config
from based_megatron.data.batch import MicroBatch
from based_megatron.data.slices import NO_SLICE

MASKED_WEIGHT = 0.25
"""Weight of masked tokens; that of next tokens is 1."""


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What becomes of the micro batches of a model with a prefix."""

    tokens: int
    mask_fraction: float
    mask_token: int
    seed: int

    def causal(self, batch: MicroBatch) -> MicroBatch:
        """The batch with the labels out of the loss, and out of all slices, that its prefixes show."""
        mask_BL = batch.loss_mask_BL.clone()
        slices_BL = None if batch.slices_BL is None else batch.slices_BL.clone()
        for row, end in enumerate(self._ends(batch)):
            mask_BL[row, : end - 1] = 0
            if slices_BL is not None:
                slices_BL[row, : end - 1] = NO_SLICE
        return dataclasses.replace(batch, loss_mask_BL=mask_BL, slices_BL=slices_BL)

    def masked(self, batch: MicroBatch, numbers: list[int]) -> MicroBatch:
        """The batch as a training step takes it, with masked tokens that depend on the sequences' `numbers` in the run alone."""
        ends = self._ends(batch)
        batch = self.causal(batch)
        tokens_BL, labels_BL, weights_BL = (x.clone() for x in (batch.tokens_BL, batch.labels_BL, batch.loss_mask_BL))
        for row, (number, end) in enumerate(zip(numbers, ends, strict=True)):
            count = round(self.mask_fraction * end)
            next_tokens = float(weights_BL[row].sum())
            if not count or not next_tokens:
                continue
            places = self._places(number, end, count)
            weights_BL[row] *= 1 / (1 + MASKED_WEIGHT)
            # The last token of the prefix may count for its next token: one label a place, and the masked one goes before.
            next_tokens -= float(batch.loss_mask_BL[row, places].sum())
            weights_BL[row, places] = MASKED_WEIGHT / (1 + MASKED_WEIGHT) * next_tokens / count
            labels_BL[row, places] = tokens_BL[row, places]
            tokens_BL[row, places] = self.mask_token
        return dataclasses.replace(batch, tokens_BL=tokens_BL, labels_BL=labels_BL, loss_mask_BL=weights_BL)

    def _places(self, number: int, end: int, count: int) -> Tensor:
        """Random places before the end, without repeats: a pure function of the seed and the number."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, number]))
        return torch.from_numpy(generator.permutation(end)[:count])

    def _ends(self, batch: MicroBatch) -> list[int]:
        """Tokens of each sequence's prefix."""
        rows, length = batch.tokens_BL.shape
        if batch.documents is None:
            return [min(self.tokens, length)] * rows
        first_ends = [min([length, *starts[starts > 0].tolist()]) for starts in batch.documents.starts]
        return [min(self.tokens, end) for end in first_ends]


def build_prefix(config: Config) -> Prefix | None:
    """The prefix of a run; None without `model.prefix_tokens`."""
    if not config.model.prefix_tokens:
        return None
    token = config.train.prefix_mask_token or config.model.embedding_rows - 1
    return Prefix(config.model.prefix_tokens, config.train.prefix_mask_fraction, token, config.data.seed)
