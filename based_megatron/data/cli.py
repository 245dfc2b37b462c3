"""The command `based data`: look at prepared corpora and at what a training step was made of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from based_megatron.config.load import load_config, load_run_config
from based_megatron.config.schema import DataConfig, SourceConfig
from based_megatron.data.documents import documents_of_step
from based_megatron.data.jumps import DataJumps
from based_megatron.data.manifest import Manifest, load_manifest, verify
from based_megatron.data.sources import Sources
from based_megatron.errors import ConfigError
from based_megatron.monitor.events import read_events
from based_megatron.run_folder.files import CONFIG, EVENTS

PREVIEW_CHARACTERS = 60
TELL_JUMPS = ("start", "resume", "rollback")
"""Events that say which data the run has stepped over so far."""


@dataclass(frozen=True)
class DataCommand:
    """Look at prepared corpora.

    `at` lists the documents of a training step, `show` says what a corpus holds, `verify` checks every byte of it.
    """

    action: tyro.conf.Positional[Literal["at", "show", "verify"]] = "at"
    """`at`, `show` or `verify`."""
    run: str = ""
    """Run folder; its config.yaml names the corpora, the batch, the sequence length and the seed."""
    config: str = ""
    """Preset or YAML file to take these from instead."""
    path: tuple[str, ...] = ()
    """Folders written by `based prep`, in equal parts, instead of a run or a config."""
    step: int = 1
    """Step to list, counted from 1 as in logs and errors. With --run, the data that the newest of its tries trained on."""
    data_step: int = 0
    """Step of the order of the data to list, as events name it; it is that of the run until a rollback has stepped over some."""
    global_batch_sequences: int = 256
    """Sequences of a step, with --path."""
    sequence_length_tokens: int = 2048
    """Tokens of a sequence, with --path."""
    seed: int = 42
    """Seed of the order, with --path."""


def main(argv: list[str]) -> None:
    """Run `based data` with these arguments. Raises DataError or ConfigError."""
    command = tyro.cli(DataCommand, args=argv, prog="based data")
    data, global_batch_sequences = _data(command)
    if command.action == "at":
        jumps = jumps_of(Path(command.run)) if command.run else DataJumps()
        step = command.data_step or jumps.data_step(command.step - 1) + 1
        _list_step(Sources(data, global_batch_sequences), step, global_batch_sequences)
        return
    for path in [data.path] if data.path else [source.path for source in data.sources]:
        manifest = load_manifest(path)
        if command.action == "verify":
            verify(manifest)
            print(f"{path}: every sample matches its hash")
        else:
            _show(manifest)


def _data(command: DataCommand) -> tuple[DataConfig, int]:
    if sum(map(bool, (command.run, command.config, command.path))) != 1:
        raise ConfigError("give one of --run RUN_DIR, --config NAME_OR_PATH and --path FOLDER")
    if (
        command.step < 1
        or command.data_step < 0
        or command.global_batch_sequences < 1
        or command.sequence_length_tokens < 1
    ):
        raise ConfigError(
            "--step, --data-step, --global-batch-sequences and --sequence-length-tokens must be at least 1"
        )
    if command.path:
        sources = tuple(SourceConfig(path=path) for path in command.path)
        data = DataConfig(sources=sources, sequence_length_tokens=command.sequence_length_tokens, seed=command.seed)
        return data, command.global_batch_sequences
    config = load_run_config(Path(command.run) / CONFIG) if command.run else load_config(command.config)
    return config.data, config.train.global_batch_sequences


def jumps_of(run_dir: Path) -> DataJumps:
    """The data that a run has stepped over, by the newest word of its events."""
    path, jumps = run_dir / EVENTS, DataJumps()
    for event in read_events(path) if path.is_file() else ():
        if event.get("event") in TELL_JUMPS:
            jumps = DataJumps.read(event.get("data_jumps", ()))
    return jumps


def _list_step(sources: Sources, step: int, global_batch_sequences: int) -> None:
    print("sequence\tsource\tmember\tdocument\torigin\ttokens\ttext")
    for part in documents_of_step(sources, step, global_batch_sequences):
        preview = " ".join(part.preview.split())[:PREVIEW_CHARACTERS]
        print(part.sequence, part.source, part.member, part.document, part.origin, part.tokens, preview, sep="\t")


def _show(manifest: Manifest) -> None:
    print(
        f"{manifest.folder}: vocabulary of {manifest.vocab_size:,}, {manifest.dtype}, "
        f"fingerprint {manifest.fingerprint}"
    )
    for name, split in manifest.splits.items():
        shards = len(split.table.files)
        print(
            f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens, "
            f"{len(split.members):,} samples, {shards:,} shards"
        )
    skipped = ", ".join(f"{count} {reason}" for reason, count in manifest.skipped.items())
    print(f"  skipped: {skipped or 'nothing'}")
