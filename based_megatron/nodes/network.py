"""All-reduces inside nodes and between neighbours. Each is a small world of its own, so that a dead node costs its partners alone."""

import contextlib
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from based_megatron.nodes.measure import SIZES, median_seconds
from based_megatron.parallel.host import environment

ROUNDS = 2
"""Each node meets the one after it and the one before it in the ring, so that a slow node can be told from a slow partner."""
TIMEOUT_SECONDS = 30
"""For an all-reduce and the connections that it needs: the ranks begin together."""
SLOW_SECONDS = 0.5
"""An all-reduce that takes so long is not repeated: others wait for its ranks."""


PATIENCE_SECONDS = (3 * ROUNDS + 2) * TIMEOUT_SECONDS
"""For all rounds: each begins when the one before has ended everywhere, or after two timeouts."""


def begin_together(store: dist.Store, name: str, ranks: int) -> None:
    """Wait until so many ranks have come here, or for two timeouts if one of them does not come."""
    if store.add(f"count {name}", 1) == ranks:
        store.set(f"all {name}", "")
    with contextlib.suppress(dist.DistStoreError):
        store.wait([f"all {name}"], timedelta(seconds=2 * TIMEOUT_SECONDS))


def partner(node: int, nodes: int, number: int) -> int | None:
    """The node that `node` meets in a round; None if it is left over.

    Round 0: (0, 1), (2, 3), ...; round 1: (1, 2), (3, 4), ... and, with an even number of nodes, (last, 0).
    """
    other = node + 1 if (node - number) % 2 == 0 else node - 1
    if nodes % 2 == 0 and nodes > 2:
        return other % nodes
    return other if 0 <= other < nodes else None


def all_reduce_rate(store: dist.Store, name: str, members: Sequence[int], rank: int, device: torch.device) -> float:
    """Bus bandwidth in bytes a second of an all-reduce over these ranks, which all call this. Raises if one of them does not answer."""
    size = len(members)
    message = torch.ones(SIZES[device.type].message_bytes // 4, dtype=torch.float32, device=device)
    # A rank whose partner is dead must get an exception, not be ended by NCCL's watchdog.
    with environment(TORCH_NCCL_BLOCKING_WAIT="1"):
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(name, store),
            rank=list(members).index(rank),
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT_SECONDS),
            device_id=device if device.type == "cuda" else None,
        )
        try:
            seconds = _first_seconds(message, device)
            if seconds < SLOW_SECONDS:
                seconds = median_seconds(lambda: dist.all_reduce(message, op=dist.ReduceOp.MAX), device)
        finally:
            dist.destroy_process_group()
    return 2 * (size - 1) / size * message.nbytes / seconds


def _first_seconds(message: Tensor, device: torch.device) -> float:
    """Seconds of the second all-reduce, after one that connects: the same on all ranks, so that they go on alike."""
    dist.all_reduce(message, op=dist.ReduceOp.MAX)
    began = time.perf_counter()
    dist.all_reduce(message, op=dist.ReduceOp.MAX)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    longest = torch.tensor([time.perf_counter() - began], device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return float(longest)
