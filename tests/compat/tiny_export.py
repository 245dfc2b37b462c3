"""An export to try things on, as based_megatron writes it."""

from pathlib import Path

import torch

from based_megatron.config.schema import ModelConfig
from based_megatron.convert.huggingface import export_huggingface
from based_megatron.convert.layout import our_shapes
from based_megatron.data_prep.tokenizer import train_tokenizer


def tiny_export(folder: Path) -> Path:
    """An export of a small model with random weights and a tokenizer, in `folder`."""
    sizes = dict(hidden_size=32, ffn_hidden_size=64, num_heads=4, feature_dim=4, window_left=5)
    config = ModelConfig(layer_pattern="cLSAc", vocab_size=300, **sizes)
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in our_shapes(config).items()}
    (folder / "data").mkdir()
    train_tokenizer(["the cat sat on the mat and hello world " * 20], 300).save(folder / "data")
    export_huggingface(weights, config, folder / "tiny", folder / "data")
    return folder / "tiny"
