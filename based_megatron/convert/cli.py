"""The commands `based import` and `based export`. What takes seconds to load is imported after the command line is read."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from based_megatron.config import Config
from based_megatron.errors import CheckpointError, ConfigError

Source = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
Checkpoint = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]


def main_import(argv: Sequence[str]) -> None:
    """Run `based import`."""
    tyro.cli(import_weights, prog="based import", args=list(argv))


def main_export(argv: Sequence[str]) -> None:
    """Run `based export`."""
    tyro.cli(export_weights, prog="based export", args=list(argv))


def import_weights(source: Source, output: Path, mixers: str = "") -> None:
    """Make a checkpoint, to continue training from, out of released or exported weights.

    Args:
        source: Folder in the layout of the released Based models, or a Hugging Face export of ours.
        output: Run folder to create, with the weights as the checkpoint of step 0.
        mixers: Modules of mixers that an export has and that are not ours, as in model.mixers.
    """
    if output.exists():
        raise CheckpointError(f"{output} exists already: choose another --output, or remove it")
    from based_megatron.checkpoint.full import write_full
    from based_megatron.convert.exported import is_export, read_export
    from based_megatron.convert.layout import count_parameters
    from based_megatron.convert.released import from_released

    weights, model = read_export(source, mixers) if is_export(source) else from_released(source)
    try:
        checkpoint = write_full(output, weights, Config(run_dir=str(output), model=model))
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)  # what is left of it would be in the way of another try
        raise
    print(f"{model.layer_pattern}, {count_parameters(model):,} parameters\nwrote {checkpoint}")


def export_weights(
    checkpoint: Checkpoint,
    output: Path,
    format: Literal["hf", "released"] = "hf",
    tokenizer: Path | None = None,
) -> None:
    """Write the weights of a checkpoint as a model for Hugging Face transformers, or in the released layout.

    Args:
        checkpoint: A checkpoint, or a run folder: its newest valid checkpoint.
        output: Folder to create.
        format: hf is checked after writing, with the results in its README.md; released is that of the Based authors.
        tokenizer: Folder of the tokenizer to put into an hf export. Default: the data folder that the model was
            trained on, where that is still there.
    """
    from based_megatron.checkpoint.full import read_full
    from based_megatron.convert.exported import data_folder
    from based_megatron.convert.huggingface import export_huggingface
    from based_megatron.convert.layout import check_finite
    from based_megatron.convert.released import to_released

    weights, config = read_full(checkpoint)
    check_finite(weights, checkpoint)
    if format == "released" and tokenizer is not None:
        raise ConfigError("the released layout has no tokenizer: leave --tokenizer out, or set --format hf")
    if format == "released":
        to_released(weights, config.model, output)
    else:
        tokenizer = tokenizer or data_folder(config)
        proof = export_huggingface(weights, config.model, output, tokenizer)
        print(
            f"reloaded: {proof.tensors} tensors bit-equal, logits within {proof.reload_difference:.2g}; decoding with "
            f"the cache within {proof.cache_difference:.2g}, left padding within {proof.padding_difference:.2g}, "
            f"{proof.generated_tokens} greedy tokens equal"
        )
        if tokenizer is None:
            print("no tokenizer was exported: the data folder of the run is not here; add one with --tokenizer")
    print(f"wrote {output}")
