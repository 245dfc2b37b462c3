"""A tiny model with random weights, as its weights, its export and the engine that decodes it, for the tests of decoding."""

import functools
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from based_megatron.config.schema import ModelConfig
from based_megatron.convert.layout import our_shapes
from based_megatron.inference.engine import Engine
from based_megatron.inference.source import training_model
from based_megatron.parallel.topology import join_alone
from support.pool import rank_device

MODEL = ModelConfig(
    layer_pattern="cLSc", hidden_size=32, ffn_hidden_size=48, num_heads=4, feature_dim=4, window_left=5, vocab_size=261
)
"""The vocabulary is rounded up to 264 rows."""
FULL_ATTENTION = ModelConfig(
    layer_pattern="cLSA", hidden_size=32, ffn_hidden_size=48, num_heads=4, feature_dim=4, window_left=5, vocab_size=261
)


def weights_of(model: ModelConfig = MODEL) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in our_shapes(model).items()}


def engine_of(dtype: torch.dtype = torch.float64, piece_tokens: int | None = 16, model: ModelConfig = MODEL) -> Engine:
    """On the device of the tests, in the operations that have fp64."""
    built = training_model(weights_of(model), model, join_alone(rank_device(0)), dtype)
    built.config.backend = "reference"
    return Engine(built, piece_tokens)


def prompts(count: int, longest: int = 40, seed: int = 0) -> list[tuple[int, ...]]:
    """Rows of all lengths; some start alike."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(most: int) -> tuple[int, ...]:
        length = int(torch.randint(1, most + 1, (1,), generator=generator))
        return tuple(torch.randint(1, MODEL.vocab_size, (length,), generator=generator).tolist())

    start = tokens(1) * 20
    return [(start if i % 4 == 3 else ()) + tokens(longest) for i in range(count)]


@functools.cache
def letters() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges."""
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary: dict[str, Any] = {"<|endoftext|>": 0} | {letter: i + 1 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
