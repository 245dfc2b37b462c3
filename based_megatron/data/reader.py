"""Random access to the sequences of a prepared corpus; every byte is checked as it is read."""

import functools
import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import xxhash

from based_megatron.data.manifest import HASHED_BYTES, READ_BYTES, Manifest, Member, fingerprint_at, piece_hashes
from based_megatron.data.open_shards import OpenShards
from based_megatron.errors import DataError

CACHED_MEMBERS = 4096
CACHED_HASHES = 1 << 14
"""Members whose hashes are kept, a few kilobytes each: without them an older corpus is read by whole samples again."""


FIRST_PLACE = np.zeros(1, np.int64)


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

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        sequence_length_tokens: int,
        joined: bool = False,
        shards: OpenShards | None = None,
    ):
        """shards: those that the run has open; without it the reader has its own."""
        self.manifest = manifest
        self._shards = shards or OpenShards()
        self._length_tokens = sequence_length_tokens
        self.joined = joined
        self.members = manifest.splits[split].table
        tokens = self.members.column("tokens")
        self._first_token = np.concatenate([[0], np.cumsum(tokens)])
        counts = np.maximum(0, tokens - 1) // sequence_length_tokens
        self._first_sequence = np.concatenate([[0], np.cumsum(counts)])
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._member: Callable[[int], Member] = functools.lru_cache(CACHED_HASHES)(self.members.__getitem__)
        self._hashes: Callable[[int], np.ndarray] = functools.lru_cache(CACHED_HASHES)(self._read_hashes)
        self.ends: Callable[[int], np.ndarray] = functools.lru_cache(CACHED_MEMBERS)(self._read_ends)

    def __len__(self) -> int:
        if self.joined:
            return max(0, int(self._first_token[-1]) - 1) // self._length_tokens
        return int(self._first_sequence[-1])

    def pieces(self, sequence: int, begin: int = 0, end: int | None = None) -> list[Piece]:
        """The pieces of members that make up a window of S + 1 tokens, or the part of it from `begin` to `end`."""
        end = self._length_tokens + 1 if end is None else end
        if not self.joined:
            member = int(self._first_sequence.searchsorted(sequence, "right")) - 1
            start = (sequence - int(self._first_sequence[member])) * self._length_tokens
            return [Piece(member, start + begin, start + end)]
        position, stop = sequence * self._length_tokens + begin, sequence * self._length_tokens + end
        pieces = []
        while position < stop:
            member = int(self._first_token.searchsorted(position, "right")) - 1
            first, last = self._first_token[member : member + 2].tolist()
            pieces.append(Piece(member, position - first, min(stop, last) - first))
            position = last
        return pieces

    def sequences_with(self, piece: Piece) -> range:
        """The sequences that have tokens of a piece as inputs; none where they are among the last, which are left out."""
        S, member = self._length_tokens, piece.member
        if self.joined:
            first, end = int(self._first_token[member]), len(self)
            return range(min(end, (first + piece.start) // S), min(end, (first + piece.stop - 1) // S + 1))
        first, end = (int(edge) for edge in self._first_sequence[member : member + 2])
        return range(min(end, first + piece.start // S), min(end, first + (piece.stop - 1) // S + 1))

    def tokens(self, sequence: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Token ids of a window, uint16 or uint32: S + 1, or those from `begin` to `end` of them.

        Raises DataError for what is not as it was written, and for an id that the tokenizer does not have.
        """
        found = []
        for piece in self.pieces(sequence, begin, end):
            tokens = self.part(piece)
            if tokens.max() >= self.manifest.vocab_size:
                raise self._damaged(
                    self._member(piece.member),
                    f"has token {tokens.max()} but the vocabulary ends at {self.manifest.vocab_size}",
                )
            found.append(tokens)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def document_starts(self, sequence: int) -> np.ndarray:
        """int64 places in a window of S + 1 tokens at which documents begin, ascending; 0 is always one."""
        found, place = [FIRST_PLACE], 0
        for piece in self.pieces(sequence):
            if place and self.begins(piece):
                found.append(np.array([place]))
            ends = self.ends(piece.member)
            first, last = ends.searchsorted([piece.start + 1, piece.stop])
            if first < last:
                found.append(ends[first:last] + (place - piece.start))
            place += piece.stop - piece.start
        return np.concatenate(found)

    def document_range(self, sequence: int) -> tuple[int, int]:
        """Numbers, within the split, of the first and the last document of a window of S inputs."""
        pieces = self.pieces(sequence, 0, self._length_tokens)
        places = [(pieces[0].member, pieces[0].start), (pieces[-1].member, pieces[-1].stop - 1)]
        first, last = (
            self._member(number).first_document + int(np.searchsorted(self.ends(number), position, side="right"))
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
        while not self.begins(Piece(number, 0, 1)):
            number -= 1
            ends, length = self.ends(number), self._member(number).tokens
            # The last document of a member that goes on in the next ends with the member.
            tokens += length - (int(ends[-2]) if len(ends) > 1 else 0)
            if len(ends) > 1:
                break
        return tokens

    def begins(self, piece: Piece) -> bool:
        """True if a document begins with the first token of a piece."""
        number, start, _ = piece
        if start:
            return bool((self.ends(number) == start).any())
        if not number:
            return True
        before = self._member(number - 1)
        # A document that goes on in the next member is counted in both.
        return self._member(number).first_document == before.first_document + before.docs

    def block(self, number: int) -> np.ndarray:
        """All tokens of a member."""
        return self.part(Piece(number, 0, self._member(number).tokens))

    def part(self, piece: Piece) -> np.ndarray:
        """The tokens of a piece."""
        member, size = self._member(piece.member), self._dtype.itemsize
        data = self._checked(piece.member, member.offset + piece.start * size, member.offset + piece.stop * size)
        return np.frombuffer(data, self._dtype)

    def origins(self, number: int) -> list[tuple[str, int]]:
        """(file, record) of each document of a member."""
        member = self._member(number)
        return self._json(number, member.origins_offset, member.origins_bytes)

    def _read_ends(self, number: int) -> np.ndarray:
        member = self._member(number)
        return np.array(self._json(number, member.docs_offset, member.docs_bytes)["ends"], np.int64)

    def _json(self, number: int, offset: int, length: int):
        try:
            return json.loads(self._checked(number, offset, offset + length))
        except ValueError as error:
            raise self._damaged(self._member(number), f"has documents that are no JSON ({error})") from error

    def _checked(self, number: int, begin: int, end: int) -> bytes:
        """Bytes of a member's sample as they were written: what has just been read is hashed, every time.

        Raises DataError if they are not what was written, or cannot be read.
        """
        member = self._member(number)
        first, last = (begin - member.begin) // HASHED_BYTES, -(-(end - member.begin) // HASHED_BYTES)
        start, hashed_end = member.begin + first * HASHED_BYTES, member.hashed_end if member.hashes_xxh3 else member.end
        hashes = self._hashes(number)[first:last].tolist()
        data = self._read(member, start, min(member.begin + last * HASHED_BYTES, hashed_end))
        view = memoryview(data)
        for place, written in enumerate(hashes):
            piece = view[place * HASHED_BYTES : (place + 1) * HASHED_BYTES]
            if xxhash.xxh3_64_intdigest(piece) != written:
                at = start + place * HASHED_BYTES
                raise self._damaged(member, f"does not match its hash in bytes {at} to {at + len(piece)}")
        return data[begin - start : end - start]

    def _read_hashes(self, number: int) -> np.ndarray:
        """uint64 hashes of the pieces of a sample, of which the manifest says that they are the right ones."""
        member = self._member(number)
        if not member.hashes_xxh3:
            return self._hash_whole(member)
        count = -(-(member.hashed_end - member.begin) // HASHED_BYTES)
        data = self._read(member, member.hashes_offset, member.hashes_offset + 8 * count)
        if xxhash.xxh3_64_hexdigest(data) != member.hashes_xxh3:
            raise self._damaged(member, "does not have the hashes that the manifest knows")
        return np.frombuffer(data, "<u8")

    def _hash_whole(self, member: Member) -> np.ndarray:
        """Hashes of the pieces of a sample of which the manifest has one hash of all of it."""
        digest, hashes = xxhash.xxh3_128(), []
        for begin in range(member.begin, member.end, READ_BYTES):
            data = self._read(member, begin, min(begin + READ_BYTES, member.end))
            digest.update(data)
            hashes.append(piece_hashes(data))
        if digest.hexdigest() != member.xxh3:
            raise self._damaged(member, "does not match its hash")
        return np.concatenate(hashes)

    def _read(self, member: Member, begin: int, end: int) -> bytes:
        try:
            remote, folder = self.manifest.remote, self.manifest.folder
            data = (
                remote.read(member.file, begin, end)
                if remote
                else self._shards.read(f"{folder}/{member.file}", begin, end)
            )
        except DataError as error:
            if replaced := self._replaced(member):
                raise replaced from error
            raise
        if len(data) < end - begin:
            raise self._damaged(member, f"ends at byte {begin + len(data)}, before {end}")
        return data

    def _damaged(self, member: Member, what: str) -> DataError:
        place = self.manifest.place
        if self.manifest.remote:
            self.manifest.remote.forget(member.file, member.begin, member.end)
        return self._replaced(member) or DataError(
            f"{place}/{member.file} is damaged: sample {member.key} {what}; "
            f"check the corpus with `based data verify --path {place}`"
        )

    def _replaced(self, member: Member) -> DataError | None:
        """The error where the corpus of this reader is no longer the one in its folder, which is then not damaged."""
        place, then, remote = self.manifest.place, self.manifest.fingerprint, self.manifest.remote
        now = remote.fingerprint_now() if remote else fingerprint_at(self.manifest.folder)
        if now in (None, then):
            return None
        return DataError(
            f"{place}/{member.file} is of another corpus than the run began with: the fingerprint of {place} was {then} and is {now}; "
            f"put that corpus back, or train on this one in a run_dir of its own"
        )
