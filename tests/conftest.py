"""Fixtures shared by all tests."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("BASED_TEST_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Read when a kernel is defined: Triton kernels run in its interpreter, on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

from support.interpreter import patch_interpreter
from support.pool import WorkerPool, on_gpu

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch has read the variable when it was imported
if not on_gpu():
    patch_interpreter()
# An example may wait for the cores that tests share.
hypothesis.settings.register_profile("shared cores", deadline=None)
hypothesis.settings.load_profile("shared cores")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder of the reference checkpoint, real text and the GPT-2 tokenizer."""
    path = Path(os.environ.get("BASED_SHARED_DIR", Path(__file__).resolve().parents[2] / "shared"))
    if not (path / "fixtures").is_dir():
        pytest.skip(f"no reference data at {path}: set BASED_SHARED_DIR to the folder with fixtures/ and data/")
    return path


@pytest.fixture(scope="session")
def worker_pool() -> Iterator[Callable[[int], WorkerPool]]:
    """worker_pool(n) is a pool of n gloo ranks, started on first use and replaced when spent."""
    pools: dict[int, WorkerPool] = {}

    def get(world_size: int) -> WorkerPool:
        if on_gpu() and torch.cuda.device_count() < world_size:
            pytest.skip(f"needs {world_size} GPUs, found {torch.cuda.device_count()}")
        for size in [size for size, pool in pools.items() if pool.spent]:
            pools.pop(size).close()
        if world_size not in pools:
            pools[world_size] = WorkerPool(world_size)
        return pools[world_size]

    yield get
    for pool in pools.values():
        pool.close()
