"""A tiny model with random weights, as its weights, its run and its export, and the scorers that ranks of a pool make of it."""

from pathlib import Path

import torch
import torch.distributed as dist

from based_megatron.checkpoint.full import write_full
from based_megatron.checkpoint.ranks import all_ranks
from based_megatron.config import Config, ParallelConfig
from based_megatron.config.schema import DataConfig, ModelConfig
from based_megatron.convert.huggingface import export_huggingface, hf_model
from based_megatron.convert.layout import our_shapes
from based_megatron.data_prep.tokenizer import train_tokenizer
from based_megatron.evaluation.models import LanguageModel, language_model
from based_megatron.evaluation.scorer import AttentionScorer, StateScorer
from based_megatron.inference.engine import Engine
from based_megatron.inference.source import read_source, tokenizer_of, training_model
from based_megatron.parallel.topology import build_topology
from support.pool import rank_device

WORDS = "hello world said the version author home page license one two three".split()  # noqa: SIM905
VOCABULARY = 300


def tiny(pattern: str = "cLSc", prefix_tokens: int = 0) -> ModelConfig:
    return ModelConfig(
        layer_pattern=pattern,
        hidden_size=32,
        ffn_hidden_size=48,
        num_heads=4,
        feature_dim=4,
        window_left=5,
        vocab_size=VOCABULARY,
        mixers="based_megatron.baselines" if set(pattern) - set("cLSA") else "",
        prefix_tokens=prefix_tokens,
    )


def weights_of(model: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in our_shapes(model).items()}


def write_tiny(root: Path, pattern: str = "cLSc") -> Path:
    """Folders run, export and data."""
    model = tiny(pattern)
    (root / "data").mkdir(parents=True)
    train_tokenizer([" ".join(WORDS) + "\n\nVersion: 1.2.3\nAuthor: x <x@y.org>"] * 3, VOCABULARY).save(root / "data")
    write_full(root / "run", weights_of(model), Config(model=model, data=DataConfig(path=str(root / "data"))))
    export_huggingface(weights_of(model), model, root / "export", root / "data")
    return root


def state_scorer(
    dtype: torch.dtype = torch.float64, batch: int = 8, pattern: str = "cLSc", prefix_tokens: int = 0
) -> StateScorer:
    model, topology = tiny(pattern, prefix_tokens), build_topology(ParallelConfig(), rank_device(dist.get_rank()))
    return StateScorer(
        Engine(training_model(weights_of(model), model, topology, dtype), max(16, prefix_tokens)), batch, all_ranks()
    )


def attention_scorer(batch: int = 8, pattern: str = "cLSc") -> AttentionScorer:
    """The Hugging Face model over whole rows: an oracle for models with states too."""
    model = tiny(pattern)
    return AttentionScorer(hf_model(weights_of(model), model).double(), batch, all_ranks(), trained_tokens=128)


def loaded(path: Path, batch: int = 8) -> LanguageModel:
    source = read_source(path)
    topology = build_topology(ParallelConfig(), rank_device(dist.get_rank()))
    return language_model(source, tokenizer_of(source, None, path), topology, "fp32", batch, all_ranks())
