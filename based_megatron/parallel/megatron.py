"""The one door to Megatron-core: the names we use, the CPU shim, and guards that keep its traps out of reach.

Nothing else of ours imports `megatron`. Supported: 0.16.1 (the newest for Python 3.11) to 0.19.
"""

import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from based_megatron.config import ParallelConfig
from based_megatron.parallel.host import replaced, without_warnings
from based_megatron.parallel.tensor_overlap import TensorRanks

with warnings.catch_warnings():
    # It warns of every optional package that is missing, on every rank.
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
        reduce_from_tensor_model_parallel_region,
        vocab_parallel_cross_entropy,
    )
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region as gather_columns
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.utils import make_viewless_tensor

__all__ = [
    "ColumnParallelLinear",
    "LayerConfig",
    "MegatronModule",
    "ModelType",
    "ProcessGroupCollection",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "make_viewless_tensor",
    "mark_tensor_parallel",
    "megatron_runs",
    "megatron_settings",
    "parallel_state",
    "pipeline_schedule",
    "reduce_from_tensor_model_parallel_region",
    "tensor_parallel_dim",
    "vocab_parallel_cross_entropy",
]


@dataclass
class LayerConfig(TransformerConfig):
    """Megatron's TransformerConfig, with what tensor parallel layers of ours need besides."""

    tensor_ranks: TensorRanks | None = None
    """The ways of rows between tensor parallel ranks while others are multiplied; None: Megatron's layers, which wait for them."""


@contextmanager
def megatron_runs() -> Iterator[None]:
    """Surroundings for Megatron-core's code, for as long as the block lasts.

    It warns of every optional package that is missing, on every rank. Without a GPU the CUDA devices that it names literally,
    also over gloo, are the CPU. It must not be entered by several threads at a time: what it changes belongs to the process.
    """
    with without_warnings(r"megatron\."):
        if torch.cuda.is_available():
            yield
            return
        on_cpu = replaced(
            torch.cuda, current_device=lambda: torch.device("cpu"), synchronize=lambda *args, **kwargs: None
        )
        with on_cpu, replaced(schedules, torch=_CpuTorch("torch")):
            yield


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


def pipeline_schedule() -> Callable[..., list[Any]]:
    """Megatron's schedule for the groups as they are now: one stage, 1F1B or interleaved. Takes its keyword arguments."""
    schedule = get_forward_backward_func()

    def run(**arguments: Any) -> list[Any]:
        with megatron_runs():
            return schedule(**arguments)

    return run


def gather_from_tensor_model_parallel_region(columns: Tensor) -> Tensor:
    """Columns of all tensor parallel ranks, side by side in the last dim."""
    with megatron_runs():
        return gather_columns(columns)


def mark_tensor_parallel(parameter: Any, dim: int) -> None:
    """Mark a parameter of ours as cut over the tensor parallel ranks along `dim`, as Megatron's layers mark theirs."""
    parameter.tensor_model_parallel = True
    parameter.partition_dim = dim
    parameter.partition_stride = 1


def tensor_parallel_dim(parameter: Any) -> int | None:
    """The dim that is cut over the tensor parallel ranks; None if every rank holds the whole parameter."""
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


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
        # A message is waited for on the device; the host would wait once more, for versions of PyTorch before 2.
        batch_p2p_sync=False,
        deallocate_pipeline_outputs=parallel.pipeline > 1 and not frees_too_early,
        calculate_per_token_loss=True,
    )
