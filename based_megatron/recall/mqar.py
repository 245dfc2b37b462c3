"""Multi-query associative recall (MQAR): keys with their values, then the keys again, each of which asks for its value.

    k1 v1 k2 v2 ... kK vK   k2 x x x k1 x k3 x ...        the answer at the second k2 is v2; x is any token

The distribution is that of Zoology (arXiv 2312.04927, section 4) as the Based paper uses it (arXiv 2402.18668, Figure 2): keys from
the lower half of the vocabulary, values from the upper half, all of an example different; a key comes back at an even distance from
the end of the pairs, slot g with probability proportional to (g + 1)^(power - 1), and no two keys in the same slot.

Legend: B examples, T tokens, K pairs of a key and a value.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from based_megatron.errors import ConfigError

PIECE_EXAMPLES = 4096
"""Examples that are drawn at once: each needs a random number for every key that it could have."""
NO_LABEL = -100


@dataclass(frozen=True)
class Segment:
    """Examples of one length and one number of pairs."""

    length_tokens: int
    pairs: int
    examples: int

    @property
    def name(self) -> str:
        """Length and pairs, as tables and results name a segment."""
        return f"{self.length_tokens}/{self.pairs}"


@dataclass(frozen=True)
class Task:
    """The examples that a model is trained on, and those that it is tested on."""

    vocab_size: int
    train: tuple[Segment, ...]
    test: tuple[Segment, ...]
    power: float = 0.01
    """Exponent of the power law of slots: near 0 most keys come back soon."""
    random_fillers: bool = True
    """Fill other places with any token, which may be a live key; if not, with token 0."""
    fresh: bool = False
    """Draw new training examples in every epoch, instead of the same ones again."""
    seed: int = 123

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest examples."""
        return max(segment.length_tokens for segment in (*self.train, *self.test))

    def check(self) -> None:
        """Raise ConfigError if there is no such example."""
        for segment in (*self.train, *self.test):
            T, K = segment.length_tokens, segment.pairs
            if T % 2 or T < 2 or K < 1:
                raise ConfigError(
                    f"MQAR segment {segment.name}: {T} tokens with {K} pairs, but examples take an even number of tokens, at least 2, and "
                    f"at least one pair; change the segment"
                )
            if 4 * K > T:
                raise ConfigError(
                    f"MQAR segment {segment.name}: {K} pairs and their queries need 4 x {K} = {4 * K} tokens, there are {T}; change the "
                    f"segment"
                )
            if self.vocab_size <= T or self.vocab_size // 2 - 1 < K:
                raise ConfigError(
                    f"MQAR segment {segment.name}: a vocabulary of {self.vocab_size} is too small: it must exceed {T} tokens and have "
                    f"{K} keys below its middle; change the segment or the vocabulary"
                )


FIGURE = Task(
    vocab_size=8192,
    train=tuple(
        Segment(*sizes)
        for sizes in ((64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000))
    ),
    test=tuple(
        Segment(*sizes, 1000) for sizes in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
    ),
)
"""The task of Figure 2 of the Based paper. The two longest tests are longer than anything in training."""
TINY = Task(
    vocab_size=64,
    train=tuple(Segment(32, pairs, 6_400) for pairs in (2, 4, 8)),
    test=tuple(Segment(32, pairs, 500) for pairs in (2, 4, 8)),
)
"""A task that two CPU cores learn in seconds, in which systems come out in the published order."""


@dataclass(frozen=True)
class Examples:
    """Examples of one segment."""

    tokens_BT: Tensor
    """Inputs, int64."""
    positions_BK: Tensor
    """Positions of the queries, in the order of the pairs."""
    answers_BK: Tensor
    """The value that is asked for at each of them."""

    def __len__(self) -> int:
        return len(self.tokens_BT)

    def labels(self) -> Tensor:
        """Labels [B, T]: the answer at a query, NO_LABEL elsewhere."""
        return torch.full_like(self.tokens_BT, NO_LABEL).scatter_(1, self.positions_BK, self.answers_BK)

    def rows(self, rows: Tensor | slice) -> "Examples":
        """Some of them."""
        return Examples(self.tokens_BT[rows], self.positions_BK[rows], self.answers_BK[rows])


def draw(task: Task, segment: Segment, examples: int, generator: torch.Generator) -> Examples:
    """New examples, on the device of the generator."""
    pieces = [
        _draw_piece(task, segment, min(PIECE_EXAMPLES, examples - first), generator)
        for first in range(0, examples, PIECE_EXAMPLES)
    ]
    fields = zip(*((p.tokens_BT, p.positions_BK, p.answers_BK) for p in pieces), strict=True)
    return Examples(*(torch.cat(parts) for parts in fields))


def _draw_piece(task: Task, segment: Segment, examples: int, generator: torch.Generator) -> Examples:
    T, K, device = segment.length_tokens, segment.pairs, generator.device
    middle = task.vocab_size // 2
    keys_BK = 1 + _distinct(torch.ones(middle - 1, device=device), examples, K, generator)
    values_BK = middle + _distinct(torch.ones(task.vocab_size - middle, device=device), examples, K, generator)
    slots = torch.arange(1, (T - 2 * K) // 2 + 1, device=device, dtype=torch.float32)
    positions_BK = 2 * K + 2 * _distinct(slots ** (task.power - 1), examples, K, generator)
    tokens_BT = torch.zeros(examples, T, dtype=torch.int64, device=device)
    tokens_BT[:, 0 : 2 * K : 2] = keys_BK
    tokens_BT[:, 1 : 2 * K : 2] = values_BK
    tokens_BT.scatter_(1, positions_BK, keys_BK)
    if task.random_fillers:
        fillers_BT = torch.randint(0, task.vocab_size, (examples, T), generator=generator, device=device)
        tokens_BT = torch.where(tokens_BT == 0, fillers_BT, tokens_BT)
    return Examples(tokens_BT, positions_BK, values_BK)


def _distinct(weights: Tensor, rows: int, count: int, generator: torch.Generator) -> Tensor:
    """Different indices drawn one after another, each with the probability of its weight among those that are left: [rows, count].

    An index whose clock rings after Exp(weight) is the k-th to ring with just this probability.
    """
    clocks = torch.empty(rows, len(weights), device=weights.device).exponential_(generator=generator)
    return (weights / clocks).topk(count, dim=1).indices


class Data:
    """The examples of a task on one device."""

    def __init__(self, task: Task, device: torch.device) -> None:
        """Draws the sets that are fixed. Raises ConfigError for a task that has no examples."""
        task.check()
        self.task, self.device = task, device
        self.test = tuple(self._set("test", i, segment) for i, segment in enumerate(task.test))
        self._train = (
            () if task.fresh else tuple(self._set("train", i, segment) for i, segment in enumerate(task.train))
        )

    def _set(self, split: str, index: int, segment: Segment) -> Examples:
        return draw(self.task, segment, segment.examples, self._generator(split, index))

    def _generator(self, split: str, *numbers: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(stream_seed(self.task.seed, split, *numbers))

    def batches(self, epoch: int, batch_examples: int, seed: int, *, ordered: bool = False) -> Iterator[Examples]:
        """The batches of one epoch, each of one segment.

        ordered: segment after segment, examples in the order of their set; else all is shuffled, by the seed and the epoch.
        """
        order = torch.Generator().manual_seed(zlib.crc32(f"{seed} order {epoch}".encode()))
        sizes = [segment.examples for segment in self.task.train]
        # On the device as a whole: a copy for each batch would wait for the step before it.
        rows = [(torch.arange(n) if ordered else torch.randperm(n, generator=order)).to(self.device) for n in sizes]
        cuts = [(i, part) for i, all_rows in enumerate(rows) for part in all_rows.split(batch_examples)]
        places = range(len(cuts)) if ordered else torch.randperm(len(cuts), generator=order).tolist()
        for place in places:
            index, part = cuts[place]
            if self.task.fresh:
                generator = self._generator("train", index, seed, epoch, place)
                yield draw(self.task, self.task.train[index], len(part), generator)
            else:
                yield self._train[index].rows(part)

    def batches_per_epoch(self, batch_examples: int) -> int:
        """Number of batches of an epoch."""
        return sum(-(-segment.examples // batch_examples) for segment in self.task.train)


def stream_seed(seed: int, split: str, *numbers: int) -> int:
    """The seed of one stream of examples: below 2^31 for training, from there to 2^32 for tests, so that they never share one."""
    hashed = zlib.crc32(f"{seed} {split} {numbers}".encode()) >> 1
    return hashed + (1 << 31 if split == "test" else 0)
