"""The command `based prep`."""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import tyro

from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.engines import is_to_be_submitted, submit
from based_megatron.data_prep.prepare import check, prepare
from based_megatron.data_prep.status import status_of


@dataclass(frozen=True)
class _StatusConfig:
    """Say how far a `based prep` is, while it runs and after, from what is on disk."""

    output: tyro.conf.Positional[str]
    """The folder that it writes."""


def main(argv: list[str]) -> None:
    """Parse the command line, prepare the corpus and say what was made; or, of `status OUTPUT`, say how far that is."""
    if argv[:1] == ["status"]:
        print(status_of(tyro.cli(_StatusConfig, args=argv[1:], prog="based prep status").output))
        return
    config = tyro.cli(PrepConfig, args=argv, prog="based prep")
    if is_to_be_submitted(config):
        check(config)
        job = submit(config, argv)
        print(f"job {job}, log {config.output}.slurm-{job}.log; `based prep status {config.output}` says how far it is")
        return
    with _cleaned_up_at_sigterm():
        manifest = prepare(config)
    for name, split in manifest.splits.items():
        print(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens")
    skipped = ", ".join(f"{count} {reason}" for reason, count in manifest.skipped.items())
    print(f"skipped: {skipped or 'nothing'}")
    print(f"wrote {manifest.folder} (vocabulary of {manifest.vocab_size:,}, {manifest.dtype})")


@contextlib.contextmanager
def _cleaned_up_at_sigterm() -> Iterator[None]:
    """SIGTERM, the end of a SLURM job's time, ends the process as an error does: what it has written is removed."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
