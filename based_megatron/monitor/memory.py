"""Memory of this process, for the logs."""

import psutil
import torch

GIB = 2**30


def memory_gib(device: torch.device) -> dict[str, float]:
    """On a GPU what torch has allocated, now and at most so far; on a CPU the resident set of the process."""
    if device.type == "cuda":
        return {
            "allocated_gib": torch.cuda.memory_allocated(device) / GIB,
            "peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
        }
    return {"rss_gib": psutil.Process().memory_info().rss / GIB}
