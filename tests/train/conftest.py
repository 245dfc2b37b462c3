"""A corpus that jobs train on."""

from pathlib import Path

import pytest

from support.runs import prepare_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A prepared corpus of a few hundred short documents."""
    return prepare_corpus(tmp_path_factory.mktemp("corpus"), documents=300)
