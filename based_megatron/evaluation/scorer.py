"""Log-likelihoods and greedy continuations of rows of tokens, in batches that data parallel ranks share.

Legend: B rows, L tokens, U vocabulary columns.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from based_megatron.checkpoint.ranks import Ranks
from based_megatron.convert.hf_files.modeling_based import BasedForCausalLM
from based_megatron.errors import ConfigError
from based_megatron.evaluation.likelihood import Score, likelihoods
from based_megatron.evaluation.packing import PACKED_TOKENS, PackedReader, Pair
from based_megatron.evaluation.ranks import cut_in_batches, deal
from based_megatron.evaluation.reader import ScoringReader
from based_megatron.inference.batching import Batcher, Request
from based_megatron.inference.engine import Engine
from based_megatron.inference.reader import SHARED_TOKENS, Tokens, shared_starts
from based_megatron.inference.sampling import Sampling
from based_megatron.model.mixers import layer_mixers

MOST_PACKED = 1.5
"""Questions are packed if that computes at most so many times the tokens that shared states need, which take in rows of different
lengths in many small passes: on a CPU both cost the same at about twice the tokens, on a GPU passes cost more."""
T = TypeVar("T")
Ended = Callable[[list[int]], bool]


@dataclass(frozen=True)
class Question:
    """A context and the continuations that are scored after it; neither is empty."""

    context: Tokens
    continuations: tuple[Tokens, ...]

    def tokens_alone(self) -> int:
        """Tokens that are read if each continuation is computed with a context of its own."""
        return sum(len(self.context) + len(continuation) - 1 for continuation in self.continuations)


@dataclass(frozen=True)
class Prompt:
    """A context to continue."""

    context: Tokens
    new_tokens: int
    """Tokens to generate at most."""
    ended: Ended
    """Whether the tokens generated so far are enough."""


class Scorer(ABC):
    """Scores and continues rows with one model; every rank of a job calls the same methods with the same rows."""

    def __init__(self, batch: int, ranks: Ranks, longest_tokens: int | None) -> None:
        """longest_tokens: rows may be no longer than this; None for a model whose state takes any length."""
        self.batch, self.ranks, self.longest_tokens = batch, ranks, longest_tokens
        self.alone_tokens = 0
        """Tokens that the requests have, shared ones counted each time."""
        self.seconds = 0.0
        """Wall time of all calls, the wait for other ranks included."""

    def log_likelihoods(self, questions: Sequence[Question]) -> list[list[Score]]:
        """Scores of every continuation of every question. Raises ConfigError for a row that is too long."""
        longest = [len(each.context) + max(map(len, each.continuations)) - 1 for each in questions]
        self._check_lengths(longest)
        self.alone_tokens += sum(each.tokens_alone() for each in questions)
        order = _neighbours([each.context for each in questions])
        weights = [len(questions[index].continuations) for index in order]
        batches = [[order[place] for place in batch] for batch in cut_in_batches(weights, self.batch)]
        found = self._deal(batches, lambda batch: self._score([questions[index] for index in batch]))
        return [found[index] for index in range(len(questions))]

    def continuations(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Greedy tokens after every prompt: at least up to where it has ended. Raises ConfigError for a row that is too long."""
        self._check_lengths([len(each.context) + each.new_tokens for each in prompts])
        self.alone_tokens += sum(len(each.context) for each in prompts)
        order = _neighbours([each.context for each in prompts])
        batches = [[order[place] for place in batch] for batch in cut_in_batches([1] * len(order), self.batch)]
        found = self._deal(batches, lambda batch: self._continue([prompts[index] for index in batch]))
        rows = [found[index] for index in range(len(prompts))]
        self.alone_tokens += sum(max(0, len(row) - 1) for row in rows)
        return rows

    def _deal(self, batches: Sequence[Sequence[int]], compute: Callable[[Sequence[int]], Sequence[T]]) -> dict[int, T]:
        start = time.perf_counter()
        found = deal(self.ranks, batches, compute)
        self.seconds += time.perf_counter() - start
        return found

    @property
    @abstractmethod
    def computed_tokens(self) -> int:
        """Tokens that this rank has computed."""

    @abstractmethod
    def _score(self, questions: Sequence[Question]) -> list[list[Score]]: ...

    @abstractmethod
    def _continue(self, prompts: Sequence[Prompt]) -> list[list[int]]: ...

    def _check_lengths(self, lengths: Sequence[int]) -> None:
        longest = max(lengths, default=0)
        if self.longest_tokens is not None and longest > self.longest_tokens:
            raise ConfigError(
                f"a row of {longest} tokens is longer than the {self.longest_tokens} positions that this model's full attention was "
                f"trained with: cut contexts with --context, or leave the task out of --tasks"
            )


class StateScorer(Scorer):
    """A model with states of constant size: contexts are read once, and their states copied for each continuation.

    Questions that have little to share are scored as documents of packed sequences.
    """

    def __init__(self, engine: Engine, batch: int, ranks: Ranks) -> None:
        super().__init__(batch, ranks, longest_tokens=None)
        self.engine, self.reader = engine, ScoringReader(engine)
        model = engine.model.config.model
        self.packed_reader = PackedReader(engine.model)
        self._packs = not model.prefix_tokens and all(mixer.isolates for mixer in layer_mixers(model))
        self._decoded_tokens = 0

    @property
    def computed_tokens(self) -> int:
        return self.reader.computed_tokens + self.packed_reader.computed_tokens + self._decoded_tokens

    def _score(self, questions: Sequence[Question]) -> list[list[Score]]:
        groups = shared_starts([each.context for each in questions]) if self._packs else []
        alone = [
            place
            for group in groups
            if is_packed(questions[group.start : group.end], group.tokens)
            for place in range(group.start, group.end)
        ]
        together = sorted(set(range(len(questions))) - set(alone))
        pairs = [Pair(questions[i].context, each) for i in alone for each in questions[i].continuations]
        scores = iter(self.packed_reader.score(pairs))
        found = {i: [next(scores) for _ in questions[i].continuations] for i in alone}
        if together:
            found |= zip(together, self._score_states([questions[i] for i in together]), strict=True)
        return [found[i] for i in range(len(questions))]

    def _score_states(self, questions: Sequence[Question]) -> list[list[Score]]:
        logits_BU, states = self.reader.read_shared([each.context for each in questions])
        rows = [row for each in questions for row in each.continuations]
        owners = [owner for owner, each in enumerate(questions) for _ in each.continuations]
        scores: list[Score] = []
        for start in range(0, len(rows), self.batch):
            part_B = torch.tensor(owners[start : start + self.batch], device=logits_BU.device)
            part = rows[start : start + self.batch]
            scores += self.reader.score(part, logits_BU.index_select(0, part_B), states.take(part_B))
        places = iter(scores)
        return [[next(places) for _ in each.continuations] for each in questions]

    def _continue(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in prompts]

        def ending(place: int) -> Callable[[int], bool]:
            def ended(token: int) -> bool:
                rows[place].append(token)
                return prompts[place].ended(rows[place])

            return ended

        loop = self.engine.loop(len(prompts))
        before = loop.reader.computed_tokens
        batcher = Batcher(loop)
        requests = [
            Request(each.context, Sampling(max_new_tokens=each.new_tokens, temperature=0), ending(place))
            for place, each in enumerate(prompts)
        ]
        for _ in batcher.run(requests):
            pass  # `ended` gets every token
        self._decoded_tokens += loop.reader.computed_tokens - before + batcher.speed.decoded_tokens
        return rows


class AttentionScorer(Scorer):
    """A model with full attention, which has no such state: whole rows through the Hugging Face model and its cache."""

    def __init__(self, model: BasedForCausalLM, batch: int, ranks: Ranks, trained_tokens: int | None) -> None:
        """trained_tokens: length of the training sequences, where it is known."""
        super().__init__(batch, ranks, trained_tokens)
        self.model, self._computed_tokens = model, 0

    @property
    def computed_tokens(self) -> int:
        return self._computed_tokens

    @torch.no_grad()
    def _score(self, questions: Sequence[Question]) -> list[list[Score]]:
        pairs = [(each.context, continuation) for each in questions for continuation in each.continuations]
        scores: list[Score] = []
        for start in range(0, len(pairs), self.batch):
            scores += self._score_rows(pairs[start : start + self.batch])
        places = iter(scores)
        return [[next(places) for _ in each.continuations] for each in questions]

    def _score_rows(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Score]:
        rows = [context + continuation[:-1] for context, continuation in pairs]
        width = max(map(len, rows))
        self._computed_tokens += width * len(rows)
        # Padding on the right: a causal model's tokens do not see it.
        ids_BL = torch.tensor([row + (0,) * (width - len(row)) for row in rows], device=self.model.device)
        logits_BLU = self.model(ids_BL, use_cache=False).logits
        scores = []
        for logits_LU, (context, continuation) in zip(logits_BLU, pairs, strict=True):
            targets_L = torch.tensor(continuation, device=logits_LU.device)
            asked_LU = logits_LU[len(context) - 1 : len(context) - 1 + len(continuation)]
            log_p_L, is_best_L = likelihoods(asked_LU, targets_L, self.model.config.tokenizer_vocab_size)
            scores.append(Score(log_p_L.sum().item(), bool(is_best_L.all())))
        return scores

    def _continue(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        width = max(len(each.context) for each in prompts)
        ids_BL = torch.tensor([(0,) * (width - len(each.context)) + each.context for each in prompts])
        pads = [width - len(each.context) for each in prompts]
        mask_BL = torch.tensor([[0] * count + [1] * (width - count) for count in pads])
        most = max(each.new_tokens for each in prompts)
        output: Any = self.model.generate(  # type: ignore[misc]
            input_ids=ids_BL.to(self.model.device),
            attention_mask=mask_BL.to(self.model.device),
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([_AllEnded(prompts, width)]),
        )
        rows = output[:, width:].tolist()
        self._computed_tokens += ids_BL.numel() + sum(len(row) - 1 for row in rows)
        return [row[: each.new_tokens] for row, each in zip(rows, prompts, strict=True)]


class _AllEnded(StoppingCriteria):
    """Stops a batch when every prompt has ended."""

    def __init__(self, prompts: Sequence[Prompt], width: int) -> None:
        self.prompts, self.width = prompts, width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        rows = zip(input_ids[:, self.width :].tolist(), self.prompts, strict=True)
        ended = all(len(row) >= each.new_tokens or each.ended(row) for row, each in rows)
        return torch.full((len(input_ids),), ended, device=input_ids.device)


def is_packed(questions: Sequence[Question], shared_tokens: int) -> bool:
    """Whether questions whose contexts share their first tokens are packed: where the sharing of states would save little.

    One that is too long for a packed sequence is not.
    """
    alone = sum(each.tokens_alone() for each in questions)
    contexts = shared_tokens + sum(len(each.context) - shared_tokens for each in questions)
    shared = contexts + sum(len(row) - 1 for each in questions for row in each.continuations)
    longest = max(len(each.context) + max(map(len, each.continuations)) - 1 for each in questions)
    return longest <= PACKED_TOKENS and alone <= MOST_PACKED * shared


def _neighbours(contexts: Sequence[Tokens]) -> list[int]:
    """Indices in an order where contexts that start alike are neighbours, and the longest come first."""
    longest: dict[Tokens, int] = {}
    for context in contexts:
        start = context[:SHARED_TOKENS]
        longest[start] = max(longest.get(start, 0), len(context))
    keys = [(-longest[context[:SHARED_TOKENS]], context[:SHARED_TOKENS], context) for context in contexts]
    return sorted(range(len(contexts)), key=lambda index: keys[index])
