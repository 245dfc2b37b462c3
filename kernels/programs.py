"""How many programs a launch has whose programs take rows after each other, and leave partial sums."""

from __future__ import annotations

import functools

import torch

PROGRAMS_PER_MULTIPROCESSOR = 4


@functools.cache
def programs_of(device: torch.device, in_interpreter: int) -> int:
    """Programs that fill the device; in the interpreter, on a CPU, only so many as tests need."""
    if device.type != "cuda":
        return in_interpreter
    return PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
