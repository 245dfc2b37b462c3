"""Rows scored as documents of packed sequences: one forward pass takes many, and every state is cut between two of them.

Legend: L tokens of a packed sequence, n tokens that are scored, U vocabulary columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from based_megatron.evaluation.likelihood import Score, likelihoods
from based_megatron.inference.reader import Tokens
from based_megatron.model.based_model import BasedModel
from based_megatron.parallel.sequence.documents import Documents
from based_megatron.parallel.sequence.plan import whole_sequence

PACKED_TOKENS = 2048
"""Most tokens of a packed sequence: the logits of all of them are held at once."""


@dataclass(frozen=True)
class Pair:
    """A context and the continuation of it that is scored; neither is empty."""

    context: Tokens
    continuation: Tokens

    @property
    def read(self) -> Tokens:
        """The tokens that are read: the last one is predicted alone."""
        return self.context + self.continuation[:-1]


class PackedReader:
    """Scores pairs in packed sequences, and counts the tokens that it computes."""

    def __init__(self, model: BasedModel, most_tokens: int = PACKED_TOKENS) -> None:
        """most_tokens: of a packed sequence."""
        self.model, self.most_tokens, self.computed_tokens = model, most_tokens, 0

    def score(self, pairs: Sequence[Pair]) -> list[Score]:
        """The score of each pair, as if it were alone. None may read more than `most_tokens`."""
        found: dict[int, Score] = {}
        for indices in packed([len(pair.read) for pair in pairs], self.most_tokens):
            found |= zip(indices, self._score_sequence([pairs[index] for index in indices]), strict=True)
        return [found[index] for index in range(len(pairs))]

    @torch.no_grad()
    def _score_sequence(self, pairs: Sequence[Pair]) -> list[Score]:
        device = self.model.embedding.weight.device
        tokens = [token for pair in pairs for token in pair.read]
        ends = list(accumulate(len(pair.read) for pair in pairs))
        plan = whole_sequence(Documents((torch.tensor([0, *ends[:-1]]),)), len(tokens), device)
        self.computed_tokens += len(tokens)
        logits_LU = self.model(torch.tensor([tokens], device=device), plan)[:, 0]
        # The last tokens that a pair reads predict its continuation.
        asked = [
            place for pair, end in zip(pairs, ends, strict=True) for place in range(end - len(pair.continuation), end)
        ]
        targets_n = torch.tensor([token for pair in pairs for token in pair.continuation], device=device)
        logits_nU = logits_LU[torch.tensor(asked, device=device)]
        log_p_n, is_best_n = likelihoods(logits_nU, targets_n, self.model.config.model.vocab_size)
        sizes = [len(pair.continuation) for pair in pairs]
        parts = zip(log_p_n.cpu().split(sizes), is_best_n.cpu().split(sizes), strict=True)
        return [Score(log_p.sum().item(), bool(is_best.all())) for log_p, is_best in parts]


def packed(lengths: Sequence[int], most: int) -> list[list[int]]:
    """The documents of each sequence, by their indices: the longest go first, each into the first sequence of `most` tokens with room."""
    sequences: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = next((place for place, left in enumerate(room) if left >= lengths[index]), len(room))
        if place == len(room):
            sequences.append([])
            room.append(most)
        sequences[place].append(index)
        room[place] -= lengths[index]
    return sequences
