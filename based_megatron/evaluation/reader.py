"""Scores of continuations, read into the decoding states after their contexts.

Legend: B rows, L tokens of a piece, U vocabulary columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from based_megatron.evaluation.likelihood import Score, likelihoods
from based_megatron.inference.reader import Reader, Tokens, inverse, longest_first
from based_megatron.model.states import ModelStates

PIECE_LOGITS = 2048
"""Tokens whose logits are held at once."""
PIECE_TOKENS = 64
"""Tokens of each continuation that are computed at once: the most by which one is padded."""
NO_TOKEN = -1
"""The target behind the end of a continuation."""


class ScoringReader(Reader):
    """Reads rows into the states of a model, and scores what may follow them."""

    @torch.no_grad()
    def score(self, rows: Sequence[Tokens], logits_BU: Tensor, states: ModelStates) -> list[Score]:
        """Scores of rows as continuations of the sequences of `states`, whose last tokens have these logits.

        The last token of a row is predicted, not read. `states` is not changed.
        """
        order = longest_first(rows)
        rows, order_B = [rows[row] for row in order], self.index(order)
        logits_BU, states = logits_BU.index_select(0, order_B), states.take(order_B)
        sums_B = torch.zeros(len(rows), dtype=torch.float64, device=self.device)
        greedy_B = torch.ones(len(rows), dtype=torch.bool, device=self.device)
        vocab_size = self.engine.model.config.model.vocab_size

        def add(logits_BLU: Tensor, targets_BL: Tensor) -> None:
            absent_BL = targets_BL == NO_TOKEN
            log_p_BL, is_best_BL = likelihoods(logits_BLU, targets_BL.clamp_min(0), vocab_size)
            sums_B[: len(targets_BL)] += log_p_BL.masked_fill(absent_BL, 0).sum(-1)
            greedy_B[: len(targets_BL)] &= (is_best_BL | absent_BL).all(-1)

        add(logits_BU[:, None], self.tensor([row[:1] for row in rows], 1))
        lengths = [len(row) - 1 for row in rows]
        step = max(1, min(PIECE_TOKENS, PIECE_LOGITS // len(rows)))
        for start in range(0, lengths[0], step):
            active = sum(length > start for length in lengths)
            width = min(step, lengths[0] - start)
            # A row is padded in its last piece, after its own tokens: what its state is then, nobody reads.
            tokens_BL = self.tensor([row[start : min(start + width, len(row) - 1)] for row in rows[:active]], width)
            targets_BL = self.tensor([row[start + 1 : start + 1 + width] for row in rows[:active]], width, NO_TOKEN)
            self.computed_tokens += tokens_BL.numel()
            add(self.engine.model.decode(tokens_BL, states.rows(0, active), every_token=True), targets_BL)
        return [Score(sums_B[place].item(), bool(greedy_B[place])) for place in inverse(order)]
