"""Fixtures of the tests of evaluation."""

import pytest
from tiny_model import write_tiny


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory):
    """A tiny model: folders run, export and data."""
    return write_tiny(tmp_path_factory.mktemp("evaluation") / "tiny")
