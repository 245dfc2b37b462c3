"""What a prepared corpus holds, for people: counts out of its manifest, and what a sample of its blocks shows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import xxhash

from based_megatron.data.bigrams import sampled
from based_megatron.data.manifest import Manifest
from based_megatron.data.reader import SequenceReader
from based_megatron.data.texts import Document, documents_of_block, tokenizer_of

DECODED_DOCUMENTS = 1000
SHOWN_DOCUMENTS, SHOWN_CHARACTERS = 5, 400


@dataclass(frozen=True)
class Survey:
    """One corpus. What is said of documents is of those that begin in the sampled blocks of the training split."""

    folder: str
    tokens: dict[str, int]
    """Tokens of each split."""
    documents: dict[str, int]
    skipped: dict[str, int]
    blocks: int
    """Blocks of the training split."""
    sampled_blocks: int
    sampled_documents: int
    sampled_tokens: int
    lengths: tuple[tuple[int, int], ...]
    """(least tokens, documents) of bins that double, from the first to the last that is not empty."""
    mean_tokens: float
    median_tokens: float
    duplicates: int
    """Documents with the tokens of one before them in the sample."""
    duplicate_tokens: int
    bytes_per_token: float
    """UTF-8 bytes of text for each token, over the first DECODED_DOCUMENTS of the sample."""
    tokens_per_word: float
    """Tokens for each word between blanks, over the same."""
    samples: tuple[tuple[str, str], ...]
    """(origin, beginning of the text) of some documents."""


def survey(manifest: Manifest, limit_tokens: int) -> Survey:
    """Look at a corpus. limit_tokens: a larger training split is sampled, in blocks that lie evenly over it.

    Raises DataError for a damaged shard.
    """
    split, reader = manifest.splits["train"], SequenceReader(manifest, "train", 1)
    chosen = sampled(reader.members.column("tokens"), limit_tokens)
    lengths, seen, duplicates, duplicate_tokens = [], set(), 0, 0
    for document in _documents(reader, chosen):
        digest = xxhash.xxh3_128_digest(document.tokens.tobytes())
        lengths.append(len(document.tokens))
        if digest in seen:
            duplicates, duplicate_tokens = duplicates + 1, duplicate_tokens + len(document.tokens)
        seen.add(digest)
    decoded = _decoded(manifest, _documents(reader, chosen))
    text_bytes, words = (sum(count(text) for _, text, _ in decoded) for count in (_bytes, _words))
    decoded_tokens = sum(tokens for *_, tokens in decoded)
    return Survey(
        folder=manifest.place,
        tokens={name: part.tokens for name, part in manifest.splits.items()},
        documents={name: part.documents for name, part in manifest.splits.items()},
        skipped=manifest.skipped,
        blocks=len(split.members),
        sampled_blocks=len(chosen),
        sampled_documents=len(lengths),
        sampled_tokens=sum(lengths),
        lengths=doubling_bins(lengths),
        mean_tokens=float(np.mean(lengths)) if lengths else 0.0,
        median_tokens=float(np.median(lengths)) if lengths else 0.0,
        duplicates=duplicates,
        duplicate_tokens=duplicate_tokens,
        bytes_per_token=text_bytes / max(1, decoded_tokens),
        tokens_per_word=decoded_tokens / max(1, words),
        samples=tuple((origin, text[:SHOWN_CHARACTERS]) for origin, text, _ in decoded[:SHOWN_DOCUMENTS]),
    )


def doubling_bins(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(1, count), (2, count), (4, count), ...: how many numbers, all at least 1, are from this to less than the next."""
    if not lengths:
        return ()
    counts = np.bincount([length.bit_length() - 1 for length in lengths])
    first = int(np.flatnonzero(counts)[0])
    return tuple((1 << place, int(count)) for place, count in enumerate(counts.tolist()) if place >= first)


def _documents(reader: SequenceReader, blocks: Sequence[int]) -> Iterator[Document]:
    for block in blocks:
        yield from documents_of_block(reader, block)


def _decoded(manifest: Manifest, documents: Iterator[Document]) -> list[tuple[str, str, int]]:
    """(origin, text, tokens but the eos) of the first documents."""
    chosen = list(islice(documents, DECODED_DOCUMENTS))
    texts = tokenizer_of(manifest).decode_batch([document.tokens.tolist() for document in chosen])
    return [(entry.origin, text, len(entry.tokens) - 1) for entry, text in zip(chosen, texts, strict=True)]


def _bytes(text: str) -> int:
    return len(text.encode())


def _words(text: str) -> int:
    return len(text.split())
