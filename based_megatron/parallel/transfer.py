"""Copies between host and device, queued behind the work that is queued already.

Only pinned memory makes them so: of pageable memory a GPU copies nothing until it has come to that place of its queue, and the
host stands still until then, `non_blocking` or not.
"""

from typing import Any

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; nobody waits for the copy."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """A copy on the host of what a tensor of the device is at this place of the queue."""

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
        return self._arrive().item()

    def wait_for_list(self) -> Any:
        """The numbers of the tensor as `Tensor.tolist` gives them, alike."""
        return self._arrive().tolist()

    def _arrive(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy
