"""The corpora of a run as one endless, shuffled, weighted stream of sequences."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from based_megatron.config.schema import DataConfig, SourceConfig
from based_megatron.config.weights import weights_of
from based_megatron.data.fingerprints import corpora_text
from based_megatron.data.manifest import HASHED_VERSION
from based_megatron.data.mixture import split_counts
from based_megatron.data.open_shards import OPEN_SHARDS, OpenShards
from based_megatron.data.order import number_of, shuffled_together
from based_megatron.data.phases import Phases
from based_megatron.data.reader import SequenceReader
from based_megatron.data.remote import open_corpus
from based_megatron.errors import ConfigError, DataError
from based_megatron.monitor.words import human


@dataclass(frozen=True)
class PlannedSource:
    """What a run reads of a source."""

    name: str
    tokens: int
    epochs: float
    """Passes over its training split."""
    used_up_tokens: int | None
    """Tokens of the run after which `max_epochs` leaves nothing of it; None if that is not within the run."""

    def __str__(self) -> str:
        end = "" if self.used_up_tokens is None else f", used up after {human(self.used_up_tokens)} tokens of the run"
        return f"{self.name}: {human(self.tokens)} tokens, {self.epochs:.3g} epochs{end}"


class Sources:
    """Opens the corpora of a DataConfig and says which sequence of which one has a given number."""

    def __init__(self, data: DataConfig, streams: int = 1, share: tuple[int, int] = (0, 1)):
        """streams: rows of a global batch; with `data.carry_state` each reads a part of the corpus in order.

        share: (number, of how many) of the parts of the shards whose sizes this process looks at; other ranks look at the others.
        Raises DataError for a corpus that is damaged, too small, or made with another tokenizer than the first.
        """
        if bool(data.path) == bool(data.sources):
            raise ConfigError("give one of data.path and data.sources")
        self._sources = data.sources or (SourceConfig(path=data.path),)
        self._data, self._streams = data, streams
        self.manifests = [open_corpus(source.path, data, share) for source in self._sources]
        self._check_different()
        for manifest in self.manifests[1:]:
            if manifest.tokenizer_xxh3 != self.manifests[0].tokenizer_xxh3:
                raise DataError(
                    f"{manifest.place} and {self.manifests[0].place} were made with different tokenizers: "
                    f"prepare both with the same --tokenizer, or take one out of data.sources"
                )
        length, shards = data.sequence_length_tokens, OpenShards(OPEN_SHARDS)
        self.train = [
            SequenceReader(manifest, "train", length, joined=data.cross_blocks or data.carry_state, shards=shards)
            for manifest in self.manifests
        ]
        self.validation = [
            SequenceReader(manifest, "validation", length, joined=data.cross_blocks, shards=shards)
            for manifest in self.manifests
        ]
        for reader in self.train:
            if not len(reader):
                raise DataError(
                    f"the training split of {reader.manifest.place} ({reader.manifest.splits['train'].tokens} tokens) "
                    f"does not hold one sequence: lower data.sequence_length_tokens {data.sequence_length_tokens} "
                    f"or {'prepare more text' if reader.joined else 'set data.cross_blocks=true'}"
                )
        if data.carry_state and len(self.train[0]) < streams:
            raise DataError(
                f"the training split of {self.manifests[0].place} has {len(self.train[0])} sequences, but with data.carry_state each of "
                f"{streams} rows reads its own: lower train.global_batch_sequences or data.sequence_length_tokens"
            )
        changes = [(-(-entry.tokens // length), entry.weights) for entry in weights_of(data)]
        self._phases = Phases(changes, [self._limit(place) for place in range(len(self._sources))])

    def _limit(self, place: int) -> int | None:
        """The most sequences that a source gives. Raises ConfigError if it is none."""
        epochs, size = self._sources[place].max_epochs, len(self.train[place])
        if epochs and epochs * size < 1:
            raise ConfigError(
                f"data.sources[{place}].max_epochs {epochs} of {size} sequences is none; raise it, or leave the source out"
            )
        return math.floor(epochs * size) if epochs else None

    @property
    def fingerprint(self) -> str:
        """A string of everything that decides which sequence a number means: corpora, weights, order and length."""
        corpora = corpora_text([manifest.fingerprint for manifest in self.manifests], self._phases.shares)
        # Without a word on blocks it is the order of before there was a choice.
        shuffle = f"seed={self._data.seed}" + ("/cross_blocks" if self._data.cross_blocks else "")
        order = "carried" if self._data.carry_state else shuffle
        return f"{corpora}/{order}/sequence_length_tokens={self._data.sequence_length_tokens}"

    @property
    def warnings(self) -> list[str]:
        """Lines on what is not wrong but could be better."""
        old = [manifest.place for manifest in self.manifests if manifest.version < HASHED_VERSION]
        return [
            f"{', '.join(old)}: written by an older `based prep`, and checked by whole samples, each of which is read once"
        ] * bool(old)

    @cached_property
    def names(self) -> list[str]:
        """A name for each source of a mixture: its folder's, or its path where two folders have the same name."""
        paths = [Path(source.path) for source in self._sources]
        last = [path.name for path in paths]
        return [str(path) if last.count(path.name) > 1 else path.name for path in paths]

    @property
    def shares(self) -> np.ndarray:
        """Part of the sequences that each corpus gives, as the first weights say; they add up to 1."""
        weights = np.array([source.weight for source in self._sources], np.float64)
        return weights / weights.sum()

    @property
    def tokens_read(self) -> int:
        """Tokens of the training splits that sequences have as inputs, each of them once an epoch."""
        sequences = sum(map(len, self.train))
        if self._data.carry_state:
            sequences -= sequences % self._streams
        return sequences * self._data.sequence_length_tokens

    @property
    def sequence_length_tokens(self) -> int:
        """Tokens of one sequence, S."""
        return self._data.sequence_length_tokens

    def locate(self, numbers: np.ndarray) -> list[tuple[int, int]]:
        """(source, sequence of its training split) of each global sequence number: a pure function of the config.

        Raises DataError for a number after the end of the data.
        """
        if self._data.carry_state:
            return [(0, self._place(number)[0]) for number in numbers.tolist()]
        sources, own_numbers = self._phases.locate(numbers)
        sizes, names = [len(reader) for reader in self.train], [manifest.fingerprint for manifest in self.manifests]
        sequences = shuffled_together(sources, own_numbers, sizes, self._data.seed, names)
        return list(zip(sources.tolist(), sequences.tolist(), strict=True))

    def numbers_of(self, source: int, sequence: int, count: int) -> Iterator[int]:
        """Numbers below `count` that mean a sequence of a source, ascending: the inverse of `locate`."""
        size, fingerprint = len(self.train[source]), self.manifests[source].fingerprint
        for epoch in itertools.count():
            number: int | None
            if self._data.carry_state:
                row, place = divmod(sequence, size // self._streams)
                number = (epoch * (size // self._streams) + place) * self._streams + row
            else:
                number = self._phases.number(source, number_of(sequence, epoch, size, self._data.seed, fingerprint))
            if number is None or number >= count or (self._data.carry_state and row >= self._streams):
                return
            yield number

    @property
    def is_remote(self) -> bool:
        """Whether shards are fetched."""
        return any(manifest.remote for manifest in self.manifests)

    def plan(self, sequences: int) -> list["PlannedSource"]:
        """What the first `sequences` of the run read of each source."""
        taken: list[int] = [sequences]
        used_up: list[int | None] = [None]
        if not self._data.carry_state:
            taken, used_up = self._phases.taken(min(sequences, self._phases.end)).tolist(), self._phases.used_up()
        length = self._data.sequence_length_tokens
        return [
            PlannedSource(
                name, count * length, count / len(reader), None if end is None or end > sequences else end * length
            )
            for name, count, reader, end in zip(self.names, taken, self.train, used_up, strict=True)
        ]

    def check_enough(self, sequences: int) -> None:
        """Raise DataError if a run of so many sequences would not find as many in its sources."""
        if sequences > self._phases.end and not self._data.carry_state:
            length = self._data.sequence_length_tokens
            raise DataError(
                f"the run reads {sequences * length:,} tokens, but with max_epochs data.sources have {self._phases.end * length:,}: lower "
                f"train.steps, or raise max_epochs or the weights of data.schedule"
            )

    def _check_different(self) -> None:
        """Raise DataError for a corpus that is there twice: both would be read in the same order, each sequence twice in a row."""
        seen: dict[str, int] = {}
        for place, manifest in enumerate(self.manifests):
            first = seen.setdefault(manifest.fingerprint, place)
            if first != place:
                raise DataError(
                    f"data.sources[{first}] {self.manifests[first].place} and data.sources[{place}] {manifest.place} are the same "
                    f"corpus: give it once, with the sum of the weights"
                )

    def tokens_before(self, number: int) -> int:
        """Tokens of a sequence's first document that the same row read in earlier steps of its pass."""
        sequence, steps = self._place(number)
        return min(self.train[0].tokens_before(sequence), steps * self._data.sequence_length_tokens)

    def _place(self, number: int) -> tuple[int, int]:
        """(sequence, steps since the pass began) of rows that each read their own part of the corpus, again and again.

        The sequences that a division by rows leaves over are not read.
        """
        step, row = divmod(number, self._streams)
        share = len(self.train[0]) // self._streams
        return row * share + step % share, step % share

    def validation_sequences(self, count: int) -> list[tuple[int, int]]:
        """(source, sequence of its validation split) of `count` held-out sequences, shared by weight, or of all.

        Raises DataError if there is none.
        """
        sizes = [len(reader) for reader in self.validation]
        if not sum(sizes):
            tokens = sum(manifest.splits["validation"].tokens for manifest in self.manifests)
            raise DataError(
                f"the validation split ({tokens} tokens) does not hold one sequence of data.sequence_length_tokens "
                f"{self._data.sequence_length_tokens}: set validation.interval_steps to 0, "
                f"or prepare with a larger --validation-fraction"
            )
        shares = split_counts([source.weight for source in self._sources], sizes, count)
        return [(source, sequence) for source, share in enumerate(shares) for sequence in range(share)]
