"""Lists the documents that a training step was made of: the first question after a loss spike."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from based_megatron.data.reader import Piece
from based_megatron.data.sources import Sources
from based_megatron.data.texts import tokenizer_of

PREVIEW_TOKENS = 32


@dataclass(frozen=True)
class DocumentPart:
    """The tokens of one document within one sequence of a step."""

    sequence: int
    """Number of the sequence within the step's global batch."""
    source: str
    """Folder of the prepared corpus."""
    member: str
    """Shard and sample key."""
    document: int
    """Number of the document within the training split."""
    origin: str
    """Input file and record that the document was read from."""
    start: int
    """Place of its first token in the sequence."""
    tokens: int
    """Tokens of the document in this sequence."""
    begins: bool
    """Whether the document begins here, and does not go on from before."""
    preview: str
    """The first of these tokens, decoded, or all of them."""


def documents_of_step(
    sources: Sources, step: int, global_batch_sequences: int, preview_tokens: int | None = PREVIEW_TOKENS
) -> Iterator[DocumentPart]:
    """Every document part that a step was trained on, in the order of sequences and tokens.

    step: counted from 1, as in logs, errors and names of checkpoints. preview_tokens: tokens to decode; None decodes all of them, and
    shows special ones.
    """
    tokenizer = tokenizer_of(sources.manifests[0])
    numbers = (step - 1) * global_batch_sequences + np.arange(global_batch_sequences, dtype=np.int64)
    for place, (source, sequence) in enumerate(sources.locate(numbers)):
        reader = sources.train[source]
        folder, place_in_sequence = reader.manifest.place, 0
        for piece in reader.pieces(sequence, 0, sources.sequence_length_tokens):
            number, start, _ = piece
            member, ends, origins = reader.members[number], reader.ends(number), reader.origins(number)
            inputs = reader.part(piece)
            document = int(np.searchsorted(ends, start, side="right"))
            position = 0
            while position < len(inputs):
                end = min(int(ends[document]) - start, len(inputs))
                shown = inputs[position : end if preview_tokens is None else min(end, position + preview_tokens)]
                yield DocumentPart(
                    sequence=place,
                    source=folder,
                    member=f"{member.file}:{member.key}",
                    document=member.first_document + document,
                    origin="{}:{}".format(*origins[document]),
                    start=place_in_sequence + position,
                    tokens=end - position,
                    begins=reader.begins(Piece(number, start + position, end)),
                    preview=tokenizer.decode(shown.tolist(), skip_special_tokens=preview_tokens is not None),
                )
                position, document = end, document + 1
            place_in_sequence += len(inputs)
