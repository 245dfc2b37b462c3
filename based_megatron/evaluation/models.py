"""A trained model as evaluations see it: text in, continuations and log-likelihoods out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from transformers import PreTrainedTokenizerFast

from based_megatron.checkpoint.ranks import Ranks
from based_megatron.config import ModelConfig
from based_megatron.convert.huggingface import hf_model
from based_megatron.evaluation.scorer import AttentionScorer, Prompt, Scorer, StateScorer
from based_megatron.inference.source import Source, check_tokenizer, state_engine
from based_megatron.model.build import DTYPES
from based_megatron.model.mixers import has_states
from based_megatron.parallel.topology import Topology


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
    check_tokenizer(tokenizer, source.model)
    dtype = DTYPES[precision]
    scorer: Scorer
    if has_states(source.model):
        scorer = StateScorer(state_engine(source, topology, dtype), batch, ranks)
    else:
        model: Any = hf_model(source.weights, source.model)
        scorer = AttentionScorer(model.to(topology.device, dtype), batch, ranks, source.sequence_length_tokens)
    return LanguageModel(scorer, tokenizer, source.model)
