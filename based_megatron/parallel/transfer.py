"""Copies between host and device, queued behind the work that is queued already.

Only pinned memory makes them so: of pageable memory a GPU copies nothing until it has come to that place of its queue, and the
host stands still until then, `non_blocking` or not.
"""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; nobody waits for the copy."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """A copy on the host of what a scalar of the device is at this place of the queue."""

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if not tensor.is_cuda:
            self._copy = tensor.clone()
            return
        self._copy = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def wait(self) -> bool | float:
        """The value of a scalar, once the device has come to the copy; what was queued later goes on meanwhile."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.item()
