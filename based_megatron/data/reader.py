"""Random access to the sequences of a prepared corpus, through memory maps of its shards."""

import functools
import json
from collections.abc import Callable

import numpy as np

from based_megatron.data.manifest import Manifest, Member
from based_megatron.errors import DataError

CACHED_MEMBERS = 4096


class SequenceReader:
    """The sequences of one split: windows of S + 1 tokens inside one member, S inputs and, shifted by one, S labels.

    Windows are S apart; the last tokens of a member that do not fill one are left out. Any number of threads may read.
    """

    def __init__(self, manifest: Manifest, split: str, sequence_length_tokens: int):
        self.manifest = manifest
        self._length_tokens = sequence_length_tokens
        self.members = manifest.splits[split].members
        counts = [max(0, member.tokens - 1) // sequence_length_tokens for member in self.members]
        self._first_sequence = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        # A mapped shard costs no memory of the process; the parsed ends of documents do.
        self._shard: Callable[[str], np.ndarray] = functools.cache(self._map_shard)
        self.ends: Callable[[int], np.ndarray] = functools.lru_cache(CACHED_MEMBERS)(self._read_ends)

    def __len__(self) -> int:
        return int(self._first_sequence[-1])

    def locate(self, sequence: int) -> tuple[int, int]:
        """(member number, first token within it) of a sequence."""
        member = int(np.searchsorted(self._first_sequence, sequence, side="right")) - 1
        return member, (sequence - int(self._first_sequence[member])) * self._length_tokens

    def tokens(self, sequence: int) -> np.ndarray:
        """S + 1 token ids, uint16 or uint32. Raises DataError for an id that the tokenizer does not have."""
        number, start = self.locate(sequence)
        tokens = self.block(number)[start : start + self._length_tokens + 1]
        if tokens.max() >= self.manifest.vocab_size:
            raise self._damaged(
                self.members[number], f"has token {tokens.max()} but the vocabulary ends at {self.manifest.vocab_size}"
            )
        return tokens

    def document_ids(self, sequence: int) -> np.ndarray:
        """S + 1 int32 numbers of the documents of the tokens, from 0."""
        number, start = self.locate(sequence)
        positions = np.arange(start, start + self._length_tokens + 1)
        ids = np.searchsorted(self.ends(number), positions, side="right")
        return (ids - ids[0]).astype(np.int32)

    def block(self, number: int) -> np.ndarray:
        """All tokens of a member, as a view of the mapped file."""
        member = self.members[number]
        end = member.offset + self.manifest.token_bytes(member)
        return self._shard(member.file)[member.offset : end].view(self._dtype)

    def origins(self, number: int) -> list[tuple[str, int]]:
        """(file, record) of each document of a member."""
        member = self.members[number]
        return self._json(member, member.origins_offset, member.origins_bytes)

    def _read_ends(self, number: int) -> np.ndarray:
        member = self.members[number]
        return np.array(self._json(member, member.docs_offset, member.docs_bytes)["ends"], np.int64)

    def _map_shard(self, file: str) -> np.ndarray:
        path = self.manifest.folder / file
        try:
            return np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read shard {path}: {error}; restore it or write the corpus again") from error

    def _json(self, member: Member, offset: int, length: int):
        try:
            return json.loads(self._shard(member.file)[offset : offset + length].tobytes())
        except ValueError as error:
            raise self._damaged(member, f"has documents that are no JSON ({error})") from error

    def _damaged(self, member: Member, what: str) -> DataError:
        folder = self.manifest.folder
        return DataError(
            f"{folder / member.file} is damaged: sample {member.key} {what}; "
            f"check the corpus with `based data verify --path {folder}`"
        )
