"""What validation needs to measure recall: the slice of every held-out token, and synthetic sequences.

Legend: S tokens of a whole sequence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from based_megatron.data.bigrams import count_in_turns
from based_megatron.data.probes import ProbeSequences
from based_megatron.data.slices import Slices, bigrams_of, repeat_distances
from based_megatron.data.sources import Sources


@dataclass(frozen=True)
class RecallRows:
    """The rows of a validation that measures recall: held-out sequences, then probes."""

    held_out: np.ndarray
    """uint8, one row of S slice numbers for each held-out sequence."""
    probes: ProbeSequences
    slices: Slices

    def row(self, number: int) -> np.ndarray:
        """uint8 [S] slice numbers of a row."""
        count = len(self.held_out)
        return self.held_out[number] if number < count else self.probes.slices(number - count, self.slices)


def training_tokens(sources: Sources) -> int:
    """Tokens of the training splits of all corpora."""
    return sum(manifest.splits["train"].tokens for manifest in sources.manifests)


def slices_in_turns(
    sources: Sources, sequences: int, slices: Slices, limit_tokens: int, run_dir: Path
) -> Iterator[np.ndarray | None]:
    """Look at up to `sequences` held-out sequences: None while bigrams are counted, then uint8 slice numbers, a row of S each.

    limit_tokens: tokens of each training split to count. Counts are kept next to the corpora, or in the run folder if those
    cannot be written to. Raises DataError for a corpus that is damaged.
    """
    chosen = sources.validation_sequences(sequences)
    vocab_size = sources.manifests[0].vocab_size
    rows = [bigrams_of(sources.validation[source].tokens(sequence), vocab_size) for source, sequence in chosen]
    wanted = np.unique(np.concatenate(rows))
    counts = np.zeros(len(wanted))
    for manifest, weight in zip(sources.manifests, count_weights(sources), strict=True):
        for found in count_in_turns(manifest, wanted, limit_tokens, (manifest.folder, run_dir)):
            if found is None:
                yield None
            else:
                counts += weight * found
    ids = []
    for (source, sequence), bigrams_S in zip(chosen, rows, strict=True):
        distances_S = repeat_distances(bigrams_S, sources.validation[source].document_starts(sequence))
        ids.append(slices.of_tokens(distances_S, counts[np.searchsorted(wanted, bigrams_S)]))
    yield np.stack(ids)


def count_weights(sources: Sources) -> Sequence[float]:
    """How often a mixture reads each corpus in as many tokens as all of them have: 1 for a single one."""
    tokens = np.array([manifest.splits["train"].tokens for manifest in sources.manifests], np.float64)
    return (sources.shares * tokens.sum() / tokens).tolist()
