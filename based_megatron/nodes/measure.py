"""What one rank measures of its own device and host, without the others."""

import hashlib
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from based_megatron.run_folder.history import LIBRARIES, versions

PRODUCT_SIZE = 1024
"""Rows and columns of the matrices whose product every device must compute alike."""
REPETITIONS = 20
FILE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Sizes:
    """How much work is timed on a kind of device."""

    matrix: int
    """Rows and columns of square matrices."""
    memory_bytes: int
    """Bytes that are copied."""
    message_bytes: int
    """Bytes of an all-reduce."""


SIZES = {"cuda": Sizes(8192, 2**30, 2**28), "cpu": Sizes(512, 2**24, 2**20)}


@dataclass(frozen=True)
class RankReport:
    """One device and its process."""

    rank: int
    host: str
    """Name of the node, as SLURM has it where it runs."""
    versions: Mapping[str, str]
    """Device, driver and libraries: they must be the same everywhere."""
    matrix_flops: float
    """FLOP/s of a large matrix product in bf16 (fp32 on a CPU)."""
    memory_bytes_per_second: float
    """Bytes read and written by a copy in the device's memory, a second."""
    product: str
    """Hash of the bits of a product of fixed matrices; two hashes joined by a plus sign if it is not the same each time."""


def measure_rank(rank: int, device: torch.device) -> RankReport:
    """Takes a few seconds, and a device that nobody else uses."""
    sizes = SIZES[device.type]
    return RankReport(
        rank=rank,
        host=node_name(),
        versions=device_versions(device),
        matrix_flops=matrix_flops(sizes.matrix, device),
        memory_bytes_per_second=memory_rate(sizes.memory_bytes, device),
        product=product_hash(device),
    )


def node_name() -> str:
    """This node's name: SLURM's own where it runs, because that can be excluded."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def device_versions(device: torch.device) -> dict[str, str]:
    """Names and versions that decide what a step computes on a device."""
    found = {"python": platform.python_version(), **versions((*LIBRARIES, "triton"))}
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
        driver = Path("/proc/driver/nvidia/version")
        if driver.exists():
            found["driver"] = driver.read_text().splitlines()[0]
    return found


def matrix_flops(size: int, device: torch.device) -> float:
    """FLOP/s of a square matrix product."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    return 2 * size**3 / median_seconds(lambda: torch.mm(left, right, out=out), device)


def memory_rate(copied_bytes: int, device: torch.device) -> float:
    """Bytes a second, read and written, of a copy inside the device's memory."""
    source = torch.zeros(copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * copied_bytes / median_seconds(lambda: target.copy_(source), device)


def product_hash(device: torch.device) -> str:
    """Hash of a product that is computed several times; devices of one kind must agree in every bit."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, generator=generator) for _ in range(2))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = left.to(device, dtype), right.to(device, dtype)
    first = left @ right
    for _ in range(REPETITIONS):
        again = left @ right
        if not torch.equal(first, again):
            return f"{_hash(first)}+{_hash(again)}"
    return _hash(first)


def file_rate(folder: Path) -> float:
    """Bytes a second at which a file of the folder is written through to the disk and read. Raises OSError if that fails."""
    path, data = folder / f"node-check-{node_name()}.tmp", os.urandom(FILE_BYTES)
    began = time.perf_counter()
    try:
        with open(path, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if path.read_bytes() != data:
            raise OSError(f"{path} is not what was written to it")
    finally:
        path.unlink(missing_ok=True)
    return 2 * FILE_BYTES / (time.perf_counter() - began)


def median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call, after some that are not counted."""
    seconds = []
    for _ in range(2 * REPETITIONS):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[REPETITIONS:])


def _hash(values: Tensor) -> str:
    return hashlib.sha256(values.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
