"""Linear attention with the second order Taylor feature map: weights 1 + s + s^2 / 2, s = q.k / sqrt(F), normalised."""

from typing import Any

from torch import Tensor

from based_megatron.kernels.taylor_attention import segment_state, taylor_attention
from based_megatron.model.mixers.base import Mixer, MixerInputs, heads_first_batch, merge_heads
from based_megatron.parallel.sequence.exchange import exclusive_prefix


class TaylorLinearAttention(Mixer):
    """No positions, no biases; heads are independent, so that tensor parallel ranks need nothing of each other inside."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = self.config.model
        features = model.num_heads * model.feature_dim
        self.local_parts = [size // self.group.size() for size in (features, features, model.hidden_size)]
        self.qkv = self.column((features, features, model.hidden_size))
        self.out_proj = self.row(model.hidden_size)

    def forward(self, x: Tensor, attention_mask: None = None, *, inputs: MixerInputs, **_: Any) -> tuple[Tensor, None]:
        q, k, v = (heads_first_batch(part, self.heads) for part in self.qkv(x)[0].split(self.local_parts, dim=-1))
        plan, ids = inputs.plan, inputs.plan.document_ids()
        carried = exclusive_prefix(segment_state(k, v, document_ids_BT=ids), plan) if plan.axis.size > 1 else None
        mixed, _state = taylor_attention(
            q, k, v, initial_state_BHRV=carried, document_ids_BT=ids, backend=self.config.backend
        )
        return self.out_proj(merge_heads(mixed))[0], None
