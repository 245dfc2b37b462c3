"""The choice of the implementation that operations run in: made once, from the configuration and the device."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from based_megatron.errors import ConfigError

BACKENDS = ("auto", "reference", "triton")


def resolve_backend(requested: str, device: torch.device) -> str:
    """Name of the implementation that every op of a run uses: `auto` is triton on a GPU and reference elsewhere.

    Args:
        requested: the value of `train.backend`: auto, reference or triton.
        device: where the model runs.

    Returns: a name to pass as `backend` to the ops of this package.

    Raises: ConfigError when the backend is unknown or cannot run here. On a CPU, Triton kernels run in Triton's
        interpreter only, for tests, where the environment has TRITON_INTERPRET=1.
    """
    if requested not in BACKENDS:
        raise ConfigError(f"train.backend is {requested!r}: it must be one of {', '.join(BACKENDS)}")
    on_gpu = device.type == "cuda"
    if requested == "reference" or (requested == "auto" and not on_gpu):
        return "reference"
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            f"train.backend is {requested}, which needs the package triton on device {device}, and it is not installed: "
            "install it (pip install triton), or set train.backend to reference"
        )
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"train.backend is triton on device {device}: the kernels need a GPU (TRITON_INTERPRET=1 interprets them, "
            "for tests); set train.backend to auto or reference"
        )
    return "triton"


def implementation(op: str, backend: str, built: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function that implements `op` in `backend`, a resolved name; `built` maps names to functions."""
    if backend not in built:
        raise ConfigError(f"{op} has no {backend!r} implementation (built: {', '.join(built)}): change train.backend")
    return built[backend]
