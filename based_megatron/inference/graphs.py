"""Capture of CUDA graphs: a step of decoding, or a short prompt, is some hundreds of kernels that take less time than their launches."""

from collections.abc import Callable

import torch


def captured(call: Callable[[], None], warm_ups: int = 2) -> torch.cuda.CUDAGraph:
    """A graph of what `call` launches, after calls that compile kernels and allocate what they keep."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Threads of a process group may look at the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph
