"""`based prep`: corpus -> tokenizer -> units of tokenized documents -> shuffled, packed blocks in shards and a manifest, all or nothing.

What is finished of this is kept in OUTPUT.units: a start after a kill, or with more inputs, does what is left.
"""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from based_megatron.data.manifest import TOKENIZER_NAME, Manifest, Split, make_manifest, save_manifest
from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.corpus import Corpus, Skips
from based_megatron.data_prep.duplicates import duplicates
from based_megatron.data_prep.engines import engine_of
from based_megatron.data_prep.output import SPLITS, resolved_output, units_of, workplace
from based_megatron.data_prep.pieces import Piece, pieces_of
from based_megatron.data_prep.progress import Plan, Progress
from based_megatron.data_prep.shuffle import Sizes, WriteShards, blocks_of, order_key, plan_shards
from based_megatron.data_prep.stdin import STDIN, stdin_as_file
from based_megatron.data_prep.tasks import Engine
from based_megatron.data_prep.tokenizer import Encoder, load_tokenizer
from based_megatron.data_prep.train_tokenizer import train_on, training_key
from based_megatron.data_prep.unit_store import FinishedUnit, UnitStore
from based_megatron.data_prep.units import (
    ReadPieces,
    TokenizeUnits,
    Unit,
    as_units,
    digested,
    groups,
    options_key,
    place_of,
    remembered_digests,
)
from based_megatron.errors import DataError
from based_megatron.run_folder.whole_file import whole_file

logger = logging.getLogger(__name__)

LEFT_OUT = "left_out.npy"
MAX_BLOCK_TOKENS = 2**28
"""A block is in memory several times while it is written: some 4 GiB of uint32."""


def prepare(config: PrepConfig) -> Manifest:
    """Write the prepared corpus to config.output and return its manifest.

    Everything is written to a workplace next to the output (output.py), which gets the output's name when it is complete; a failure
    removes it, but not the finished units (unit_store.py). Raises DataError: no documents, no tokenizer, an output in the way or at
    work, a full disk.
    """
    check(config)
    with stdin_as_file(config) as with_files:
        return _prepare(with_files)


def _prepare(config: PrepConfig) -> Manifest:
    output = resolved_output(config.output)
    corpus = Corpus(config)
    try:
        with workplace(output, config.overwrite) as place, Progress() as progress:
            store = UnitStore(units_of(output))
            store.open()
            try:
                with engine_of(config, store.folder) as engine:
                    manifest = _Preparation(config, corpus, store, place.corpus, engine, progress).run()
                place.publish()
                if not config.keep_units:
                    store.remove()
            finally:
                store.remove_if_empty()
    except OSError as error:
        raise DataError(
            f"cannot write {output}: {error.strerror or error}; make room or change --output, and start again to go on"
        ) from error
    return dataclasses.replace(manifest, folder=Path(config.output))


def check(config: PrepConfig) -> None:
    """Raise DataError for settings that no start can have."""
    if not 0 <= config.validation_fraction < 1:
        raise DataError(f"--validation-fraction {config.validation_fraction} is not in [0, 1)")
    if config.max_skipped is not None and (config.max_skipped < 0 or (config.strict and config.max_skipped)):
        raise DataError(f"--max-skipped is {config.max_skipped}: set 0 or more, and with --strict nothing else than 0")
    if config.tasks < 0:
        raise DataError(f"--tasks is {config.tasks} but must be at least 1, or 0 for one a core")
    if not config.tasks and config.executor in ("slurm", "ray"):
        raise DataError(f"--executor {config.executor} cannot tell how many tasks to start: set --tasks")
    if config.executor in ("slurm", "ray") and STDIN in config.inputs:
        raise DataError(
            f"other nodes cannot read the standard input of this one: give files to --executor {config.executor}"
        )
    for flag in ("unit_bytes", "block_tokens", "shard_blocks", "train_tokenizer_bytes"):
        if getattr(config, flag) < 1:
            raise DataError(f"--{flag.replace('_', '-')} is {getattr(config, flag)} but must be at least 1")
    if config.block_tokens > MAX_BLOCK_TOKENS:
        raise DataError(
            f"--block-tokens {config.block_tokens} is more than a block can have: set at most {MAX_BLOCK_TOKENS}"
        )


@dataclasses.dataclass(frozen=True)
class _Preparation:
    """The steps of one start."""

    config: PrepConfig
    corpus: Corpus
    store: UnitStore
    folder: Path
    """Where the corpus is written."""
    engine: Engine
    progress: Progress

    def run(self) -> Manifest:
        """Write the corpus."""
        tokenizer_key, encoder = self._tokenizer()
        encoder.save(self.folder)
        tokenizer_xxh3 = xxhash.xxh3_128_hexdigest((self.folder / TOKENIZER_NAME).read_bytes())
        skips = Skips(most=0 if self.config.strict else self.config.max_skipped)
        units = self._tokenize(options_key(self.config, tokenizer_xxh3), skips)
        _check_documents(self.config, units, skips)
        sizes = Sizes(encoder.dtype.str, self.config.block_tokens, self.config.shard_blocks)
        splits = self._write(units, sizes, skips)
        self.store.keep_only(tokenizers={tokenizer_key}, units={unit.key for unit in units}, shards=())
        manifest = make_manifest(
            tokenizer_xxh3=tokenizer_xxh3,
            vocab_size=encoder.vocab_size,
            dtype=encoder.dtype.name,
            eos_id=encoder.eos_id,
            splits=splits,
            skipped=dict(sorted(skips.counts.items())),
            folder=self.folder,
        )
        save_manifest(manifest)
        return manifest

    def _tokenizer(self) -> tuple[str, Encoder]:
        """The tokenizer, and its key among trained ones; empty if it is not one of these."""
        if self.config.tokenizer != "train":
            return "", load_tokenizer(self.config.tokenizer, self.config.eos_token)
        key = training_key(self.config, self.corpus.files)
        place = self.store.path("tokenizers", key)
        if not place.is_dir():
            total_bytes = min(self.corpus.total_bytes, self.config.train_tokenizer_bytes)
            with self.progress.stage("train tokenizer", total_bytes) as tell, self.store.new("tokenizers", key) as new:
                train_on(self.corpus, self.config, tell).save(new)
        return key, load_tokenizer(str(place))

    def _tokenize(self, options: str, skips: Skips) -> list[FinishedUnit]:
        """The first pass: all units, finished."""
        finished = self.store.finished()
        units, left = as_units(self._pieces(finished), options, finished, self.config.unit_bytes)
        wanted: list[FinishedUnit | Unit] = [*units, *left]
        plan = Plan(self.engine.count, time.time(), tuple((unit.key, unit.bytes) for unit in wanted))
        plan.save(self.store.folder)
        for unit in units:
            skips.merge(unit.counts, unit.events, unit.skipped)
        if units and left:
            logger.warning("%d of %d units of work are finished already", len(units), len(wanted))
        work = TokenizeUnits(self.config, self.store.folder, self.folder)
        with self.progress.stage("tokenize", plan.bytes, sum(unit.bytes for unit in units)) as tell:
            for unit in self.engine.run(work, left, tell):
                skips.merge(unit.counts, unit.events, unit.skipped)
                units.append(unit)
        return sorted(units, key=lambda unit: unit.key)

    def _pieces(self, finished: Mapping[str, FinishedUnit]) -> list[Piece]:
        """All pieces of the inputs, with their contents."""
        pieces = [piece for file in self.corpus.files for piece in pieces_of(file, self.config.unit_bytes)]
        known = remembered_digests(finished.values())
        unknown = [piece for piece in pieces if place_of(piece) not in known]
        with self.progress.stage("read", sum(piece.bytes for piece in unknown)) as tell:
            for found in self.engine.run(ReadPieces(), list(groups(unknown, self.config.unit_bytes)), tell):
                known.update(found)
        return digested(pieces, [known[place_of(piece)] for piece in pieces])

    def _write(self, units: Sequence[FinishedUnit], sizes: Sizes, skips: Skips) -> dict[str, Split]:
        """The second pass: all shards, in the corpus's folder."""
        unit_folder = self.store.folder / "units"
        left_out = duplicates(units, unit_folder) if self.config.deduplicate else np.empty(0, np.uint64)
        if len(left_out):
            skips.counts["duplicate"] += len(left_out)
        written = self.store.path("shards", order_key(units, sizes, left_out))
        written.mkdir(exist_ok=True)
        with whole_file(written / LEFT_OUT, binary=True) as stream:
            np.save(stream, left_out)
        work = WriteShards(tuple(units), unit_folder, written, sizes, written / LEFT_OUT)
        plans = {split: plan_shards(units, unit_folder, split, sizes, left_out) for split in SPLITS}
        shards = [shard for split in SPLITS for shard in plans[split][0]]
        blocks = {shard: found for shard in shards if (found := blocks_of(written, shard)) is not None}
        left = [shard for shard in shards if shard not in blocks]
        for split in SPLITS:
            (written / split).mkdir(exist_ok=True)
        with self.progress.stage("write shards", sum(work.bytes_of(shard) for shard in left)) as tell:
            blocks.update(self.engine.run(work, left, tell))
        for split in SPLITS:
            (self.folder / split).mkdir()
        for shard in shards:
            (written / shard.file).rename(self.folder / shard.file)
        return {
            split: Split(
                documents=plans[split][1].documents,
                tokens=plans[split][1].tokens,
                members=tuple(block for shard in shards if shard.split == split for block in blocks[shard]),
            )
            for split in SPLITS
        }


def _check_documents(config: PrepConfig, units: Sequence[FinishedUnit], skips: Skips) -> None:
    documents = {split: sum(unit.splits[split].documents for unit in units) for split in SPLITS}
    if not sum(documents.values()):
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(skips.counts.items())) or "none"
        raise DataError(
            f"no documents in {', '.join(config.inputs) or 'the inputs'} (skipped: {skipped}); "
            f"check the inputs and --text-key"
        )
    if not documents["train"]:
        raise DataError(
            f"all {documents['validation']} documents fell into the validation split: lower --validation-fraction "
            f"{config.validation_fraction} or split the text into more documents with --separator"
        )
    if config.validation_fraction and not documents["validation"]:
        logger.warning(
            "none of the %d documents fell into the validation split: "
            "raise --validation-fraction %g or split the text with --separator",
            documents["train"],
            config.validation_fraction,
        )
