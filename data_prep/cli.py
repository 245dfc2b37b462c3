"""The command `based prep`."""

import tyro

from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.prepare import prepare


def main(argv: list[str]) -> None:
    """Parse the command line, prepare the corpus and say what was made."""
    manifest = prepare(tyro.cli(PrepConfig, args=argv, prog="based prep"))
    for name, split in manifest.splits.items():
        print(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens")
    skipped = ", ".join(f"{count} {reason}" for reason, count in manifest.skipped.items())
    print(f"skipped: {skipped or 'nothing'}")
    print(f"wrote {manifest.folder} (vocabulary of {manifest.vocab_size:,}, {manifest.dtype})")
