"""Small models and batches for the model tests; used on the ranks of a pool."""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from based_megatron.config import Config, ParallelConfig
from based_megatron.model.based_model import BasedModel
from based_megatron.model.build import build_model
from based_megatron.model.config import BasedConfig, based_config
from based_megatron.parallel.sequence.documents import Documents
from based_megatron.parallel.sequence.plan import SequencePlan, whole_sequence
from based_megatron.parallel.topology import Topology
from support.layouts import small_config, topology_of
from support.pool import rank_device


def config_with(parallel: ParallelConfig | None = None, **model: Any) -> Config:
    """The layout tests' config with eight layers, and some keys of the model changed."""
    config = small_config(parallel)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, **{"layer_pattern": "cLSA cLSc", **model})
    )


def shared_config(dtype: torch.dtype, recompute: Any = "none", **model: Any) -> BasedConfig:
    """The object that Megatron's layers take, for one rank."""
    config = config_with(**model)
    return based_config(config.model, config.parallel, dtype=dtype, backend="reference", recompute=recompute)


def here(x: Any) -> Any:
    """A tensor or module, on the device of the tests."""
    return x.to(rank_device(dist.get_rank()))


def build(dtype: torch.dtype, parallel: ParallelConfig | None = None, **model: Any) -> tuple[BasedModel, Topology]:
    """The first chunk of this rank's model."""
    config = config_with(parallel, **model)
    topology = topology_of(config.parallel)
    return build_model(config, topology, dtype)[0], topology


def some_tokens(topology: Topology, length: int = 24, vocab: int = 91) -> tuple[Tensor, Tensor]:
    """Inputs and labels [3, length]."""
    tokens = torch.randint(0, vocab, (3, length + 1), generator=torch.Generator().manual_seed(7)).to(topology.device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def whole_plan(topology: Topology, length: int = 24, document_ids: Tensor | None = None) -> SequencePlan:
    """Sequences that lie on one rank."""
    documents = None if document_ids is None else Documents.from_ids(document_ids)
    return whole_sequence(documents, length, topology.device)
