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

    def tokens(self, sequence: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Token ids of a window, uint16 or uint32: S + 1, or those from `begin` to `end` of them.

        Raises DataError for an id that the tokenizer does not have.
        """
        number, start = self.locate(sequence)
        end = self._length_tokens + 1 if end is None else end
        tokens = self.block(number)[start + begin : start + end]
        if tokens.max() >= self.manifest.vocab_size:
            raise self._damaged(
                self.members[number], f"has token {tokens.max()} but the vocabulary ends at {self.manifest.vocab_size}"
            )
        return tokens

    def document_starts(self, sequence: int) -> np.ndarray:
        """int64 places in a window of S + 1 tokens at which documents begin, ascending; 0 is always one."""
        number, start = self.locate(sequence)
        ends = self.ends(number)
        first, last = np.searchsorted(ends, [start + 1, start + self._length_tokens + 1])
        return np.concatenate([[0], ends[first:last] - start])

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
