"""Lists the documents that a training step was made of: the first question after a loss spike."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from based_megatron.data.manifest import TOKENIZER_NAME, check_tokenizer_file
from based_megatron.data.sources import Sources

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
    tokens: int
    """Tokens of the document in this sequence."""
    preview: str
    """The first of these tokens, decoded."""


def documents_of_step(sources: Sources, step: int, global_batch_sequences: int) -> Iterator[DocumentPart]:
    """Every document part that a step was trained on, in the order of sequences and tokens.

    step: counted from 1, as in logs, errors and names of checkpoints.
    """
    check_tokenizer_file(sources.manifests[0])
    tokenizer = Tokenizer.from_file(str(sources.manifests[0].folder / TOKENIZER_NAME))
    numbers = (step - 1) * global_batch_sequences + np.arange(global_batch_sequences, dtype=np.int64)
    for place, (source, sequence) in enumerate(sources.locate(numbers)):
        reader = sources.train[source]
        folder = reader.manifest.folder
        for piece in reader.pieces(sequence, 0, sources.sequence_length_tokens):
            number, start, _ = piece
            member, ends, origins = reader.members[number], reader.ends(number), reader.origins(number)
            inputs = reader.part(piece)
            document = int(np.searchsorted(ends, start, side="right"))
            position = 0
            while position < len(inputs):
                end = min(int(ends[document]) - start, len(inputs))
                yield DocumentPart(
                    sequence=place,
                    source=str(folder),
                    member=f"{member.file}:{member.key}",
                    document=member.first_document + document,
                    origin="{}:{}".format(*origins[document]),
                    tokens=end - position,
                    preview=tokenizer.decode(inputs[position : min(end, position + PREVIEW_TOKENS)].tolist()),
                )
                position, document = end, document + 1
