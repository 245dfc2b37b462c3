"""The tokenizer of a run, found again and written into an export."""

import json
import sys
from pathlib import Path

from based_megatron.checkpoint.full import Whole
from based_megatron.data.manifest import TOKENIZER_NAME, fingerprint_at
from based_megatron.data_prep.tokenizer import TOKENIZER_CONFIG_NAME, Encoder, load_tokenizer
from based_megatron.errors import CheckpointError


def data_folder(whole: Whole) -> Path | None:
    """The data folder that holds the tokenizer of a checkpoint's run, if it is still there: all sources of a mixture have the same one.

    A relative path is looked up in the folder that the run was started in, as far as its run folder says, and in this process's. A
    folder whose corpus is not the one of the training, by its fingerprint, is left out, which a line on stderr says.
    """
    trained_on = _fingerprints(whole)
    for folder in _candidates(whole):
        if not (folder / TOKENIZER_NAME).is_file():
            continue
        found = fingerprint_at(folder)
        if not trained_on or found in trained_on:
            return folder
        print(
            f"the tokenizer of {folder} was left out: that corpus has the fingerprint {found}, the training data had "
            f"{' and '.join(sorted(trained_on))}",
            file=sys.stderr,
        )
    return None


def write_tokenizer(tokenizer: Path, folder: Path, vocab_size: int, sequence_length_tokens: int | None) -> Encoder:
    """Write a tokenizer that AutoTokenizer loads from `folder`; it pads on the left.

    `tokenizer` is a folder written by `based prep`, or one with a tokenizer.json or the GPT-2 pair. Raises DataError if it cannot be
    read, CheckpointError if the model has no rows for it.
    """
    encoder = load_tokenizer(str(tokenizer))
    if encoder.vocab_size > vocab_size:
        raise CheckpointError(
            f"the tokenizer of {tokenizer} has {encoder.vocab_size} entries, the model only {vocab_size}: "
            f"give that of the training data with --tokenizer"
        )
    encoder.save(folder)
    settings_file = folder / TOKENIZER_CONFIG_NAME
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    settings |= {"pad_token": encoder.eos_token, "padding_side": "left"}
    if sequence_length_tokens is not None:
        settings["model_max_length"] = sequence_length_tokens
    settings_file.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return encoder


def _candidates(whole: Whole) -> list[Path]:
    data = whole.config.data
    named = [path for path in (data.path, *(source.path for source in data.sources)) if path]
    started_in = _started_in(whole.path, whole.config.run_dir)
    there = [started_in / path for path in named] if started_in is not None else []
    return list(dict.fromkeys([*there, *(Path.cwd() / path for path in named)]))


def _started_in(checkpoint: Path, run_dir: str) -> Path | None:
    """The folder that a run was started in: its run folder's place, without its name in the config. None if it was moved."""
    run, name = checkpoint.resolve().parent.parent, Path(run_dir)
    if name.is_absolute() or run.parts[-len(name.parts) :] != name.parts:
        return None
    return run.parents[len(name.parts) - 1]


def _fingerprints(whole: Whole) -> set[str]:
    """Fingerprints of the corpora; none for weights that were not trained here. See data/sources.py for their form."""
    corpora = str(whole.state.get("data_fingerprint", "")).partition("/")[0]
    return {corpus.partition("*")[0] for corpus in corpora.split("+") if corpus}
