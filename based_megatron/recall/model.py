"""Models of the study, with logits at the queries alone: elsewhere there are no labels, and they would be most of the work.

Legend: B examples, T tokens, K queries, D hidden size, U vocabulary, R rotated pairs.
"""

import zlib
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from based_megatron.baselines.initial import drawn_taps
from based_megatron.config import Config, ModelConfig, ParallelConfig, TrainConfig
from based_megatron.kernels.backend import resolve_backend
from based_megatron.kernels.rotary import rotary_tables
from based_megatron.model.build import build_model
from based_megatron.model.config import based_config
from based_megatron.model.mixers import MIXERS, MixerInputs, MixerSubmodules, layer_mixers
from based_megatron.model.mixers.attention import SoftmaxAttention
from based_megatron.parallel.megatron import megatron_runs
from based_megatron.parallel.sequence.plan import whole_sequence
from based_megatron.parallel.topology import Topology

Block = Literal["plain", "residual norm", "mamba"]
"""What is around a mixer. Plain: r += mixer(LayerNorm(r)). Residual norm: then r += LayerNorm(r), as in Zoology where an MLP would be.
Mamba: r += mixer(RMSNorm(r)), with projections that start as PyTorch's do, those back divided by sqrt(layers), as in its authors' code."""
PRODUCT_MIXERS = tuple(MIXERS.values())
NORM_EPS = 1e-5
EMBEDDING_DROPOUT = 0.1
COMPILED_FORMS = 64
"""Most forms of a layer that are compiled for one point: a form for each length, mixer and, at worst, rate."""


def prepare_for_gpu(compile_threads: int) -> None:
    """Settings of this process: matrix products in TF32, and torch.compile with so many threads and room for all forms of a layer."""
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    torch.set_float32_matmul_precision("high")
    dynamo.recompile_limit = COMPILED_FORMS
    inductor.compile_threads = compile_threads


class RecallModel(nn.Module):
    """Zoology's model: an embedding, layers r += mixer(norm(r)), a norm, and the embedding as output projection.

    No MLP, and softmax attention has no positions: it is given angles of zero.
    """

    def __init__(
        self,
        model: ModelConfig,
        topology: Topology,
        *,
        backend: str,
        seed: int,
        block: Block = "plain",
        compiled: bool = False,
    ) -> None:
        """backend: as in `train.backend`. compiled: train layers without kernels of the product, plain PyTorch, by torch.compile."""
        super().__init__()
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.settings, self.block = model, block
        with megatron_runs():
            resolved = resolve_backend(backend, topology.device)
            shared = based_config(model, ParallelConfig(), dtype=torch.float32, backend=resolved, recompute="none")
            mixers = [
                mixer(shared, MixerSubmodules(), i + 1, topology.process_groups)
                for i, mixer in enumerate(layer_mixers(model))
            ]
        D = model.hidden_size
        self.mixers = nn.ModuleList(mixers)
        norm = nn.RMSNorm if block == "mamba" else nn.LayerNorm
        self.norms = nn.ModuleList(norm(D, eps=NORM_EPS) for _ in mixers)
        self.residual_norms = nn.ModuleList(
            nn.LayerNorm(D, eps=NORM_EPS) if block == "residual norm" else nn.Identity() for _ in mixers
        )
        self.final_norm = nn.LayerNorm(D, eps=NORM_EPS)
        self._initialize(model, seed)
        self.to(topology.device)
        # Static shapes: a graph for each length, in which every loop over chunks is unrolled.
        fused = torch.compile(layer, dynamic=False) if compiled else layer
        self._training_layers = [layer if isinstance(mixer, PRODUCT_MIXERS) else fused for mixer in mixers]

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
                if self.block == "mamba" and name.endswith("weight") and parameter.ndim == 2:
                    values = drawn_taps(tuple(parameter.shape), generator)
                    if name == "out_proj.weight":
                        values /= len(self.mixers) ** 0.5
                else:
                    values = cls.initial(name, tuple(parameter.shape), model, generator)
                parameter.copy_(values)

    def forward(self, tokens_BT: Tensor, positions_BK: Tensor) -> Tensor:
        """Logits [B, K, U] at the positions."""
        x_BTD = functional.dropout(self.embedding(tokens_BT), EMBEDDING_DROPOUT, self.training)
        residual_TBD = x_BTD.transpose(0, 1).contiguous()
        plan = whole_sequence(None, tokens_BT.shape[1], tokens_BT.device)
        tables_TR = rotation(self.settings, tokens_BT.shape[1], tokens_BT.device)
        rotating = MixerInputs(plan, tables_TR)
        still = MixerInputs(plan, (torch.ones_like(tables_TR[0]), torch.zeros_like(tables_TR[1])))
        layers = self._training_layers if self.training else [layer] * len(self.mixers)
        for run, norm, mixer, after in zip(layers, self.norms, self.mixers, self.residual_norms, strict=True):
            inputs = still if isinstance(mixer, SoftmaxAttention) else rotating
            residual_TBD = run(residual_TBD, norm, mixer, after, inputs)
        return functional.linear(self.final_norm(at_queries(residual_TBD, positions_BK)), self.embedding.weight)


def layer(residual_TBD: Tensor, norm: nn.Module, mixer: nn.Module, after: nn.Module, inputs: MixerInputs) -> Tensor:
    """The residual after a layer of the study's model."""
    residual_TBD = residual_TBD + mixer(norm(residual_TBD), inputs=inputs)[0]
    return residual_TBD if isinstance(after, nn.Identity) else residual_TBD + after(residual_TBD)


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
