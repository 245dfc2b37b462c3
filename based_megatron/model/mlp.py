"""The gated MLP that follows every mixer."""

import torch.distributed as dist
from torch import Tensor

from based_megatron.kernels.fp8.tokens import Fp8Tokens
from based_megatron.kernels.swiglu import swiglu
from based_megatron.model.config import BasedConfig
from based_megatron.parallel.fp8 import gated, takes_fp8
from based_megatron.parallel.linear import column_linear, row_linear
from based_megatron.parallel.megatron import MegatronModule


class SwiGLU(MegatronModule):
    """SwiGLU MLP: fc2(value * silu(gate)) with [value | gate] = fc1(x), the released order (Llama and Megatron have [gate | value])."""

    def __init__(self, config: BasedConfig, group: dist.ProcessGroup) -> None:
        super().__init__(config)
        width = config.model.ffn_hidden_size
        self.fc1 = column_linear(config, (width, width), bias=False, group=group)
        self.fc2 = row_linear(config, width, bias=False, group=group)

    def forward(self, x: Tensor | Fp8Tokens) -> Tensor:
        """x: [T, B, D] -> [T, B, D]; T is cut over tensor parallel ranks under Megatron's sequence parallelism."""
        if takes_fp8(self.fc1) and takes_fp8(self.fc2):
            return self.fc2(self.fc1(x, body=gated)[0])[0]
        return self.fc2(swiglu(self.fc1(x)[0], backend=self.config.backend))[0]
