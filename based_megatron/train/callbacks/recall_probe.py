"""Recall while training: what the slices of a validation say of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from based_megatron.checkpoint.ranks import Ranks
from based_megatron.config import Config
from based_megatron.config.validate import validated_sequences
from based_megatron.data.batch import MicroBatch
from based_megatron.data.loader import Loader
from based_megatron.data.probes import ProbeSequences
from based_megatron.data.recall import RecallRows, slices_in_turns, training_tokens
from based_megatron.data.slices import FIRST, Slices, slices_of
from based_megatron.data.sources import Sources
from based_megatron.monitor.sinks.base import perplexity
from based_megatron.train.callbacks.validator import Validator, read_on_all
from based_megatron.train.step import LossSum

if TYPE_CHECKING:
    from based_megatron.train.trainer import Trainer

Pair = tuple[float, float]


class RecallProbe(Validator):
    """A validation whose tokens are in slices, with probes after them: one pass gives the loss and all of recall."""

    def __init__(self, batches: Sequence[MicroBatch], rows: RecallRows, pipeline_size: int) -> None:
        super().__init__(batches, pipeline_size)
        self._slices, self._chances = rows.slices, rows.probes.chances

    def measured(self, trainer: Trainer, found: LossSum) -> None:
        assert found.slices is not None
        recall = Recall(self._slices, [(total, tokens) for total, tokens in found.slices.tolist()])
        for name, value in recall.metrics().items():
            trainer.metrics.record(f"recall/{name}", value, "last")
        trainer.record("recall", **recall.tables(), chance=self._chances)


class Recall:
    """The losses of a validation by slice."""

    def __init__(self, slices: Slices, sums: Sequence[Pair]) -> None:
        """sums: summed loss and tokens of each slice, by number."""
        self._slices, self._sums = slices, sums

    def metrics(self) -> dict[str, float]:
        """What is drawn over steps, by name; what no token is in has none."""
        slices = self._slices
        hits = self._sum(lambda _, kind: kind in slices.distances)
        others = self._sum(lambda _, kind: kind not in slices.distances)
        tokens = hits[1] + others[1]
        found = {
            "ar_ppl": perplexity(hits[0] / hits[1]) if hits[1] else None,
            "other_ppl": perplexity(others[0] / others[1]) if others[1] else None,
            "ar_share": hits[1] / tokens if tokens else None,
        }
        for count in slices.counts:
            first, repeat = _mean(self._first(count)), _mean(self._repeat(count))
            found[f"gain_by_count/{count}"] = None if first is None or repeat is None else first - repeat
        found |= {f"loss_by_distance/{distance}": _mean(self._at(distance)) for distance in slices.distances}
        found |= {name: _mean(self._sums[slices.of_probe(name)]) for name in slices.probes}
        return {name: value for name, value in found.items() if value is not None}

    def tables(self) -> dict[str, Any]:
        """Mean losses in nats (None without tokens) and tokens, by training count and by distance, and the loss of probes."""
        slices, metrics = self._slices, self.metrics()
        return {
            **{name: metrics.get(name) for name in ("ar_ppl", "other_ppl", "ar_share")},
            "rare_count": slices.rare_count,
            "by_count": {
                count: {FIRST: _row(self._first(count)), "repeat": _row(self._repeat(count))} for count in slices.counts
            },
            "by_distance": {distance: _row(self._at(distance)) for distance in slices.distances},
            "probes": {name: metrics.get(name) for name in slices.probes},
        }

    def _first(self, count: str) -> Pair:
        return self._sum(lambda found, kind: found == count and kind == FIRST)

    def _repeat(self, count: str) -> Pair:
        return self._sum(lambda found, kind: found == count and kind != FIRST)

    def _at(self, distance: str) -> Pair:
        return self._sum(lambda _, kind: kind == distance)

    def _sum(self, holds: Callable[[str, str], bool]) -> Pair:
        """Summed loss and tokens of all slices of validation tokens whose bin of counts and kind are asked for."""
        chosen = [self._sums[number] for number, key in enumerate(self._slices.keys) if holds(*key)]
        return math.fsum(total for total, _ in chosen), math.fsum(tokens for _, tokens in chosen)


def recall_probe(config: Config, loader: Loader, sources: Sources, ranks: Ranks, pipeline_size: int) -> RecallProbe:
    """The validation that measures recall (collective): rank 0 looks at the data for all. Raises DataError if it is damaged."""
    validation, length = config.validation, config.data.sequence_length_tokens
    sequences = validated_sequences(config)
    probes = ProbeSequences(sources.manifests[0].vocab_size, length, validation.recall_probe_sequences)
    names = tuple(probe.name for probe in probes.probes)
    window = config.model.window_left
    slices = slices_of(training_tokens(sources), validation.recall_rare_count, window, names)
    limit_tokens, run_dir = validation.recall_counted_tokens, Path(config.run_dir)
    turns = slices_in_turns(sources, sequences, slices, limit_tokens, run_dir)
    # In turns of one block, so that ranks that wait for rank 0 do not run into the timeout of a collective.
    while (held_out := ranks.on_first(lambda: next(turns))) is None:
        pass
    rows = RecallRows(held_out, probes, slices)
    batches = read_on_all(loader.validation_batches(sequences, rows), ranks)
    return RecallProbe(batches, rows, pipeline_size)


def _mean(pair: Pair) -> float | None:
    total, tokens = pair
    return total / tokens if tokens else None


def _row(pair: Pair) -> list[float | int | None]:
    return [_mean(pair), int(pair[1])]
