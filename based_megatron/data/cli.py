"""The command `based data`: look at prepared corpora and at what a training step was made of."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from based_megatron.config import Config
from based_megatron.config.load import load_config, load_run_config
from based_megatron.config.schema import DataConfig, SourceConfig, TrainConfig
from based_megatron.data.documents import documents_of_step
from based_megatron.data.jumps import DataJumps
from based_megatron.data.manifest import Manifest, verify
from based_megatron.data.remote import open_corpus
from based_megatron.data.sources import Sources
from based_megatron.errors import ConfigError
from based_megatron.monitor.events import read_events
from based_megatron.run_folder.files import CONFIG, EVENTS
from based_megatron.run_folder.whole_file import whole_file

PREVIEW_CHARACTERS = 60
STEPS_SHOWN = 5
TELL_JUMPS = ("start", "resume", "rollback")
"""Events that say which data the run has stepped over so far."""


@dataclass(frozen=True)
class DataCommand:
    """Look at prepared corpora.

    `at` lists the documents of a training step, `show` says what a corpus holds, and with --step prints the text of one; `report`
    makes a page, `search` finds a string and the steps that read it, `verify` checks every byte.
    """

    action: tyro.conf.Positional[Literal["at", "show", "report", "search", "verify"]] = "at"
    """`at`, `show`, `report`, `search` or `verify`."""
    text: tyro.conf.Positional[str] = ""
    """The string to search for."""
    run: str = ""
    """Run folder; its config.yaml names the corpora, the batch, the sequence length and the seed."""
    config: str = ""
    """Preset or YAML file to take these from instead."""
    path: tuple[str, ...] = ()
    """Folders written by `based prep`, in equal parts, instead of a run or a config."""
    step: int | None = None
    """Step to list or print, counted from 1 as in logs and errors; `at` takes the first by default. With --run, the data that the
    newest of its tries trained on."""
    data_step: int = 0
    """Step of the order of the data to list, as events name it; it is that of the run until a rollback has stepped over some."""
    global_batch_sequences: int = 256
    """Sequences of a step, with --path."""
    sequence_length_tokens: int = 2048
    """Tokens of a sequence, with --path."""
    seed: int = 42
    """Seed of the order, with --path."""
    output: str = ""
    """HTML file that `report` writes, besides its table."""
    sample_tokens: int = 20_000_000
    """Tokens of each training split that `report` looks at, in blocks that lie evenly over it."""
    limit: int = 20
    """Places that `search` lists."""


def main(argv: list[str]) -> None:
    """Run `based data` with these arguments. Raises DataError or ConfigError."""
    command = tyro.cli(DataCommand, args=argv, prog="based data")
    config = _config(command)
    data, batch = config.data, config.train.global_batch_sequences
    jumps = jumps_of(Path(command.run)) if command.run else DataJumps()
    step = command.data_step or jumps.data_step((command.step or 1) - 1) + 1
    if command.action == "at":
        _list_step(Sources(data, batch), step, batch)
    elif command.action == "search":
        _search(config, command, jumps)
    elif command.action == "report":
        _report(data, command)
    elif command.action == "show" and (command.step or command.data_step):
        from based_megatron.data.step_text import lines_of_step

        for line in lines_of_step(config, Sources(data, batch), step):
            print(line)
    else:
        for manifest in _manifests(data):
            if command.action == "verify":
                verify(manifest)
                print(f"{manifest.place}: every sample matches its hash")
            else:
                _show(manifest)


def _manifests(data: DataConfig) -> list[Manifest]:
    return [
        open_corpus(path, data) for path in ([data.path] if data.path else [source.path for source in data.sources])
    ]


def _config(command: DataCommand) -> Config:
    if sum(map(bool, (command.run, command.config, command.path))) != 1:
        raise ConfigError("give one of --run RUN_DIR, --config NAME_OR_PATH and --path FOLDER")
    if bool(command.text) != (command.action == "search"):
        raise ConfigError("`based data search STRING` needs a string, and no other action takes one")
    counts = ("step", "global_batch_sequences", "sequence_length_tokens", "sample_tokens", "limit")
    for name, least in (*((name, 1) for name in counts), ("data_step", 0)):
        if (value := getattr(command, name)) is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if command.path:
        sources = tuple(SourceConfig(path=path) for path in command.path)
        data = DataConfig(sources=sources, sequence_length_tokens=command.sequence_length_tokens, seed=command.seed)
        return Config(data=data, train=TrainConfig(global_batch_sequences=command.global_batch_sequences))
    return load_run_config(Path(command.run) / CONFIG) if command.run else load_config(command.config)


def _search(config: Config, command: DataCommand, jumps: DataJumps) -> None:
    from based_megatron.data.search import find

    batch = config.train.global_batch_sequences
    sources = Sources(config.data, batch)
    # Folders alone say nothing of a run: those steps are listed that read each sequence once.
    steps = -(-sum(map(len, sources.train)) // batch) if command.path else config.train.steps
    print("source\tmember\tdocument\torigin\tsteps\ttext")
    last = jumps.data_step(steps - 1) + 1
    for found in itertools.islice(find(sources, command.text, last, batch), command.limit):
        read = [step + 1 for data_step in found.steps for step in jumps.steps_of(data_step) if step < steps]
        shown = ",".join(map(str, sorted(read)[:STEPS_SHOWN])) + (
            f" and {len(read) - STEPS_SHOWN} more" if len(read) > STEPS_SHOWN else ""
        )
        context = " ".join(found.context.split())
        print(found.source, found.member, found.document, found.origin, shown or "none", context, sep="\t")


def _report(data: DataConfig, command: DataCommand) -> None:
    from rich.console import Console

    from based_megatron.data.survey import survey
    from based_megatron.data.survey_page import page, table

    surveys = [survey(manifest, command.sample_tokens) for manifest in _manifests(data)]
    Console().print(table(surveys))
    if command.output:
        try:
            with whole_file(Path(command.output)) as stream:
                stream.write(page(surveys))
        except OSError as error:
            raise ConfigError(f"cannot write {command.output}: {error.strerror}; change --output") from error
        print(f"wrote {command.output}")


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
        f"{manifest.place}: vocabulary of {manifest.vocab_size:,}, {manifest.dtype}, fingerprint {manifest.fingerprint}"
    )
    for name, split in manifest.splits.items():
        shards = len(split.table.files)
        print(
            f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens, "
            f"{len(split.members):,} samples, {shards:,} shards"
        )
    skipped = ", ".join(f"{count} {reason}" for reason, count in manifest.skipped.items())
    print(f"  skipped: {skipped or 'nothing'}")
