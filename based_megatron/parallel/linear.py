"""Linear layers cut over tensor parallel ranks, with fused parts, and the names and places of parameters.

Legend: L tokens of this rank's slice, B sequences, D hidden size.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from based_megatron.parallel.gradient_sums import linear
from based_megatron.parallel.megatron import (
    ColumnParallelLinear,
    RowParallelLinear,
    TransformerConfig,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    mark_tensor_parallel,
    reduce_from_tensor_model_parallel_region,
    tensor_parallel_dim,
)
from based_megatron.parallel.sharding import ShardSpec


@dataclass(frozen=True)
class Projection:
    """A column parallel projection taken apart, for what must be sent before all of it is computed."""

    x_LBD: Tensor
    """All tokens of the slice, also under sequence parallelism."""
    weight: Tensor
    bias: Tensor | None

    def __call__(self) -> Tensor:
        """The whole projection, [L, B, rows of the weight]."""
        return linear(self.x_LBD, self.weight, self.bias)

    def parts(self, *rows: int) -> list["Projection"]:
        """Projections of the same input by consecutive blocks of the weight, with these numbers of rows."""
        biases = [None] * len(rows) if self.bias is None else self.bias.split(rows)
        return [Projection(self.x_LBD, w, b) for w, b in zip(self.weight.split(rows), biases, strict=True)]

    @torch.no_grad()
    def last_tokens(self, tokens: int, rows: slice) -> Tensor:
        """Some rows of the output at the last tokens, ahead of all others and without gradients."""
        bias = None if self.bias is None else self.bias[rows]
        return functional.linear(self.x_LBD[self.x_LBD.shape[0] - tokens :], self.weight[rows], bias)


Body = Callable[[Projection], Tensor]


class SplitColumnLinear(ColumnParallelLinear):
    """Megatron's layer, which can hand its projection to a `body` that orders the parts of it.

    The body runs inside of the layer's forward: there ZeRO-3 has the weight, and tensor parallel ranks gather x once.
    """

    def forward(self, x: Tensor, weight: Tensor | None = None, *, body: Body | None = None, **options: Any) -> Any:
        """Megatron's forward; with a body, the result is (what the body returns, None)."""
        if body is None:
            return super().forward(x, weight, **options)
        enter = gather_from_sequence_parallel_region if self.sequence_parallel else copy_to_tensor_model_parallel_region
        return body(Projection(enter(x, group=self.tp_group), self.weight, self.bias)), None


class WholeColumnLinear(ColumnParallelLinear):
    """Megatron's layer on one tensor parallel rank: the bias is added inside the matrix product, not in a pass of its own."""

    def forward(self, x: Tensor, weight: Tensor | None = None, *, body: Body | None = None, **_: Any) -> Any:
        """x: [..., in] -> ([..., out], no loose bias). weight replaces the layer's own, if it has one; body as above."""
        projection = Projection(x, self.weight if weight is None else weight, self.bias)
        return projection() if body is None else body(projection), None


class WholeRowLinear(RowParallelLinear):
    """Megatron's layer on one tensor parallel rank: as `WholeColumnLinear`, for features that would be cut."""

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, None]:
        """x: [..., in] -> ([..., out], no loose bias)."""
        return linear(x, self.weight, self.bias), None


WHOLE = {ColumnParallelLinear: WholeColumnLinear, RowParallelLinear: WholeRowLinear}
SPLIT = {ColumnParallelLinear: SplitColumnLinear}


def column_linear(
    config: TransformerConfig,
    out_parts: tuple[int, ...],
    *,
    bias: bool,
    group: dist.ProcessGroup,
    cls: Any = None,
    allocate: bool = True,
) -> Any:
    """Linear from the hidden size to a stack of parts, each cut over the tensor parallel ranks.

    out_parts: rows of each fused part of the unsharded weight. A rank's output is the concatenation of its cuts.
    allocate: False for a layer that is given its weight in each call.
    """
    layer = _for_group(cls or ColumnParallelLinear, group)(
        config.hidden_size,
        sum(out_parts),
        config=config,
        init_method=_leave_as_is,
        bias=bias,
        gather_output=False,
        skip_bias_add=False,
        skip_weight_param_allocation=not allocate,
        tp_group=group,
    )
    for parameter in layer.parameters():
        parameter.parts = out_parts
    return layer


def row_linear(
    config: TransformerConfig, in_features: int, *, bias: bool, group: dist.ProcessGroup, cls: Any = None
) -> Any:
    """Linear from features cut over the tensor parallel ranks back to the hidden size; the bias is added once, after the sum."""
    return _for_group(cls or RowParallelLinear, group)(
        in_features,
        config.hidden_size,
        config=config,
        init_method=_leave_as_is,
        bias=bias,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=group,
    )


def vocab_embedding(config: TransformerConfig, rows: int, group: dist.ProcessGroup) -> VocabParallelEmbedding:
    """Embedding with its rows cut over the tensor parallel ranks, padded to a multiple of them in memory."""
    size = dist.get_world_size(group)
    layer = VocabParallelEmbedding(
        -(-rows // size) * size,
        config.hidden_size,
        init_method=_leave_as_is,
        reduce_scatter_embeddings=config.sequence_parallel,
        config=config,
        tp_group=group,
    )
    layer.weight.parts = (rows,)
    return layer


def shard_parameter(parameter: Any, dim: int, parts: tuple[int, ...] = ()) -> nn.Parameter:
    """Mark a parameter of our own as cut over the tensor parallel ranks along `dim`, fused parts (unsharded sizes) one by one."""
    mark_tensor_parallel(parameter, dim)
    if parts:
        parameter.parts = parts
    return parameter


def sum_over_tensor_ranks(parameter: Any, config: TransformerConfig) -> nn.Parameter:
    """Mark a parameter that every tensor parallel rank holds whole and uses for its own heads: gradients of all ranks are added."""
    parameter.sequence_parallel = config.tensor_model_parallel_size > 1
    return parameter


def tensor_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of x over the tensor parallel ranks, each of which goes on with it in its own way: gradients are summed too."""
    if dist.get_world_size(group) == 1:
        return x
    return copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(x, group=group), group=group)


def attach_shard_specs(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Give every parameter its `shard_spec`: global name, unsharded shape, and which part of it this rank holds."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    parameters: Iterable[tuple[str, Any]] = model.named_parameters()
    for name, parameter in parameters:
        dim = tensor_parallel_dim(parameter)
        if dim is None:
            parameter.shard_spec = ShardSpec(name, tuple(parameter.shape), rank=rank, size=size)
            continue
        parts = getattr(parameter, "parts", (parameter.shape[dim] * size,))
        shape = (*parameter.shape[:dim], sum(parts), *parameter.shape[dim + 1 :])
        spec = ShardSpec(name, tuple(shape), dim, tuple(parts), rank, size)
        assert spec.local_shape == tuple(parameter.shape), f"{name}: {spec} does not fit {tuple(parameter.shape)}"
        parameter.shard_spec = spec


def shard_spec(parameter: Tensor) -> ShardSpec:
    """The place of this parameter in the unsharded model."""
    return parameter.shard_spec  # type: ignore[attr-defined,no-any-return]


def is_tied_copy(parameter: Tensor) -> bool:
    """True for the last stage's copy of a tied embedding, which counts once in norms and checkpoints."""
    return getattr(parameter, "tied_copy", False)


def grouped_by(parameters: Iterable[nn.Parameter], attribute: str) -> list[nn.Parameter]:
    """Parameters that carry a true `attribute`."""
    return [parameter for parameter in parameters if getattr(parameter, attribute, False)]


def _for_group(cls: Any, group: dist.ProcessGroup) -> Any:
    return (WHOLE if dist.get_world_size(group) == 1 else SPLIT).get(cls, cls)


def _leave_as_is(weight: Tensor) -> Tensor:
    """An initialisation that does nothing: weights are drawn later, from their global names."""
    return weight
