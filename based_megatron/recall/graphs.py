"""Training steps as CUDA graphs: models of the study are so small that a step takes less time than its launches."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from based_megatron.recall.mqar import Examples

EAGER_STEPS = 3
"""Steps of a shape of batch before it is captured: kernels are compiled and tuned, and the optimizer's state is there."""
MOST_GRAPHS = 8


class GraphedSteps:
    """A function of one batch that returns one number, replayed where batches of a shape come again and again."""

    def __init__(self, step: Callable[[Examples], Tensor], pool: Any) -> None:
        """pool: memory of graphs. Those that share it run one after another, and what one leaves is not read after another has run."""
        self._step = step
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Examples, Tensor]] = {}
        self._pool = pool
        self._stream = torch.cuda.Stream()
        self._refused = False

    def __call__(self, batch: Examples) -> Tensor:
        """One step; the number is overwritten by the next step of the same shape."""
        shape = (*batch.tokens_BT.shape, batch.answers_BK.shape[1])
        self._seen[shape] += 1
        if shape not in self._graphs:
            if self._seen[shape] <= EAGER_STEPS or len(self._graphs) >= MOST_GRAPHS or self._refused:
                return self._eager(batch)
            try:
                self._graphs[shape] = self._captured(batch)
            except RuntimeError as error:  # an operation that waits for the host, or makes a plan
                self._refused = True
                print(f"steps are launched, not replayed: {' '.join(str(error).split())[:200]}", flush=True)
                return self._eager(batch)
        graph, inputs, number = self._graphs[shape]
        for place, value in (
            (inputs.tokens_BT, batch.tokens_BT),
            (inputs.positions_BK, batch.positions_BK),
            (inputs.answers_BK, batch.answers_BK),
        ):
            place.copy_(value)
        graph.replay()
        return number

    def _eager(self, batch: Examples) -> Tensor:
        """On the stream of captures, as gradients and the optimizer's state must have been made there."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            number = self._step(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return number

    def _captured(self, batch: Examples) -> tuple[torch.cuda.CUDAGraph, Examples, Tensor]:
        inputs = Examples(batch.tokens_BT.clone(), batch.positions_BK.clone(), batch.answers_BK.clone())
        torch.cuda.empty_cache()  # what eager steps have used is of no use to the graph
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            number = self._step(inputs)
        return graph, inputs, number
