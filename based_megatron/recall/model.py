"""Models of the study, with logits at the queries alone: elsewhere there are no labels, and they would be most of the work.

Legend: B examples, T tokens, K queries, D hidden size, U vocabulary, R rotated pairs.
"""

import zlib

import torch
from torch import Tensor, nn
from torch.nn import functional

from based_megatron.config import Config, ModelConfig, ParallelConfig, TrainConfig
from based_megatron.kernels.backend import resolve_backend
from based_megatron.kernels.rotary import rotary_tables
from based_megatron.model.build import build_model
from based_megatron.model.config import based_config
from based_megatron.model.mixers import MixerInputs, MixerSubmodules, layer_mixers
from based_megatron.model.mixers.attention import SoftmaxAttention
from based_megatron.parallel.megatron import megatron_runs
from based_megatron.parallel.sequence.plan import whole_sequence
from based_megatron.parallel.topology import Topology

NORM_EPS = 1e-5
EMBEDDING_DROPOUT = 0.1


class RecallModel(nn.Module):
    """Zoology's model: an embedding, layers r += mixer(norm(r)), a norm, and the embedding as output projection.

    No MLP, and softmax attention has no positions: it is given angles of zero. (Zoology's layers also add a norm of the residual to
    it, where their MLP would be.)
    """

    def __init__(self, model: ModelConfig, topology: Topology, *, backend: str, seed: int) -> None:
        """backend: as in `train.backend`."""
        super().__init__()
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.settings = model
        with megatron_runs():
            resolved = resolve_backend(backend, topology.device)
            shared = based_config(model, ParallelConfig(), dtype=torch.float32, backend=resolved, recompute="none")
            mixers = [
                mixer(shared, MixerSubmodules(), i + 1, topology.process_groups)
                for i, mixer in enumerate(layer_mixers(model))
            ]
        self.mixers = nn.ModuleList(mixers)
        self.norms = nn.ModuleList(nn.LayerNorm(model.hidden_size, eps=NORM_EPS) for _ in mixers)
        self.final_norm = nn.LayerNorm(model.hidden_size, eps=NORM_EPS)
        self._initialize(model, seed)
        self.to(topology.device)

    @torch.no_grad()
    def _initialize(self, model: ModelConfig, seed: int) -> None:
        """The embedding N(0, init_std^2); mixers as their classes say, from a stream for each parameter."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} embedding".encode()))
        self.embedding.weight.copy_(
            torch.empty(self.embedding.weight.shape).normal_(0, model.init_std, generator=generator)
        )
        for i, (mixer, cls) in enumerate(zip(self.mixers, layer_mixers(model), strict=True)):
            for name, parameter in mixer.named_parameters():
                generator.manual_seed(zlib.crc32(f"{seed} {i} {name}".encode()))
                parameter.copy_(cls.initial(name, tuple(parameter.shape), model, generator))

    def forward(self, tokens_BT: Tensor, positions_BK: Tensor) -> Tensor:
        """Logits [B, K, U] at the positions."""
        x_BTD = functional.dropout(self.embedding(tokens_BT), EMBEDDING_DROPOUT, self.training)
        residual_TBD = x_BTD.transpose(0, 1).contiguous()
        plan = whole_sequence(None, tokens_BT.shape[1], tokens_BT.device)
        tables_TR = rotation(self.settings, tokens_BT.shape[1], tokens_BT.device)
        rotating = MixerInputs(plan, tables_TR)
        still = MixerInputs(plan, (torch.ones_like(tables_TR[0]), torch.zeros_like(tables_TR[1])))
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            inputs = still if isinstance(mixer, SoftmaxAttention) else rotating
            residual_TBD = residual_TBD + mixer(norm(residual_TBD), inputs=inputs)[0]
        return functional.linear(self.final_norm(at_queries(residual_TBD, positions_BK)), self.embedding.weight)


class ProductModel(nn.Module):
    """The model that `based train` trains, positions and MLPs included."""

    def __init__(self, model: ModelConfig, topology: Topology, *, backend: str, seed: int) -> None:
        super().__init__()
        config = Config(model=model, train=TrainConfig(precision="fp32", backend=backend, seed=seed))  # type: ignore[arg-type]
        (self.model,) = build_model(config, topology)
        self.settings = model

    def forward(self, tokens_BT: Tensor, positions_BK: Tensor) -> Tensor:
        """Logits [B, K, U] at the positions."""
        model, length, device = self.model, tokens_BT.shape[1], tokens_BT.device
        inputs = MixerInputs(whole_sequence(None, length, device), rotation(self.settings, length, device))
        residual_TBD, update_TBD = functional.embedding(tokens_BT.t(), model.embedding.weight), None
        for layer in model.layers.values():
            residual_TBD, update_TBD = layer(residual_TBD, update_TBD, inputs)
        assert update_TBD is not None
        x_BKD = model.final_norm(at_queries(residual_TBD, positions_BK), at_queries(update_TBD, positions_BK))[1]
        weight = model.embedding.weight if self.settings.tie_embeddings else model.output.weight
        return functional.linear(x_BKD, weight)[..., : self.settings.vocab_size]


def rotation(model: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the first positions, [T, R] each."""
    positions = torch.arange(length, device=device)
    return rotary_tables(positions, model.hidden_size // model.num_heads, model.rotary_fraction, model.rotary_base)


def at_queries(x_TBD: Tensor, positions_BK: Tensor) -> Tensor:
    """The rows of the queries, [B, K, D]."""
    index_BKD = positions_BK[..., None].expand(-1, -1, x_TBD.shape[-1])
    return x_TBD.transpose(0, 1).gather(1, index_BKD)
