"""The one door to Megatron-core: the names we use, the CPU shim, and guards that keep its traps out of reach.

Nothing else of ours imports `megatron`. Supported: 0.16.1 (the newest for Python 3.11) to 0.19.
"""

import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version

from based_megatron.config import ParallelConfig

# It warns of every optional package that is missing, on every rank.
warnings.filterwarnings("ignore", module=r"megatron\.")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron.core
    from megatron.core import parallel_state
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
        vocab_parallel_cross_entropy,
    )
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.utils import make_viewless_tensor

__all__ = [
    "ColumnParallelLinear",
    "MegatronModule",
    "ModelType",
    "ProcessGroupCollection",
    "RowParallelLinear",
    "TransformerConfig",
    "VocabParallelEmbedding",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "get_forward_backward_func",
    "make_viewless_tensor",
    "megatron_settings",
    "parallel_state",
    "vocab_parallel_cross_entropy",
]


class _CpuTorch(types.ModuleType):
    """`torch` as the pipeline schedules see it without a GPU: their literal device="cuda" becomes the CPU."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        return self._on_cpu(value) if name in ("zeros", "ones", "empty", "tensor") else value

    @staticmethod
    def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return call


def _run_without_cuda() -> None:
    """Megatron-core names the current CUDA device in its communication code even where the backend is gloo."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None  # type: ignore[assignment]
    schedules.torch = _CpuTorch("torch")


if not torch.cuda.is_available():
    _run_without_cuda()


def megatron_settings(
    *,
    num_layers: int,
    hidden_size: int,
    ffn_hidden_size: int,
    num_heads: int,
    parallel: ParallelConfig,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig: what its layers and schedules need to know of the model and the layout.

    The residual stream crosses pipeline stages in fp32, as it runs inside them.
    """
    interleaved = parallel.virtual_pipeline > 1
    # Batched messages of two chunks between the same two ranks arrive swapped (Megatron-LM issue 1450): the interleaved
    # schedule always sends them one by one. Before 0.17 its outputs were freed while still being sent (Megatron-LM pull 4047);
    # gloo reads the tensor later than NCCL and loses that race on every version.
    frees_too_early = interleaved and (
        Version(megatron.core.__version__) < Version("0.17") or not torch.cuda.is_available()
    )
    return dict(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=num_heads,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor > 1,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=torch.promote_types(dtype, torch.float32),
        add_bias_linear=False,
        # Before 0.17 only initialisation sets the sharding attributes of parameters, on which the gradient norm relies.
        perform_initialization=True,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=parallel.pipeline > 1 and not frees_too_early,
        calculate_per_token_loss=True,
    )
