"""Rows of tokens of any lengths, read into decoding states without padding.

Legend: B rows, L tokens of a piece, U vocabulary columns.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from based_megatron.evaluation.likelihood import Score, Tokens, likelihoods
from based_megatron.inference.engine import Engine
from based_megatron.model.states import ModelStates

SHARED_TOKENS = 16
"""Rows that start with so many equal tokens are read together up to where they differ."""
PIECE_LOGITS = 2048
"""Tokens whose logits are held at once."""
PIECE_TOKENS = 64
"""Tokens of each continuation that are computed at once: the most by which one is padded."""
NO_TOKEN = -1
"""The target behind the end of a continuation."""


@dataclass(frozen=True)
class Stage:
    """Tokens that rows take in at once: those of the `rows` longest ones, which have as many left."""

    rows: int
    left: int
    """Tokens that each of them has not read yet."""
    tokens: int
    """Tokens of this stage."""


def stages(lengths: Sequence[int]) -> Iterator[Stage]:
    """Stages that read rows of these lengths, longest first: shorter rows join when the others have as much left.

    No row is padded, all end together, and every row is in as few stages as the lengths allow.
    """
    rows, left = 0, lengths[0]
    while left:
        while rows < len(lengths) and lengths[rows] == left:
            rows += 1
        shorter = lengths[rows] if rows < len(lengths) else 0
        yield Stage(rows, left, left - shorter)
        left = shorter


class Reader:
    """Reads rows into the states of a model, and counts the tokens that it computes."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.computed_tokens = engine, 0
        self._prefix_tokens = engine.model.config.model.prefix_tokens
        self._device = engine.model.embedding.weight.device

    def read(self, rows: Sequence[Tokens], states: ModelStates | None = None) -> tuple[Tensor, ModelStates]:
        """Append rows of at least one token to the sequences of `states`, which is not changed; None starts new sequences.

        Returns: logits [B, U] of the last tokens, and the states.
        """
        order = _longest_first(rows)
        ordered = [rows[row] for row in order]
        if states is None:
            logits_BU, states = self._begin(ordered)
        else:
            states = states.take(self._index(order))
            logits_BU = self._advance(ordered, states)
        back_B = self._index(_inverse(order))
        return logits_BU.index_select(0, back_B), states.take(back_B)

    def read_shared(self, rows: Sequence[Tokens]) -> tuple[Tensor, ModelStates]:
        """`read` of new sequences, where neighbouring rows that start alike share the reading of their common start."""
        groups = shared_starts(rows)
        if len(groups) == len(rows) or min(group.tokens for group in groups) < self._prefix_tokens:
            return self.read(rows)
        starts = [rows[group.start][: group.tokens] for group in groups]
        order = _longest_first(starts)
        _, states = self._begin([starts[start] for start in order])
        place = _inverse(order)
        states = states.take(self._index([place[i] for i, group in enumerate(groups) for _ in range(group.rows)]))
        rests = [row[len(starts[i]) :] for i, group in enumerate(groups) for row in rows[group.start : group.end]]
        return self.read(rests, states)

    def _begin(self, rows: Sequence[Tokens]) -> tuple[Tensor, ModelStates]:
        """New sequences of rows, longest first. Returns: logits [B, U] of the rows that have tokens, and the states."""
        states = self.engine.model.zero_states(len(rows))
        if not self._prefix_tokens:
            return self._advance(rows, states), states
        logits = self._read_prefixes([row[: self._prefix_tokens] for row in rows], states)
        longer = sum(len(row) > self._prefix_tokens for row in rows)
        if longer:
            rests = [row[self._prefix_tokens :] for row in rows[:longer]]
            logits = torch.cat([self._advance(rests, states.rows(0, longer)), logits[longer:]])
        return logits, states

    def _read_prefixes(self, prefixes: Sequence[Tokens], states: ModelStates) -> Tensor:
        """Read what all tokens of a row see, longest first: each at once, with those of its length."""
        found, begin = [], 0
        for length, group in itertools.groupby(prefixes, key=len):
            rows = list(group)
            part = states.rows(begin, begin + len(rows))
            self.computed_tokens += len(rows) * length
            found.append(self.engine.prefill(self._tensor(rows, length), part)[0])
            begin += len(rows)
        states.is_start = False
        return torch.cat(found)

    def _advance(self, rows: Sequence[Tokens], states: ModelStates) -> Tensor:
        """Append rows, longest first, and update the states in place. Returns logits [B, U] of the rows that have tokens."""
        is_start = states.is_start
        for stage in stages([len(row) for row in rows]):
            active = states.rows(0, stage.rows)
            active.is_start, is_start = is_start, False
            starts = [len(row) - stage.left for row in rows[: stage.rows]]
            parts = [row[start : start + stage.tokens] for row, start in zip(rows, starts, strict=False)]
            self.computed_tokens += stage.rows * stage.tokens
            logits_BU, _ = self.engine.prefill(self._tensor(parts, stage.tokens), active)
        states.is_start = False
        return logits_BU

    @torch.no_grad()
    def score(self, rows: Sequence[Tokens], logits_BU: Tensor, states: ModelStates) -> list[Score]:
        """Scores of rows as continuations of the sequences of `states`, whose last tokens have these logits.

        The last token of a row is predicted, not read. `states` is not changed.
        """
        order = _longest_first(rows)
        rows, order_B = [rows[row] for row in order], self._index(order)
        logits_BU, states = logits_BU.index_select(0, order_B), states.take(order_B)
        sums_B = torch.zeros(len(rows), dtype=torch.float64, device=self._device)
        greedy_B = torch.ones(len(rows), dtype=torch.bool, device=self._device)
        vocab_size = self.engine.model.config.model.vocab_size

        def add(logits_BLU: Tensor, targets_BL: Tensor) -> None:
            absent_BL = targets_BL == NO_TOKEN
            log_p_BL, is_best_BL = likelihoods(logits_BLU, targets_BL.clamp_min(0), vocab_size)
            sums_B[: len(targets_BL)] += log_p_BL.masked_fill(absent_BL, 0).sum(-1)
            greedy_B[: len(targets_BL)] &= (is_best_BL | absent_BL).all(-1)

        add(logits_BU[:, None], self._tensor([row[:1] for row in rows], 1))
        lengths = [len(row) - 1 for row in rows]
        step = max(1, min(PIECE_TOKENS, PIECE_LOGITS // len(rows)))
        for start in range(0, lengths[0], step):
            active = sum(length > start for length in lengths)
            width = min(step, lengths[0] - start)
            # A row is padded in its last piece, after its own tokens: what its state is then, nobody reads.
            tokens_BL = self._tensor([row[start : min(start + width, len(row) - 1)] for row in rows[:active]], width)
            targets_BL = self._tensor([row[start + 1 : start + 1 + width] for row in rows[:active]], width, NO_TOKEN)
            self.computed_tokens += tokens_BL.numel()
            add(self.engine.model.decode(tokens_BL, states.rows(0, active), every_token=True), targets_BL)
        return [Score(sums_B[place].item(), bool(greedy_B[place])) for place in _inverse(order)]

    def _tensor(self, rows: Sequence[Tokens], width: int, padding: int = 0) -> Tensor:
        return torch.tensor([row + (padding,) * (width - len(row)) for row in rows], device=self._device)

    def _index(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(rows, device=self._device)


@dataclass(frozen=True)
class Group:
    """Neighbouring rows that share their first tokens; the start of a row alone is all of it but its last token."""

    start: int
    rows: int
    tokens: int

    @property
    def end(self) -> int:
        return self.start + self.rows


def shared_starts(rows: Sequence[Tokens]) -> list[Group]:
    """The groups of rows, in order. A shared start leaves every row at least one token."""
    groups: list[Group] = []
    start = 0
    while start < len(rows):
        tokens, end = len(rows[start]) - 1, start + 1
        while end < len(rows):
            common = min(tokens, common_length(rows[start], rows[end]), len(rows[end]) - 1)
            # A row that has little of a long common start begins a group of its own.
            if common < (SHARED_TOKENS if end == start + 1 else max(SHARED_TOKENS, tokens // 2)):
                break
            tokens, end = common, end + 1
        groups.append(Group(start, end - start, tokens))
        start = end
    return groups


def common_length(first: Tokens, second: Tokens) -> int:
    """Number of equal tokens at the start of both."""
    different = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(different, min(len(first), len(second)))


def _longest_first(rows: Sequence[Tokens]) -> list[int]:
    return sorted(range(len(rows)), key=lambda row: -len(rows[row]))


def _inverse(order: Sequence[int]) -> list[int]:
    places = [0] * len(order)
    for place, row in enumerate(order):
        places[row] = place
    return places
