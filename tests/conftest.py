"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder of the reference checkpoint, real text and the GPT-2 tokenizer."""
    path = Path(os.environ.get("BASED_SHARED_DIR", Path(__file__).resolve().parents[2] / "shared"))
    if not (path / "fixtures").is_dir():
        pytest.skip(f"no reference data at {path}: set BASED_SHARED_DIR to the folder with fixtures/ and data/")
    return path
