"""GPUs that preflight knows: memory that PyTorch can use, and peak arithmetic."""

from dataclasses import dataclass

from based_megatron.errors import ConfigError
from based_megatron.monitor.flops import peak_flops

GIB = 2**30
USABLE_GIB = {"h100": 79.1, "h200": 139.8, "h800": 79.1, "a100": 79.1, "a100-40gb": 39.4, "b200": 178.0, "l40s": 44.4}


@dataclass(frozen=True)
class Gpu:
    """One device."""

    name: str
    memory_bytes: int
    peak_flops: float
    """Dense bf16."""


def gpu_named(name: str) -> Gpu:
    """A GPU by name, in any case. Raises ConfigError for one that is not known."""
    key = name.lower()
    peak = peak_flops(key.split("-")[0])
    if key not in USABLE_GIB or peak is None:
        raise ConfigError(f"--gpu {name} is not known; give one of {', '.join(USABLE_GIB)}")
    return Gpu(key, int(USABLE_GIB[key] * GIB), peak)
