"""A training step as text: its sequences with their documents, and the tokens that are not in the loss.

Legend: S tokens of a whole sequence.
"""

import dataclasses
from collections.abc import Iterator
from itertools import groupby

import numpy as np

from based_megatron.config import Config
from based_megatron.data.documents import DocumentPart, documents_of_step
from based_megatron.data.loader import Loader
from based_megatron.data.prefix import build_prefix
from based_megatron.data.sources import Sources


def lines_of_step(config: Config, sources: Sources, step: int) -> Iterator[str]:
    """What a step of the order of the data trains on, sequence after sequence. step: counted from 1.

    A line for each sequence and each document in it, then the text; places are those of input tokens, whose label is the next token.
    """
    batch = config.train.global_batch_sequences
    parts = documents_of_step(sources, step, batch, preview_tokens=None)
    for row, documents in groupby(parts, key=lambda part: part.sequence):
        weights_S, shown = _loss_weights(config, sources, step, row), list(documents)
        yield (
            f"=== sequence {row} of step {step}: {shown[0].source}, {len(weights_S)} tokens, "
            f"{len({part.document for part in shown})} documents, loss on {int((weights_S > 0).sum())}"
        )
        for part in shown:
            yield _head(part, weights_S)
            yield part.preview


def _loss_weights(config: Config, sources: Sources, step: int, row: int) -> np.ndarray:
    """float32 [S] weights of the labels of a row of the global batch, as training has them."""
    rows, data = config.train.global_batch_sequences, dataclasses.replace(config.data, num_workers=0)
    # A rank of its own for each row: only this row is read.
    loader = Loader(sources, data, rows, 1, dp_rank=row, dp_size=rows, prefix=build_prefix(config))
    (batch,) = loader.micro_batches(step - 1)
    return batch.loss_mask_BL[0].numpy()


def _head(part: DocumentPart, weights_S: np.ndarray) -> str:
    end = part.start + part.tokens
    whence = "" if part.begins else ", goes on from before"
    masked = ranges(np.flatnonzero(weights_S[part.start : end] == 0) + part.start)
    no_loss = f", no loss at {masked}" if masked else ""
    return f"--- {part.start}-{end - 1}: document {part.document}, {part.origin}, {part.member}{whence}{no_loss}"


def ranges(places: np.ndarray) -> str:
    """Ascending numbers in words: 3-7,9."""
    runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs if len(run))
