"""What is decoded: weights, config and tokenizer of a run, a checkpoint or an export, and the model that is made of them."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from based_megatron.checkpoint.full import read_whole
from based_megatron.config import ModelConfig
from based_megatron.convert.exported import exported_length, is_export, read_export
from based_megatron.convert.tokenizer import data_folder
from based_megatron.data_prep.tokenizer import load_tokenizer
from based_megatron.errors import CheckpointError, ConfigError
from based_megatron.inference.engine import Engine
from based_megatron.kernels.backend import resolve_backend
from based_megatron.model.based_model import BasedModel
from based_megatron.model.build import whole_model
from based_megatron.parallel.linear import shard_spec
from based_megatron.parallel.topology import Topology

PIECE_TOKENS = 2048
"""Most tokens of a row that are computed at once."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from, and what is known of its training."""

    weights: dict[str, Tensor]
    model: ModelConfig
    tokenizer: Path | None
    sequence_length_tokens: int | None
    """Tokens of a training sequence; None for an export of weights that were not trained here."""


def read_source(path: Path, mixers: str = "") -> Source:
    """A Hugging Face export (none of its code runs), a checkpoint, or a run's newest checkpoint. Raises CheckpointError."""
    if is_export(path):
        weights, model = read_export(path, mixers)
        tokenizer = path if (path / "tokenizer.json").is_file() else None
        return Source(weights, model, tokenizer, exported_length(path))
    try:
        whole = read_whole(path)
    except CheckpointError as error:
        if path.is_dir() and (path / "config.json").is_file():
            raise CheckpointError(
                f"{path} is a model of another kind: give a run, a checkpoint or an export of ours"
            ) from error
        raise
    config = whole.config
    return Source(whole.weights, config.model, data_folder(whole), config.data.sequence_length_tokens)


def state_engine(
    source: Source, topology: Topology, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast | None = None
) -> Engine:
    """The engine of a model whose layers have states, on the device of the topology; tokenizer: where it may have fewer tokens."""
    model = training_model(source.weights, source.model, topology, dtype)
    tokens = None if tokenizer is None else len(tokenizer)
    return Engine(model, max(PIECE_TOKENS, source.model.prefix_tokens), vocab_size=tokens)


def training_model(
    weights: dict[str, Tensor], model: ModelConfig, topology: Topology, dtype: torch.dtype
) -> BasedModel:
    """The model that was trained, all layers on this rank, with these weights or this tensor parallel rank's part of them."""
    built = whole_model(model, topology, dtype, resolve_backend("auto", topology.device)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            spec = shard_spec(parameter)
            parameter.copy_(spec.cut(weights[spec.name]))
    return built


def tokenizer_of(source: Source, given: Path | None, path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that was given, or that of the model. Raises ConfigError if none is known, DataError if it cannot be read."""
    folder = given or source.tokenizer
    if folder is None:
        raise ConfigError(f"no tokenizer is known for {path}: set --tokenizer to the data folder of its training")
    return text_tokenizer(folder)


def text_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a prepared data folder, an export, a tokenizer.json or the GPT-2 pair. Raises DataError."""
    with tempfile.TemporaryDirectory() as folder:  # transformers reads one of these forms only
        load_tokenizer(str(path)).save(Path(folder))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, model: ModelConfig) -> None:
    """Raise ConfigError for a tokenizer with tokens that the model has no rows for."""
    if len(tokenizer) > model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} entries, the model {model.vocab_size}: "
            f"set --tokenizer to that of the training data"
        )
