"""The loader: makes the micro batches of one rank from the number of a step.

    step --global batch--> numbers --mixture, permutation--> (source, sequence) --checked read--> tokens, labels, masks

Every arrow is a pure function, so there is no state to save: a run resumes exactly at any step, with any number of data
parallel ranks, context parallel ranks and reader threads.

Legend: B sequences, S tokens of a whole sequence, L tokens of this context parallel slice.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from based_megatron.config import Config
from based_megatron.config.schema import DataConfig
from based_megatron.config.validate import slice_multiple
from based_megatron.data.ahead import Ahead
from based_megatron.data.batch import MicroBatch
from based_megatron.data.prefix import Prefix, build_prefix
from based_megatron.data.recall import RecallRows
from based_megatron.data.slices import NO_SLICE
from based_megatron.data.sources import Sources
from based_megatron.errors import ConfigError
from based_megatron.parallel.sequence.documents import Documents
from based_megatron.parallel.sequence.slices import even_bounds, slice_of

if TYPE_CHECKING:
    from based_megatron.parallel.topology import Topology

SEQUENCES_NAMED = 8
PROBES = "probes"
"""Name of the source of sequences that are made."""


class Sequences(Protocol):
    """What can be read as the sequences of a split."""

    def tokens(self, sequence: int, begin: int, end: int, /) -> np.ndarray:
        """Token ids of a part of a window of S + 1 tokens."""

    def document_starts(self, sequence: int, /) -> np.ndarray:
        """Places in the window at which documents begin."""


class Loader:
    """The training and validation batches of one rank."""

    def __init__(
        self,
        sources: Sources,
        data: DataConfig,
        global_batch_sequences: int,
        micro_batch_sequences: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        cp_rank: int = 0,
        cp_size: int = 1,
        slice_multiple: int = 1,
        prefix: Prefix | None = None,
    ):
        """sources: the opened corpora of `data`. Slices of context ranks are multiples of `slice_multiple`.

        prefix: what a model with a prefix changes in the batches; sequences are then whole. Raises ConfigError.
        """
        assert prefix is None or cp_size == 1
        self._prefix = prefix
        if global_batch_sequences % (micro_batch_sequences * dp_size):
            raise ConfigError(
                f"train.global_batch_sequences {global_batch_sequences} is not a multiple of "
                f"train.micro_batch_sequences {micro_batch_sequences} x data parallel {dp_size}; "
                f"change train.global_batch_sequences"
            )
        self._sources, self.fingerprint = sources, sources.fingerprint
        self._isolate_documents, self._carries_state = data.isolate_documents, data.carry_state
        self._global_batch_sequences = global_batch_sequences
        self._micro_batch_sequences = micro_batch_sequences
        self._dp_rank, self._dp_size = dp_rank, dp_size
        rows = np.arange(global_batch_sequences, dtype=np.int64)
        self._rows = rows.reshape(-1, dp_size, micro_batch_sequences)[:, dp_rank]
        self._bounds = even_bounds(data.sequence_length_tokens, cp_size, slice_multiple)
        self._slice = slice_of(self._bounds, cp_rank)
        self._steps_ahead = data.num_workers
        self._pool = ThreadPoolExecutor(data.num_workers, "loader") if data.num_workers else None
        self._pending: dict[int, Future[list[MicroBatch]]] = {}
        self._ahead = Ahead(sources, self._touch) if sources.is_remote else None

    @property
    def first_rows(self) -> list[int]:
        """Row of the global batch that each micro batch of this rank begins with, the same at every step."""
        return self._rows[:, 0].tolist()

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Micro batches of this rank at a step, counted from 0.

        Steps may be asked for in any order; the next ones are read ahead. An error while reading ahead is raised by the
        call for its step.
        """
        if self._ahead is not None:
            self._ahead.fetch(step, lambda ahead: (ahead * self._global_batch_sequences + self._rows).ravel())
        if self._pool is None:
            return self._read_step(step)
        wanted = range(step, step + self._steps_ahead + 1)
        for other in self._pending.keys() - set(wanted):
            self._pending.pop(other).cancel()
        for ahead in wanted:
            if ahead not in self._pending:
                self._pending[ahead] = self._pool.submit(self._read_step, ahead)
        return self._pending.pop(step).result()

    def validation_batches(self, sequences: int, recall: RecallRows | None = None) -> Iterator[MicroBatch]:
        """Up to `sequences` held-out sequences over all ranks, the same at every call and as many batches on each rank.

        recall: slices of the same sequences, and probes to read after them. Only held-out sequences are in the loss; those that
        fill the last batches up are in no slice either. Raises DataError if no sequence is held out.
        """
        chosen, readers = self._sources.validation_sequences(sequences), list[Sequences](self._sources.validation)
        held_out = len(chosen)
        if recall is not None:
            chosen = chosen + [(len(readers), number) for number in range(len(recall.probes))]
            readers.append(recall.probes)
        per_round = self._micro_batch_sequences * self._dp_size
        rounds = -(-len(chosen) // per_round)
        padded = chosen + [chosen[-1]] * (rounds * per_round - len(chosen))
        mine = np.arange(len(padded)).reshape(rounds, self._dp_size, self._micro_batch_sequences)[:, self._dp_rank]
        batches = (
            dataclasses.replace(
                self._micro_batch(readers, [padded[i] for i in row], counted=int((row < held_out).sum())),
                slices_BL=None if recall is None else self._slices(recall, row, len(chosen)),
            )
            for row in mine
        )
        return batches if self._prefix is None else map(self._prefix.causal, batches)

    def documents(self, step: int) -> list[str]:
        """Source and document numbers of the first sequences of a step, over all ranks."""
        numbers = step * self._global_batch_sequences + np.arange(self._global_batch_sequences, dtype=np.int64)
        chosen = self._sources.locate(numbers[:SEQUENCES_NAMED])
        found = []
        for source, sequence in chosen:
            first, last = self._sources.train[source].document_range(sequence)
            found.append(f"{self._sources.names[source]}:{first}" + (f"-{last}" if last > first else ""))
        return found

    def close(self) -> None:
        """Stop reading ahead."""
        if self._ahead is not None:
            self._ahead.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pending.clear()

    def _touch(self, source: int, sequence: int) -> None:
        """Read what a micro batch has of a sequence, and throw it away."""
        reader = self._sources.train[source]
        reader.tokens(sequence, self._slice.start, self._slice.stop + 1)
        if self._isolate_documents:
            reader.document_starts(sequence)

    def _read_step(self, step: int) -> list[MicroBatch]:
        mine = step * self._global_batch_sequences + self._rows
        chosen, size = self._sources.locate(mine.ravel()), self._micro_batch_sequences
        batches = [
            self._micro_batch(self._sources.train, chosen[first : first + size], counted=size)
            for first in range(0, len(chosen), size)
        ]
        if self._prefix is not None:
            batches = [self._prefix.masked(batch, row.tolist()) for batch, row in zip(batches, mine, strict=True)]
        return [
            dataclasses.replace(batch, row=row, documents=self._with_past(batch.documents, numbers))
            for batch, row, numbers in zip(batches, self.first_rows, mine, strict=True)
        ]

    def _with_past(self, documents: Documents | None, numbers: np.ndarray) -> Documents | None:
        if documents is None or not self._carries_state:
            return documents
        return Documents(documents.starts, tuple(self._sources.tokens_before(number) for number in numbers.tolist()))

    def _slices(self, recall: RecallRows, numbers: np.ndarray, count: int) -> torch.Tensor:
        """This rank's part [B, L] of the slice numbers of these rows, of which only the first `count` are not filling."""
        filling = np.full(self._bounds[-1], NO_SLICE, np.uint8)
        rows = [recall.row(number) if number < count else filling for number in numbers.tolist()]
        return torch.from_numpy(np.stack(rows)[:, self._slice].copy())

    def _micro_batch(self, readers: Sequence[Sequences], chosen: list[tuple[int, int]], counted: int) -> MicroBatch:
        """Micro batch of these (source, sequence), of which this rank reads its slice; only the first `counted` have a loss."""
        begin, end, names = self._slice.start, self._slice.stop, [*self._sources.names, PROBES]
        # In NumPy: in a thread that reads, PyTorch would start threads of its own for these.
        tokens_BL, labels_BL = np.empty((2, len(chosen), end - begin), np.int64)
        mask_BL = np.ones((len(chosen), end - begin), np.float32)
        rows = []
        for row, (source, sequence) in enumerate(chosen):
            window = readers[source].tokens(sequence, begin, end + 1)
            tokens_BL[row], labels_BL[row] = window[:-1], window[1:]
            if self._isolate_documents:
                starts = readers[source].document_starts(sequence)
                # The label at a document's eos is the first token of the next document.
                mask_BL[row, starts[(starts > begin) & (starts <= end)] - 1 - begin] = 0
                rows.append(torch.from_numpy(starts[starts < self._bounds[-1]]))
        mask_BL[counted:] = 0
        return MicroBatch(
            tokens_BL=torch.from_numpy(tokens_BL),
            labels_BL=torch.from_numpy(labels_BL),
            loss_mask_BL=torch.from_numpy(mask_BL),
            documents=Documents(tuple(rows)) if self._isolate_documents else None,
            bounds=self._bounds,
            sources=tuple(names[source] for source, _ in chosen) if len(self._sources.names) > 1 else (),
        )


def build_loader(config: Config, topology: "Topology", sources: Sources) -> Loader:
    """This rank's view of the prepared data."""
    return Loader(
        sources,
        config.data,
        global_batch_sequences=config.train.global_batch_sequences,
        micro_batch_sequences=config.train.micro_batch_sequences,
        dp_rank=topology.data.rank,
        dp_size=topology.data.size,
        cp_rank=topology.context.rank,
        cp_size=topology.context.size,
        slice_multiple=slice_multiple(config.parallel),
        prefix=build_prefix(config),
    )
