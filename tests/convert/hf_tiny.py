"""A small Hugging Face model in float64, where rounding cannot hide a slip."""

import torch

from based_megatron.config.schema import ModelConfig
from based_megatron.convert.hf_files.modeling_based import BasedForCausalLM
from based_megatron.convert.huggingface import hf_model
from based_megatron.convert.layout import our_shapes

TINY = dict(hidden_size=32, ffn_hidden_size=48, num_heads=4, feature_dim=4, window_left=5, vocab_size=61)
EXACT = 1e-10


def tiny_model(pattern: str, dtype: torch.dtype = torch.float64, **changes) -> BasedForCausalLM:
    config = ModelConfig(layer_pattern=pattern, **{**TINY, **changes})
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in our_shapes(config).items()
    }
    return hf_model(weights, config)


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
