"""Synthetic sequences of random ids whose loss tells how well a model recalls: no text is needed, so every layout can read them.

    induction/64    64 ids, and the same again: all of the second copy but its first id can be told from the first
    mqar/8          8 pairs of a key and a value, then each key once more, between random ids: its value is asked for (Zoology's
                    multi-query associative recall, with its distances)

Legend: S tokens of a whole sequence.
"""

import math
from dataclasses import dataclass

import numpy as np

from based_megatron.data.slices import NO_SLICE, Slices

INDUCTION_IDS = (64, 256, 512)
MQAR_PAIRS = (8, 32, 128)
MQAR_TOKENS_PER_PAIR = 8
GAP_POWER = 0.01
"""A gap of g slots between the pairs and a query has a probability in proportion to (g + 1)^(GAP_POWER - 1)."""
SEED = 1212


@dataclass(frozen=True)
class Probe:
    """One synthetic task."""

    task: str
    """induction or mqar."""
    size: int
    """Ids of a copy, or pairs."""

    @property
    def name(self) -> str:
        return f"{self.task}/{self.size}"

    @property
    def tokens(self) -> int:
        """Tokens of one document."""
        return self.size * (2 if self.task == "induction" else MQAR_TOKENS_PER_PAIR)

    def chance(self, pool: int) -> float:
        """Loss in nats of one who knows which ids there are, and recalls none."""
        return math.log(pool if self.task == "induction" else pool // 2)

    def make(self, pool: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(ids of a document, positions whose next id is asked for)."""
        if self.task == "induction":
            ids = random.choice(pool, self.size, replace=False)
            return np.concatenate([ids, ids]), np.arange(self.size, 2 * self.size - 1)
        keys, values = pool[: len(pool) // 2], pool[len(pool) // 2 :]
        chosen, answers = (random.choice(half, self.size, replace=False) for half in (keys, values))
        # Fillers are no keys: a key with two followers would have two answers.
        tokens = random.choice(values, self.tokens)
        tokens[: 2 * self.size] = np.stack([chosen, answers], 1).ravel()
        slots = (self.tokens - 2 * self.size) // 2
        weights = (np.arange(slots) + 1.0) ** (GAP_POWER - 1)
        gaps = random.choice(slots, self.size, replace=False, p=weights / weights.sum())
        queries = 2 * self.size + 2 * gaps
        tokens[queries], tokens[queries + 1] = chosen, answers
        return tokens, np.sort(queries)


class ProbeSequences:
    """Sequences of probes, to be read as those of a split are. Each has one kind of probe, as many documents as fit."""

    def __init__(self, vocab_size: int, sequence_length_tokens: int, count: int) -> None:
        """count: sequences, shared out evenly to the probes that fit; none if none does."""
        # Neither the signs at the beginning of a vocabulary nor the rarest ids at its end.
        self._pool = np.arange(vocab_size // 4, vocab_size - vocab_size // 4)
        self._length_tokens = sequence_length_tokens
        every = [Probe("induction", r) for r in INDUCTION_IDS] + [Probe("mqar", pairs) for pairs in MQAR_PAIRS]
        fitting = [probe for probe in every if self._fits(probe)]
        self.probes = tuple(fitting[:count])
        self._count = count if fitting else 0

    def _fits(self, probe: Probe) -> bool:
        ids = probe.size if probe.task == "induction" else 2 * probe.size + 1
        return probe.tokens <= self._length_tokens and ids <= len(self._pool)

    def __len__(self) -> int:
        return self._count

    @property
    def chances(self) -> dict[str, float]:
        """Loss of each probe, by name, without recall."""
        return {probe.name: probe.chance(len(self._pool)) for probe in self.probes}

    def tokens(self, sequence: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Ids of a window of S + 1 tokens, or of a part of it."""
        return self._made(sequence)[0][begin:end]

    def document_starts(self, sequence: int) -> np.ndarray:
        """Places in the window at which documents begin, ascending from 0."""
        return np.arange(0, self._length_tokens + 1, self._probe(sequence).tokens)

    def slices(self, sequence: int, slices: Slices) -> np.ndarray:
        """uint8 [S]: the probe's slice where an id is asked for, NO_SLICE elsewhere."""
        ids_S = np.full(self._length_tokens, NO_SLICE, np.uint8)
        ids_S[self._made(sequence)[1]] = slices.of_probe(self._probe(sequence).name)
        return ids_S

    def _probe(self, sequence: int) -> Probe:
        return self.probes[sequence % len(self.probes)]

    def _made(self, sequence: int) -> tuple[np.ndarray, np.ndarray]:
        """(S + 1 ids, all positions whose next id is asked for); what is left of the window is random."""
        probe, random = self._probe(sequence), np.random.default_rng([SEED, sequence])
        tokens = random.choice(self._pool, self._length_tokens + 1)
        asked = []
        for start in range(0, self._length_tokens - probe.tokens + 1, probe.tokens):
            ids, places = probe.make(self._pool, random)
            tokens[start : start + probe.tokens] = ids
            asked.append(start + places)
        return tokens, np.concatenate(asked)
