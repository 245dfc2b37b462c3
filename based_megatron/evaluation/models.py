"""A trained model as evaluations see it: text in, continuations and log-likelihoods out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from based_megatron.checkpoint.full import read_whole
from based_megatron.checkpoint.ranks import Ranks
from based_megatron.config import ModelConfig
from based_megatron.convert.exported import is_export, read_export
from based_megatron.convert.huggingface import hf_model
from based_megatron.convert.tokenizer import data_folder
from based_megatron.errors import CheckpointError, ConfigError
from based_megatron.evaluation.scorer import AttentionScorer, Prompt, Scorer, StateScorer
from based_megatron.inference.engine import Engine
from based_megatron.inference.generate import text_tokenizer
from based_megatron.kernels.backend import resolve_backend
from based_megatron.model.based_model import BasedModel
from based_megatron.model.build import DTYPES, whole_model
from based_megatron.model.mixers import layer_mixers
from based_megatron.parallel.linear import shard_spec
from based_megatron.parallel.topology import Topology

PIECE_TOKENS = 2048
"""Most tokens of a row that are computed at once."""


class Writer(Protocol):
    """What generated tasks ask of a model."""

    def write(self, prompts: Sequence[str], new_tokens: int, until: Sequence[str]) -> list[str]:
        """Greedy continuations of at most so many tokens, cut before the first of the strings."""
        ...


@dataclass(frozen=True)
class LanguageModel:
    """A model with its tokenizer."""

    scorer: Scorer
    tokenizer: PreTrainedTokenizerFast
    model: ModelConfig

    @property
    def eos_id(self) -> int:
        """The token that ends documents, which an empty context is replaced by."""
        return int(self.tokenizer.eos_token_id)

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a text, without added ones."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def write(self, prompts: Sequence[str], new_tokens: int, until: Sequence[str]) -> list[str]:
        """Greedy continuations of at most so many tokens, cut before the first of the strings and at the end of the document."""

        def text(row: Sequence[int]) -> str:
            ids = list(row)
            return cut_before(self.decode(ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids), until)

        def ended(row: list[int]) -> bool:
            decoded = self.decode(row)
            return self.eos_id in row or any(end in decoded for end in until)

        asked = [Prompt(self.encode(prompt) or (self.eos_id,), new_tokens, ended) for prompt in prompts]
        return [text(row) for row in self.scorer.continuations(asked)]


def cut_before(text: str, until: Sequence[str]) -> str:
    """The text before the first of some strings."""
    for end in filter(None, until):
        text = text.partition(end)[0]
    return text


@dataclass(frozen=True)
class Source:
    """Where a model comes from, and what is known of its training."""

    weights: dict[str, Tensor]
    model: ModelConfig
    tokenizer: Path | None
    trained_tokens: int | None
    """Tokens of a training sequence; None for an export, which does not say."""


def read_source(path: Path, mixers: str = "") -> Source:
    """A Hugging Face export (none of its code runs), a checkpoint, or a run's newest checkpoint. Raises CheckpointError."""
    if is_export(path):
        weights, model = read_export(path, mixers)
        return Source(weights, model, path if (path / "tokenizer.json").is_file() else None, None)
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


def language_model(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    topology: Topology,
    precision: Literal["fp32", "bf16"],
    batch: int,
    ranks: Ranks,
) -> LanguageModel:
    """The model on the device of the topology, over its decoding states where it has them.

    Raises ConfigError for a tokenizer that the model has no rows for.
    """
    if len(tokenizer) > source.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} entries, the model {source.model.vocab_size}: "
            f"set --tokenizer to that of the training data"
        )
    dtype = DTYPES[precision]
    scorer: Scorer
    if has_states(source.model):
        engine = Engine(
            training_model(source.weights, source.model, topology, dtype), max(PIECE_TOKENS, source.model.prefix_tokens)
        )
        scorer = StateScorer(engine, batch, ranks)
    else:
        model: Any = hf_model(source.weights, source.model)
        scorer = AttentionScorer(model.to(topology.device, dtype), batch, ranks, source.trained_tokens)
    return LanguageModel(scorer, tokenizer, source.model)


def has_states(model: ModelConfig) -> bool:
    """Whether every layer has a decoding state of constant size."""
    try:
        for mixer in set(layer_mixers(model)):
            mixer.empty_state(model, 0, torch.float32, torch.device("cpu"))
    except ConfigError:
        return False
    return True


def training_model(
    weights: dict[str, Tensor], model: ModelConfig, topology: Topology, dtype: torch.dtype
) -> BasedModel:
    """The model that was trained, whole on this rank, with these weights."""
    built = whole_model(model, topology, dtype, resolve_backend("auto", topology.device)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(weights[shard_spec(parameter).name])
    return built


def tokenizer_of(source: Source, given: Path | None, path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that was given, or that of the model. Raises ConfigError if none is known, DataError if it cannot be read."""
    folder = given or source.tokenizer
    if folder is None:
        raise ConfigError(f"no tokenizer is known for {path}: set --tokenizer to the data folder of its training")
    return text_tokenizer(folder)
