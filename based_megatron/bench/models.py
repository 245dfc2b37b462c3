"""The benchmarked models: ours on one rank, and the transformer that it is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from based_megatron.bench.timing import Bench
from based_megatron.config import ModelConfig, ParallelConfig
from based_megatron.config.load import load_config
from based_megatron.model.based_model import BasedModel
from based_megatron.model.build import whole_model
from based_megatron.parallel.topology import Topology, build_topology

LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "vocab_size": 50304,
}
"""1,420,397,568 parameters, embeddings not tied: the transformer that Based-1B is usually compared with."""
TINY_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


def preset_name(bench: Bench) -> str:
    """Preset that is measured: `tiny`, which has every mixer, in a quick run."""
    return "tiny" if bench.quick else "based-1b"


def model_config(bench: Bench) -> ModelConfig:
    """Sizes of the model that is measured."""
    return load_config(preset_name(bench)).model


@contextmanager
def one_rank(bench: Bench) -> Iterator[Topology]:
    """The layout of a single process; joins a process group of its own if there is none."""
    joined = dist.is_initialized()
    if not joined:
        backend = "nccl" if bench.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield build_topology(ParallelConfig(), bench.device)
    finally:
        if not joined:
            dist.destroy_process_group()


def based_model(bench: Bench, topology: Topology) -> BasedModel:
    """A Based model on the device, with random weights of the distributions that training starts from."""
    model = model_config(bench)
    built = whole_model(model, topology, bench.dtype, bench.backend)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.copy_(bench.random(*parameter.shape, scale=0.3 if "conv_weight" in name else model.init_std))
    return built


def with_backend(model: BasedModel, backend: str) -> BasedModel:
    """Switch a model to other kernels; returns it."""
    model.config.backend = backend
    return model


def llama(bench: Bench, **changes: Any) -> Any:
    """A Hugging Face Llama of 1.42 G parameters with random weights on the device. Raises ImportError without transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = TINY_LLAMA if bench.quick else LLAMA
    config = LlamaConfig(**{**sizes, "max_position_embeddings": 8192, "tie_word_embeddings": False, **changes})
    config._attn_implementation = "sdpa"
    with torch.device(bench.device):
        built: Any = LlamaForCausalLM(config)
    return built.to(bench.dtype)


def parameters_in_billions(model: torch.nn.Module) -> float:
    """Size of a model, shared parameters once."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e9
