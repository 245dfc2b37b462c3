"""The Based language model, or one pipeline stage of it.

Legend: L tokens of this rank's slice, B sequences, T = L B tokens, D hidden size, U vocabulary columns of this tensor parallel rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from based_megatron.kernels.cross_entropy import vocab_cross_entropy
from based_megatron.kernels.rotary import rotary_tables
from based_megatron.model.block import Block
from based_megatron.model.config import BasedConfig
from based_megatron.model.mixers import Continuation, MixerInputs, layer_mixers
from based_megatron.model.norm import RMSNorm
from based_megatron.model.recorder import SILENT, Recorder
from based_megatron.model.states import ModelStates
from based_megatron.parallel.linear import vocab_embedding, vocab_projection
from based_megatron.parallel.megatron import (
    MegatronModule,
    ModelType,
    gather_from_tensor_model_parallel_region,
    make_viewless_tensor,
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
            self.embedding = vocab_embedding(config, config.model.embedding_rows, self.group)
        mixers = layer_mixers(config.model)
        self.rotates = any(mixers[i].rotates for i in stage.layers)
        self.layers = nn.ModuleDict({str(i): Block(config, mixers[i], i + 1, pg_collection) for i in stage.layers})
        if stage.is_last:
            self.final_norm = RMSNorm(config)
            allocate = not config.model.tie_embeddings
            self.output = vocab_projection(config, config.model.embedding_rows, self.group, allocate=allocate)

    def set_input_tensor(self, tensor: Tensor | list[Tensor]) -> None:
        """Take the residual of the stage before; Megatron's schedules call this."""
        self.input_tensor = tensor[0] if isinstance(tensor, list) else tensor

    def forward(
        self,
        tokens_BL: Tensor,
        plan: SequencePlan,
        labels_BL: Tensor | None = None,
        recorder: Recorder = SILENT,
    ) -> Tensor:
        """Run this stage.

        Returns: on the last stage the loss of each token [B, L] in nats if labels are given, else this rank's logits
        [L, B, U]; on others the residual for the next stage, [L, B, D] fp32.
        """
        inputs = MixerInputs(plan, self._rotary(plan, tokens_BL.device), recorder)
        residual = self._embed(tokens_BL) if self.pre_process else self.input_tensor
        update: Tensor | None = None
        for layer in self.layers.values():
            residual, update = layer(residual, update, inputs)
        assert residual is not None and update is not None
        if not self.post_process:
            return make_viewless_tensor(residual + update, requires_grad=True, keep_graph=True)
        logits = self._logits(self.final_norm(residual, update)[1])
        return self._without_padding(logits) if labels_BL is None else self._loss(logits, labels_BL)

    def readers(self) -> list[tuple[nn.Module, list[nn.Parameter]]]:
        """Modules, in the order of the forward pass, and the parameters that nobody reads before the call of each; all parameters."""
        later = [*self.layers.values(), *([self.final_norm, self.output] if self.post_process else [])]
        read_later = {parameter for module in later for parameter in module.parameters()}
        first = [parameter for parameter in self.parameters() if parameter not in read_later]
        return [(self, first), *((module, list(module.parameters())) for module in later)]

    def zero_states(self, batch: int) -> ModelStates:
        """States of `batch` empty sequences. Raises ConfigError if a layer has no state of constant size."""
        device = self.embedding.weight.device
        blocks: Any = self.layers.items()
        layers = {name: block.mixer.zero_state(batch, device) for name, block in blocks}
        return ModelStates(layers, torch.zeros(batch, dtype=torch.int64, device=device))

    def decode(self, tokens: Tensor, states: ModelStates, every_token: bool = False) -> Tensor:
        """Append a piece of each prompt, [B, L], or one token to each sequence, [B], and update the states in place.

        Every rank holds all layers; tensor parallel ranks call it together, with equal tokens, and get equal logits.
        A step of one token each neither waits for the host nor depends on it.
        Returns: logits of the last token, [B, U], or of every token of a piece, [B, L, U].
        """
        where = Continuation(states.position_B, self._rotary_from(states, tokens), states.is_start)
        residual = self._looked_up(tokens).to(self.config.residual_dtype)
        update: Tensor | None = None
        blocks: Any = self.layers.items()
        for name, block in blocks:
            residual, update = block.decode(residual, update, states.layers[name], where)
        if tokens.ndim == 2 and not every_token:
            residual, update = residual[:, -1], None if update is None else update[:, -1]
        states.position_B += 1 if tokens.ndim == 1 else tokens.shape[1]
        states.is_start = False
        x = self.final_norm(residual, update)[1]
        weight = self.embedding.weight if self.config.model.tie_embeddings else self.output.weight
        logits = functional.linear(x, weight)
        return logits if self.group.size() == 1 else gather_from_tensor_model_parallel_region(logits)

    def _looked_up(self, tokens: Tensor) -> Tensor:
        if self.group.size() > 1:
            return self.embedding(tokens)
        return functional.embedding(tokens, self.embedding.weight)

    def _rotary_from(self, states: ModelStates, tokens: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self.rotates:
            return None
        if tokens.ndim == 1:
            return self._rotary_at(states.position_B)
        new_L = torch.arange(tokens.shape[1], device=tokens.device)
        return self._rotary_at(new_L if states.is_start else states.position_B[:, None] + new_L)

    def _rotary(self, plan: SequencePlan, device: torch.device) -> tuple[Tensor, Tensor] | None:
        if not self.rotates:
            return None
        return self._rotary_at(torch.arange(plan.start, plan.start + plan.length, device=device))

    def _rotary_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        model = self.config.model
        head_dim, backend = model.hidden_size // model.num_heads, self.config.backend
        return rotary_tables(positions, head_dim, model.rotary_fraction, model.rotary_base, backend=backend)

    def _embed(self, tokens_BL: Tensor) -> Tensor:
        x = self.embedding(tokens_BL)
        # Megatron's embedding turns [B, L, D] to [L, B, D] itself when it also cuts the sequence.
        return (x if self.config.sequence_parallel else x.transpose(0, 1)).to(self.config.residual_dtype).contiguous()

    def _logits(self, x: Tensor) -> Tensor:
        tied = self.config.model.tie_embeddings
        return self.output(x, weight=self.embedding.weight if tied else None)[0]

    def _loss(self, logits: Tensor, labels_BL: Tensor) -> Tensor:
        loss_T = vocab_cross_entropy(
            logits.flatten(0, 1),
            labels_BL.t().flatten(),
            columns=self._vocab_columns(logits),
            group=self.group,
            backend=self.config.backend,
        )
        return loss_T.view(logits.shape[:2]).t()

    def _without_padding(self, logits: Tensor) -> Tensor:
        columns = self._vocab_columns(logits)
        if columns < logits.shape[-1]:
            logits = logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= columns, float("-inf"))
        return logits

    def _vocab_columns(self, logits: Tensor) -> int:
        """Columns of this rank that take part in the softmax: the others only round the vocabulary up to the ranks."""
        held = logits.shape[-1]
        return min(held, self.config.model.embedding_rows - dist.get_rank(self.group) * held)
