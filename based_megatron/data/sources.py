"""The corpora of a run as one endless, shuffled, weighted stream of sequences."""

import numpy as np

from based_megatron.config.schema import DataConfig, SourceConfig
from based_megatron.data.manifest import load_manifest
from based_megatron.data.mixture import Mixture, split_counts
from based_megatron.data.order import shuffled
from based_megatron.data.reader import SequenceReader
from based_megatron.errors import ConfigError, DataError


class Sources:
    """Opens the corpora of a DataConfig and says which sequence of which one has a given number."""

    def __init__(self, data: DataConfig):
        """Raises DataError for a corpus that is damaged, too small, or made with another tokenizer than the first."""
        if bool(data.path) == bool(data.sources):
            raise ConfigError("give one of data.path and data.sources")
        self._sources = data.sources or (SourceConfig(path=data.path),)
        self._data = data
        self.manifests = [load_manifest(source.path) for source in self._sources]
        for manifest in self.manifests[1:]:
            if manifest.tokenizer_xxh3 != self.manifests[0].tokenizer_xxh3:
                raise DataError(
                    f"{manifest.folder} and {self.manifests[0].folder} were made with different tokenizers: "
                    f"prepare both with the same --tokenizer, or take one out of data.sources"
                )
        self.train = [SequenceReader(manifest, "train", data.sequence_length_tokens) for manifest in self.manifests]
        self.validation = [
            SequenceReader(manifest, "validation", data.sequence_length_tokens) for manifest in self.manifests
        ]
        for reader in self.train:
            if not len(reader):
                raise DataError(
                    f"the training split of {reader.manifest.folder} ({reader.manifest.splits['train'].tokens} tokens) "
                    f"does not hold one sequence: lower data.sequence_length_tokens {data.sequence_length_tokens} "
                    f"or prepare more text"
                )
        self._mixture = Mixture([source.weight for source in self._sources])

    @property
    def fingerprint(self) -> str:
        """Everything that the meaning of a training sequence's number depends on."""
        parts = [
            f"{manifest.fingerprint}*{source.weight:g}"
            for manifest, source in zip(self.manifests, self._sources, strict=True)
        ]
        return f"{'+'.join(parts)}/seed={self._data.seed}/sequence_length_tokens={self._data.sequence_length_tokens}"

    def locate(self, numbers: np.ndarray) -> list[tuple[int, int]]:
        """(source, sequence of its training split) of each global sequence number: a pure function of the config."""
        sources, own_numbers = self._mixture.locate(numbers)
        sequences = np.empty_like(own_numbers)
        for source in np.unique(sources):
            chosen = sources == source
            size = len(self.train[source])
            sequences[chosen] = shuffled(own_numbers[chosen], size, self._data.seed, self.manifests[source].fingerprint)
        return list(zip(sources.tolist(), sequences.tolist(), strict=True))

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
