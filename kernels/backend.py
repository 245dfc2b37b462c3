"""Which implementation of the ops runs: chosen once, from the configuration and the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from based_megatron.errors import ConfigError

BACKENDS = ("auto", "reference", "triton")


def resolve_backend(requested: str, device: torch.device) -> str:
    """Name of the implementation that every op of a run uses.

    Args:
        requested: the value of `train.backend`: auto, reference or triton.
        device: where the model runs.

    Returns: a name to pass as `backend` to the ops of this package.

    Raises: ConfigError when the requested backend is unknown or is not built.
    """
    if requested in ("auto", "reference"):
        return "reference"
    if requested == "triton":
        raise ConfigError(
            f"train.backend is triton, but the Triton kernels are not built yet (device {device}): "
            "set train.backend to auto or reference"
        )
    raise ConfigError(f"train.backend is {requested!r}: it must be one of {', '.join(BACKENDS)}")


def implementation(op: str, backend: str, built: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function that implements `op` in `backend`, a resolved name; `built` maps names to functions."""
    if backend not in built:
        raise ConfigError(f"{op} has no {backend!r} implementation (built: {', '.join(built)}): change train.backend")
    return built[backend]
