"""Launches of kernels that begin while the one before them in the stream ends: programmatic dependent launch, of Hopper and later.

A step of decoding is some hundreds of kernels of microseconds, so that launches one after another are a part of its time.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_inputs(overlaps: tl.constexpr):
    """Wait for the kernels before: the first line of a kernel launched with `overlapped`, which may read and write nothing before it.

    The next kernel is let in at once: it waits in the same place, until this one has ended.
    """
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()


@cache
def _can_overlap(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


def overlapped(device: torch.device) -> dict[str, Any]:
    """Launch arguments of a kernel that begins with `wait_for_inputs(OVERLAPS)`."""
    if device.type != "cuda" or not _can_overlap(device):
        return {"OVERLAPS": False}
    return {"OVERLAPS": True, "launch_pdl": True}
