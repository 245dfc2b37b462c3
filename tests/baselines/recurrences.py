"""The oracle of every operation over a sequence: its own recurrence, token by token, in fp64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def recurrence(
    step: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, ...],
    state: Tensor,
    document_ids_BT: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(outputs [B, T, ...], last state) of a step (inputs of a token, state) -> (output, state); documents start from a zero state."""
    outputs = []
    for t in range(inputs[0].shape[1]):
        if document_ids_BT is not None and t:
            goes_on_B = document_ids_BT[:, t] == document_ids_BT[:, t - 1]
            state = torch.where(goes_on_B.view(-1, *[1] * (state.ndim - 1)), state, 0.0)
        output, state = step(*(x[:, t] for x in inputs), state, **options)
        outputs.append(output)
    return torch.stack(outputs, dim=1), state


def gradients(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of a fixed random functional of the outputs."""
    generator = torch.Generator().manual_seed(3)
    total = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs)
    return list(torch.autograd.grad(total, inputs))  # type: ignore[arg-type]


def some_ids(batch: int, tokens: int) -> Tensor:
    """Documents of one token, of a few, and one that fills a sequence."""
    starts = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(4)) < 0.2
    starts[0], starts[:, 0] = False, False
    starts[1, 1:3] = True
    return starts.cumsum(1).int()
