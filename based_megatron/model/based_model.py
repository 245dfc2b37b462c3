"""The Based language model, or one pipeline stage of it.

Legend: L tokens of this rank's slice, B sequences, D hidden size, V vocabulary rows of this tensor parallel rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from based_megatron.config.pattern import parse_layer_pattern
from based_megatron.kernels.rotary import rotary_tables
from based_megatron.model.block import Block
from based_megatron.model.config import BasedConfig
from based_megatron.model.mixers import MIXERS, MixerInputs
from based_megatron.model.norm import RMSNorm
from based_megatron.parallel.linear import column_linear, vocab_embedding
from based_megatron.parallel.megatron import (
    MegatronModule,
    ModelType,
    make_viewless_tensor,
    vocab_parallel_cross_entropy,
)
from based_megatron.parallel.sequence.plan import SequencePlan
from based_megatron.parallel.stages import Stage


class BasedModel(MegatronModule):
    """Embedding, blocks, final norm and output projection, as far as this stage holds them.

    Parameters carry the same names under every layout: layers are keyed by their index in the whole model.
    """

    def __init__(self, config: BasedConfig, stage: Stage, pg_collection: Any) -> None:
        super().__init__(config)
        # Read by Megatron's pipeline schedules.
        self.pre_process, self.post_process, self.vp_stage = stage.is_first, stage.is_last, stage.chunk
        self.share_embeddings_and_output_weights = config.model.tie_embeddings
        self.model_type = ModelType.encoder_or_decoder
        self.input_tensor: Tensor | None = None

        self.group = pg_collection.tp
        if stage.is_first or (stage.is_last and config.model.tie_embeddings):
            self.embedding = vocab_embedding(config, config.vocab_rows, self.group)
        letters = parse_layer_pattern(config.model.layer_pattern)
        self.rotates = any(MIXERS[letters[i]].rotates for i in stage.layers)
        self.layers = nn.ModuleDict({str(i): Block(config, letters[i], i + 1, pg_collection) for i in stage.layers})
        if stage.is_last:
            self.final_norm = RMSNorm(config)
            self.output = self._output_layer()

    def set_input_tensor(self, tensor: Tensor | list[Tensor]) -> None:
        """Take the residual of the stage before; Megatron's schedules call this."""
        self.input_tensor = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, tokens_BL: Tensor, plan: SequencePlan, labels_BL: Tensor | None = None) -> Tensor:
        """Run this stage.

        Returns: on the last stage the loss of each token [B, L] in nats if labels are given, else this rank's logits
        [L, B, V]; on others the residual for the next stage, [L, B, D] fp32.
        """
        inputs = MixerInputs(plan, self._rotary(plan, tokens_BL.device))
        residual = self._embed(tokens_BL) if self.pre_process else self.input_tensor
        for layer in self.layers.values():
            residual = layer(residual, inputs)
        if not self.post_process:
            return make_viewless_tensor(residual, requires_grad=True, keep_graph=True)
        logits = self._logits(self.final_norm(residual))
        if labels_BL is None:
            return logits
        return vocab_parallel_cross_entropy(logits.to(self.config.residual_dtype), labels_BL.t().contiguous()).t()

    def _rotary(self, plan: SequencePlan, device: torch.device) -> tuple[Tensor, Tensor] | None:
        if not self.rotates:
            return None
        model = self.config.model
        positions = torch.arange(plan.start, plan.start + plan.length, device=device)
        return rotary_tables(positions, model.hidden_size // model.num_heads, model.rotary_fraction, model.rotary_base)

    def _embed(self, tokens_BL: Tensor) -> Tensor:
        x = self.embedding(tokens_BL)
        # Megatron's embedding turns [B, L, D] to [L, B, D] itself when it also cuts the sequence.
        return (x if self.config.sequence_parallel else x.transpose(0, 1)).to(self.config.residual_dtype).contiguous()

    def _output_layer(self) -> Any:
        rows, size = self.config.vocab_rows, dist.get_world_size(self.group)
        padded = -(-rows // size) * size
        layer = column_linear(
            self.config, (padded,), bias=False, group=self.group, allocate=not self.config.model.tie_embeddings
        )
        for parameter in layer.parameters():
            parameter.parts = (rows,)
        return layer

    def _logits(self, x: Tensor) -> Tensor:
        tied = self.config.model.tie_embeddings
        logits = self.output(x, weight=self.embedding.weight if tied else None)[0]
        # Rows that only round the vocabulary up to the tensor parallel size take no part in the softmax.
        rows = self.config.vocab_rows - dist.get_rank(self.group) * logits.shape[-1]
        if rows < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= rows
            logits = logits.masked_fill(padding, float("-inf"))
        return logits
