"""Finds a string in prepared corpora, and the steps of a run that read it."""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from based_megatron.data.batches import batches
from based_megatron.data.sources import Sources
from based_megatron.data.texts import Document, documents_of_block, tokenizer_of

CONTEXT_CHARACTERS = 30
DECODED_TOKENS = 1 << 18
"""Tokens that are decoded at a time."""


@dataclass(frozen=True)
class Found:
    """A place of the string in a training split."""

    source: str
    """Folder of the prepared corpus."""
    member: str
    """Shard and sample key of its first token."""
    document: int
    """Number of the document within the training split."""
    origin: str
    """Input file and record that the document was read from."""
    steps: tuple[int, ...]
    """Steps of the order of the data, counted from 0, that have a token of it as input, ascending."""
    context: str
    """The string, with the text around it."""


def find(sources: Sources, text: str, steps: int, global_batch_sequences: int) -> Iterator[Found]:
    """Every place of a string in the training splits, and the steps among the first `steps` that read it.

    All tokens are decoded: a string is found whatever tokens it is of. Raises DataError for what is damaged.
    """
    count = steps * global_batch_sequences
    for number, reader in enumerate(sources.train):
        tokenizer, folder = tokenizer_of(reader.manifest), reader.manifest.place
        for block in range(len(reader.members)):
            for document, decoded in _decoded(tokenizer, documents_of_block(reader, block)):
                for at in _places(decoded, text):
                    pieces = document.between(*_tokens(tokenizer, document, at, at + len(text)))
                    sequences = sorted({sequence for piece in pieces for sequence in reader.sequences_with(piece)})
                    read = {
                        n // global_batch_sequences for s in sequences for n in sources.numbers_of(number, s, count)
                    }
                    member = reader.members[pieces[0].member]
                    context = decoded[max(0, at - CONTEXT_CHARACTERS) : at + len(text) + CONTEXT_CHARACTERS]
                    where = (folder, f"{member.file}:{member.key}", document.number, document.origin)
                    yield Found(*where, tuple(sorted(read)), context)


def _decoded(tokenizer: Tokenizer, documents: Iterator[Document]) -> Iterator[tuple[Document, str]]:
    """Documents with their texts, which are decoded many at a time, on all cores."""
    for batch in batches(documents, lambda document: len(document.tokens), DECODED_TOKENS):
        yield from zip(batch, tokenizer.decode_batch([entry.tokens.tolist() for entry in batch]), strict=True)


def _places(decoded: str, text: str) -> Iterator[int]:
    """Where the text begins in another, overlapping ones too."""
    at = decoded.find(text)
    while at >= 0:
        yield at
        at = decoded.find(text, at + 1)


def _tokens(tokenizer: Tokenizer, document: Document, begin: int, end: int) -> tuple[int, int]:
    """The range of a document's tokens that the characters from `begin` to `end` come from."""
    ids, counts = document.tokens.tolist(), range(len(document.tokens) + 1)

    def characters(count: int) -> int:
        return len(tokenizer.decode(ids[:count]))

    # A token that ends within a character shows as one character more, never as fewer.
    first = bisect.bisect_right(counts, begin, key=characters) - 1
    return first, bisect.bisect_left(counts, end, lo=first + 1, key=characters)
