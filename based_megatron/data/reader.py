"""Random access to the sequences of a prepared corpus, through memory maps of its shards."""

import functools
import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from based_megatron.data.manifest import Manifest, Member
from based_megatron.errors import DataError

CACHED_MEMBERS = 4096


class Piece(NamedTuple):
    """Tokens of one member."""

    member: int
    start: int
    stop: int


class SequenceReader:
    """The sequences of one split: windows of S + 1 tokens, S inputs and, shifted by one, S labels.

    Windows are S apart. They lie inside one member, whose last tokens that do not fill one are left out; with `joined` the
    members are one stream, and windows go on from one to the next. Any number of threads may read.
    """

    def __init__(self, manifest: Manifest, split: str, sequence_length_tokens: int, joined: bool = False):
        self.manifest = manifest
        self._length_tokens = sequence_length_tokens
        self._joined = joined
        self.members = manifest.splits[split].members
        tokens = [member.tokens for member in self.members]
        self._first_token = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])
        counts = [max(0, count - 1) // sequence_length_tokens for count in tokens]
        self._first_sequence = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        # A mapped shard costs no memory of the process; the parsed ends of documents do.
        self._shard: Callable[[str], np.ndarray] = functools.cache(self._map_shard)
        self.ends: Callable[[int], np.ndarray] = functools.lru_cache(CACHED_MEMBERS)(self._read_ends)

    def __len__(self) -> int:
        if self._joined:
            return max(0, int(self._first_token[-1]) - 1) // self._length_tokens
        return int(self._first_sequence[-1])

    def pieces(self, sequence: int, begin: int = 0, end: int | None = None) -> list[Piece]:
        """The pieces of members that make up a window of S + 1 tokens, or the part of it from `begin` to `end`."""
        end = self._length_tokens + 1 if end is None else end
        if not self._joined:
            member = int(np.searchsorted(self._first_sequence, sequence, side="right")) - 1
            start = (sequence - int(self._first_sequence[member])) * self._length_tokens
            return [Piece(member, start + begin, start + end)]
        position, stop = sequence * self._length_tokens + begin, sequence * self._length_tokens + end
        pieces = []
        while position < stop:
            member = int(np.searchsorted(self._first_token, position, side="right")) - 1
            first, last = (int(edge) for edge in self._first_token[member : member + 2])
            pieces.append(Piece(member, position - first, min(stop, last) - first))
            position = last
        return pieces

    def tokens(self, sequence: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Token ids of a window, uint16 or uint32: S + 1, or those from `begin` to `end` of them.

        Raises DataError for an id that the tokenizer does not have.
        """
        found = []
        for number, start, stop in self.pieces(sequence, begin, end):
            tokens = self.block(number)[start:stop]
            if tokens.max() >= self.manifest.vocab_size:
                raise self._damaged(
                    self.members[number],
                    f"has token {tokens.max()} but the vocabulary ends at {self.manifest.vocab_size}",
                )
            found.append(tokens)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def document_starts(self, sequence: int) -> np.ndarray:
        """int64 places in a window of S + 1 tokens at which documents begin, ascending; 0 is always one."""
        found, place = [np.zeros(1, np.int64)], 0
        for piece in self.pieces(sequence):
            if place and self._begins(piece):
                found.append(np.array([place]))
            ends = self.ends(piece.member)
            first, last = np.searchsorted(ends, [piece.start + 1, piece.stop])
            found.append(ends[first:last] - piece.start + place)
            place += piece.stop - piece.start
        return np.concatenate(found)

    def document_range(self, sequence: int) -> tuple[int, int]:
        """Numbers, within the split, of the first and the last document of a window of S inputs."""
        pieces = self.pieces(sequence, 0, self._length_tokens)
        places = [(pieces[0].member, pieces[0].start), (pieces[-1].member, pieces[-1].stop - 1)]
        first, last = (
            self.members[number].first_document + int(np.searchsorted(self.ends(number), position, side="right"))
            for number, position in places
        )
        return first, last

    def tokens_before(self, sequence: int) -> int:
        """Tokens of the document of a window's first token that lie before the window."""
        (piece,) = self.pieces(sequence, 0, 1)
        ends, number = self.ends(piece.member), piece.member
        begun = int(np.searchsorted(ends, piece.start, side="right"))
        if begun:
            return piece.start - int(ends[begun - 1])
        tokens = piece.start
        while not self._begins(Piece(number, 0, 1)):
            number -= 1
            ends, length = self.ends(number), self.members[number].tokens
            # The last document of a member that goes on in the next ends with the member.
            tokens += length - (int(ends[-2]) if len(ends) > 1 else 0)
            if len(ends) > 1:
                break
        return tokens

    def _begins(self, piece: Piece) -> bool:
        """True if a document begins with the first token of a piece."""
        number, start, _ = piece
        if start:
            return bool((self.ends(number) == start).any())
        if not number:
            return True
        before = self.members[number - 1]
        # A document that goes on in the next member is counted in both.
        return self.members[number].first_document == before.first_document + before.docs

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
