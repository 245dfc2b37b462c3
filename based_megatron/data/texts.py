"""Whole documents of a prepared split, and their text."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from based_megatron.data.manifest import TOKENIZER_NAME, Manifest, check_tokenizer_file
from based_megatron.data.reader import Piece, SequenceReader


@dataclass(frozen=True)
class Document:
    """A document, however many blocks it lies in."""

    number: int
    """Number within the split."""
    origin: str
    """Input file and record that it was read from."""
    pieces: tuple[Piece, ...]
    """The places of its tokens."""
    tokens: np.ndarray
    """All of them, the eos at the end included."""

    def between(self, begin: int, end: int) -> list[Piece]:
        """The places of its tokens from `begin` to `end`."""
        found, passed = [], 0
        for member, start, stop in self.pieces:
            first, last = max(start, start + begin - passed), min(stop, start + end - passed)
            if first < last:
                found.append(Piece(member, first, last))
            passed += stop - start
        return found


def documents_of_block(reader: SequenceReader, number: int) -> Iterator[Document]:
    """The documents that begin in a block, whole. Raises DataError for what is damaged."""
    ends, origins, tokens = reader.ends(number).tolist(), reader.origins(number), reader.block(number)
    starts = [0, *ends[:-1]]
    for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if not place and not reader.begins(Piece(number, 0, 1)):
            continue
        pieces, parts = [Piece(number, start, end)], [tokens[start:end]]
        while pieces[-1].stop == reader.members[pieces[-1].member].tokens:
            following = Piece(pieces[-1].member + 1, 0, 1)
            if following.member == len(reader.members) or reader.begins(following):
                break
            pieces.append(Piece(following.member, 0, int(reader.ends(following.member)[0])))
            parts.append(reader.part(pieces[-1]))
        first = reader.members[number].first_document
        yield Document(first + place, "{}:{}".format(*origins[place]), tuple(pieces), np.concatenate(parts))


def tokenizer_of(manifest: Manifest) -> Tokenizer:
    """The tokenizer that a corpus was made with. Raises DataError if it is another."""
    check_tokenizer_file(manifest)
    return Tokenizer.from_file(str(manifest.folder / TOKENIZER_NAME))
