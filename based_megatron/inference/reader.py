"""Rows of tokens of any lengths, read into decoding states without padding.

Legend: B rows, L tokens of a piece, U vocabulary columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from based_megatron.model.states import ModelStates

if TYPE_CHECKING:
    from based_megatron.inference.engine import Engine

Tokens = tuple[int, ...]
SHARED_TOKENS = 16
"""Rows that start with so many equal tokens are read together up to where they differ."""


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
        self.prefix_tokens = engine.model.config.model.prefix_tokens
        self.device = engine.model.embedding.weight.device

    def read(self, rows: Sequence[Tokens], states: ModelStates | None = None) -> tuple[Tensor, ModelStates]:
        """Append rows of at least one token to the sequences of `states`, which is not changed; None starts new sequences.

        Returns: logits [B, U] of the last tokens, and the states.
        """
        order = longest_first(rows)
        ordered = [rows[row] for row in order]
        if states is None:
            logits_BU, states = self._begin(ordered)
        else:
            states = states.take(self.index(order))
            logits_BU = self._advance(ordered, states)
        back_B = self.index(inverse(order))
        return logits_BU.index_select(0, back_B), states.take(back_B)

    def read_shared(self, rows: Sequence[Tokens]) -> tuple[Tensor, ModelStates]:
        """`read` of new sequences, where neighbouring rows that start alike share the reading of their common start."""
        groups = shared_starts(rows)
        if len(groups) == len(rows) or min(group.tokens for group in groups) < self.prefix_tokens:
            return self.read(rows)
        starts = [rows[group.start][: group.tokens] for group in groups]
        order = longest_first(starts)
        _, states = self._begin([starts[start] for start in order])
        place = inverse(order)
        states = states.take(self.index([place[i] for i, group in enumerate(groups) for _ in range(group.rows)]))
        rests = [row[len(starts[i]) :] for i, group in enumerate(groups) for row in rows[group.start : group.end]]
        return self.read(rests, states)

    def _begin(self, rows: Sequence[Tokens]) -> tuple[Tensor, ModelStates]:
        """New sequences of rows, longest first. Returns: logits [B, U] of the rows that have tokens, and the states."""
        states = self.engine.model.zero_states(len(rows))
        if not self.prefix_tokens:
            return self._advance(rows, states), states
        logits = self._read_prefixes([row[: self.prefix_tokens] for row in rows], states)
        longer = sum(len(row) > self.prefix_tokens for row in rows)
        if longer:
            rests = [row[self.prefix_tokens :] for row in rows[:longer]]
            logits = torch.cat([self._advance(rests, states.rows(0, longer)), logits[longer:]])
        return logits, states

    def _read_prefixes(self, prefixes: Sequence[Tokens], states: ModelStates) -> Tensor:
        """Read what all tokens of a row see, longest first: each at once, with those of its length."""
        found, begin = [], 0
        for length, group in itertools.groupby(prefixes, key=len):
            rows = list(group)
            part = states.rows(begin, begin + len(rows))
            self.computed_tokens += len(rows) * length
            found.append(self.engine.prefill(self.tensor(rows, length), part)[0])
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
            logits_BU, _ = self.engine.prefill(self.tensor(parts, stage.tokens), active)
        states.is_start = False
        return logits_BU

    def tensor(self, rows: Sequence[Tokens], width: int, padding: int = 0) -> Tensor:
        """Rows of at most `width` tokens as [B, width], padded behind their ends."""
        return torch.tensor([row + (padding,) * (width - len(row)) for row in rows], device=self.device)

    def index(self, rows: Sequence[int]) -> Tensor:
        """Numbers of rows, [B], on the device of the model."""
        return torch.tensor(rows, device=self.device)


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


def longest_first(rows: Sequence[Tokens]) -> list[int]:
    """Indices of the rows by falling length; of equal ones, the first comes first."""
    return sorted(range(len(rows)), key=lambda row: -len(rows[row]))


def inverse(order: Sequence[int]) -> list[int]:
    """The place of each row in an order."""
    places = [0] * len(order)
    for place, row in enumerate(order):
        places[row] = place
    return places
