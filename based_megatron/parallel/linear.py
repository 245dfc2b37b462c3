"""Linear layers cut over tensor parallel ranks, with fused parts, and the names and places of parameters.

Legend: L tokens of this rank's slice, B sequences, D hidden size.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from based_megatron.parallel.gradient_sums import linear
from based_megatron.parallel.megatron import (
    ColumnParallelLinear,
    LayerConfig,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    mark_tensor_parallel,
    reduce_from_tensor_model_parallel_region,
    tensor_parallel_dim,
)
from based_megatron.parallel.sharding import VOCAB_MULTIPLE, ShardSpec, rows_of_rank
from based_megatron.parallel.tensor_overlap import ColumnProduct, RowProduct

Product = Callable[[Any, Tensor, Tensor | None], Tensor]
"""(x, weight, bias) to x weight^T + bias."""


@dataclass(frozen=True)
class Projection:
    """A column parallel projection taken apart, for what must be sent before all of it is computed."""

    x_LBD: Any
    """All tokens of the slice, also under sequence parallelism: a tensor, or what the product takes in its place."""
    weight: Tensor
    bias: Tensor | None
    product: Product = linear

    def __call__(self) -> Tensor:
        """The whole projection, [L, B, rows of the weight]."""
        return self.product(self.x_LBD, self.weight, self.bias)

    def parts(self, *rows: int) -> list["Projection"]:
        """Projections of the same input by consecutive blocks of the weight, with these numbers of rows."""
        biases = [None] * len(rows) if self.bias is None else self.bias.split(rows)
        weights = self.weight.split(rows)
        return [Projection(self.x_LBD, w, b, self.product) for w, b in zip(weights, biases, strict=True)]

    @torch.no_grad()
    def last_tokens(self, tokens: int, rows: slice) -> Tensor:
        """Some rows of the output at the last tokens, ahead of all others and without gradients."""
        bias = None if self.bias is None else self.bias[rows]
        return self.product(self.x_LBD[self.x_LBD.shape[0] - tokens :], self.weight[rows], bias)


Body = Callable[[Projection], Tensor]


class SplitColumnLinear(ColumnParallelLinear):
    """Megatron's layer, which can hand its projection to a `body` that orders the parts of it, and overlaps products and messages.

    The body runs inside of the layer's forward: there ZeRO-3 has the weight, and tensor parallel ranks gather x once.
    """

    def forward(self, x: Tensor, weight: Tensor | None = None, *, body: Body | None = None, **options: Any) -> Any:
        """Megatron's forward; with a body, which needs all rows before it begins, the result is (what the body returns, None)."""
        if body is None and self.config.tensor_ranks is not None:
            weight = self.weight if weight is None else weight
            return ColumnProduct.apply(x, weight, self.bias, self.config.tensor_ranks), None
        if body is None:
            return super().forward(x, weight, **options)
        enter = gather_from_sequence_parallel_region if self.sequence_parallel else copy_to_tensor_model_parallel_region
        return body(Projection(enter(x, group=self.tp_group), self.weight, self.bias)), None


class SplitRowLinear(RowParallelLinear):
    """Megatron's layer, which overlaps products and messages."""

    def forward(self, x: Tensor, **options: Any) -> Any:
        """Megatron's forward."""
        if self.config.tensor_ranks is None:
            return super().forward(x, **options)
        return RowProduct.apply(x, self.weight, self.bias, self.config.tensor_ranks), None


class WholeColumnLinear(ColumnParallelLinear):
    """Megatron's layer on one tensor parallel rank: the bias is added inside the matrix product, not in a pass of its own."""

    product: Product = staticmethod(linear)

    def forward(self, x: Tensor, weight: Tensor | None = None, *, body: Body | None = None, **_: Any) -> Any:
        """x: [..., in] -> ([..., out], no loose bias). weight replaces the layer's own, if it has one; body as above."""
        projection = Projection(x, self.weight if weight is None else weight, self.bias, self.product)
        return projection() if body is None else body(projection), None


class WholeRowLinear(RowParallelLinear):
    """Megatron's layer on one tensor parallel rank: as `WholeColumnLinear`, for features that would be cut."""

    product: Product = staticmethod(linear)

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, None]:
        """x: [..., in] -> ([..., out], no loose bias)."""
        return self.product(x, self.weight, self.bias), None


WHOLE = {ColumnParallelLinear: WholeColumnLinear, RowParallelLinear: WholeRowLinear}
SPLIT = {ColumnParallelLinear: SplitColumnLinear, RowParallelLinear: SplitRowLinear}


def column_linear(
    config: LayerConfig,
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


def row_linear(config: LayerConfig, in_features: int, *, bias: bool, group: dist.ProcessGroup, cls: Any = None) -> Any:
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


def vocab_embedding(config: LayerConfig, rows: int, group: dist.ProcessGroup) -> VocabParallelEmbedding:
    """Embedding with its rows cut over the tensor parallel ranks, and padded in memory."""
    size = dist.get_world_size(group)
    layer = VocabParallelEmbedding(
        size * rows_of_rank(rows, size, VOCAB_MULTIPLE),
        config.hidden_size,
        init_method=_leave_as_is,
        reduce_scatter_embeddings=config.sequence_parallel,
        config=config,
        tp_group=group,
    )
    layer.weight.parts, layer.weight.multiple = (rows,), VOCAB_MULTIPLE
    return layer


def vocab_projection(config: LayerConfig, rows: int, group: dist.ProcessGroup, *, allocate: bool) -> Any:
    """Column layer whose rows are those of `vocab_embedding`; allocate: as `column_linear`."""
    size = dist.get_world_size(group)
    padded = size * rows_of_rank(rows, size, VOCAB_MULTIPLE)
    layer = column_linear(config, (padded,), bias=False, group=group, allocate=allocate)
    for parameter in layer.parameters():
        parameter.parts, parameter.multiple = (rows,), VOCAB_MULTIPLE
    return layer


def shard_parameter(parameter: Any, dim: int, parts: tuple[int, ...] = ()) -> nn.Parameter:
    """Mark a parameter of our own as cut over the tensor parallel ranks along `dim`, fused parts (unsharded sizes) one by one."""
    mark_tensor_parallel(parameter, dim)
    if parts:
        parameter.parts = parts
    return parameter


def sum_over_tensor_ranks(parameter: Any, config: LayerConfig) -> nn.Parameter:
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
        spec = ShardSpec(name, tuple(shape), dim, tuple(parts), rank, size, getattr(parameter, "multiple", 1))
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
