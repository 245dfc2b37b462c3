"""The commands `based import`, `based export` and `based verify-export`. What takes seconds to load is imported later."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from based_megatron.config import Config
from based_megatron.errors import ConfigError

Source = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
Checkpoint = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]


def main_import(argv: Sequence[str]) -> None:
    """Run `based import`."""
    tyro.cli(import_weights, prog="based import", args=list(argv))


def main_export(argv: Sequence[str]) -> None:
    """Run `based export`."""
    tyro.cli(export_weights, prog="based export", args=list(argv))


def main_verify(argv: Sequence[str]) -> int:
    """Run `based verify-export`; returns the exit code."""
    return tyro.cli(verify_export, prog="based verify-export", args=list(argv))


def import_weights(source: Source, output: Path, mixers: str = "") -> None:
    """Make a checkpoint, to continue training from, out of released or exported weights.

    Args:
        source: Folder in the layout of the released Based models, or a Hugging Face export of ours.
        output: Run folder to create, with the weights as the checkpoint of step 0.
        mixers: Modules of mixers that an export has and that are not ours, as in model.mixers.
    """
    from based_megatron.checkpoint.full import write_full
    from based_megatron.convert.exported import is_export, read_export
    from based_megatron.convert.folder import new_folder
    from based_megatron.convert.layout import count_parameters
    from based_megatron.convert.released import from_released

    with new_folder(output) as folder:
        weights, model = read_export(source, mixers) if is_export(source) else from_released(source)
        checkpoint = write_full(folder, weights, Config(run_dir=str(output), model=model))
    print(f"{model.layer_pattern}, {count_parameters(model):,} parameters")
    print(f"wrote {output / checkpoint.relative_to(folder)}")


def export_weights(
    checkpoint: Checkpoint,
    output: Path,
    format: Literal["hf", "released"] = "hf",
    tokenizer: Path | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    max_shard_size: str = "5GB",
    license: str = "",
) -> None:
    """Write the weights of a checkpoint as a model for Hugging Face transformers, or in the released layout.

    Args:
        checkpoint: A checkpoint, or a run folder: its newest valid checkpoint.
        output: Folder to create.
        format: hf is checked after writing, with the results in its README.md; released is that of the Based authors.
        tokenizer: Folder of the tokenizer to export. Default: the data folder that the model was trained on, where
            that is still there.
        dtype: What the weights of an hf export are stored in, and loaded in by default.
        max_shard_size: The most that one file of weights of an hf export may have, such as 500MB or 5GB.
        license: License for the model card of an hf export, such as apache-2.0.
    """
    if format == "released" and (dtype, max_shard_size, license) != ("float32", "5GB", ""):
        raise ConfigError(
            "the released layout is one file in float32 without a card: set --format hf, or leave the other options out"
        )
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?[KMGT]i?B", max_shard_size):
        raise ConfigError(
            f"--max-shard-size {max_shard_size!r} is no size: write a number and KB, MB or GB, such as 5GB"
        )
    if not re.fullmatch(r"[\w.+-]*", license):
        raise ConfigError(f"--license {license!r} is no identifier of a license: write one word, such as apache-2.0")
    import torch

    from based_megatron.checkpoint.full import read_whole
    from based_megatron.convert.folder import check_new
    from based_megatron.convert.huggingface import Form, export_huggingface
    from based_megatron.convert.layout import check_finite
    from based_megatron.convert.origin import origin_of
    from based_megatron.convert.released import to_released
    from based_megatron.convert.tokenizer import data_folder
    from based_megatron.data_prep.tokenizer import load_tokenizer

    check_new(output)
    if tokenizer is not None:
        load_tokenizer(str(tokenizer))
    whole = read_whole(checkpoint)
    check_finite(whole.weights, whole.path)
    origin = origin_of(whole)
    tokenizer = tokenizer or data_folder(whole)
    model = whole.config.model
    print(f"step {origin.step:,}, {origin.tokens:,} tokens trained, of {whole.path}")
    if format == "released":
        to_released(whole.weights, model, output, tokenizer, origin.sequence_length_tokens)
    else:
        form = Form(getattr(torch, dtype), max_shard_size)
        proof = export_huggingface(whole.weights, model, output, tokenizer, form, origin, license)
        print(
            f"reloaded: {proof.tensors} tensors bit-equal, logits within {proof.reload_difference:.2g}; decoding with "
            f"the cache within {proof.cache_difference:.2g}, left padding within {proof.padding_difference:.2g}, "
            f"{proof.generated_tokens} greedy tokens equal"
        )
        if dtype != "float32":
            print(
                f"run in {dtype}: logits within {proof.dtype_difference:.2g} of float32, the largest is {proof.logits_scale:.2g}"
            )
    if tokenizer is None:
        print("no tokenizer was exported: the data folder of the run is not here; add one with --tokenizer")
    print(f"wrote {output}")


def verify_export(folder: Folder) -> int:
    """Compare the files of an export with the hashes that were written with it; exit code 1 if one differs.

    Args:
        folder: A folder that `based export` has written.
    """
    from based_megatron.convert.checksums import damage

    wrong = damage(folder)
    print(f"{folder}: {'; '.join(wrong) or 'ok'}")
    return 1 if wrong else 0
