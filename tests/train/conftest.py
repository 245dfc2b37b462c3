"""A corpus that jobs train on."""

import json
from pathlib import Path

import pytest

from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.prepare import prepare


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A prepared corpus of a few hundred short documents."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": f"document {i}: " + " ".join(f"{j * i % 97}" for j in range(40))}) for i in range(300)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    output = folder / "data"
    prepare(
        PrepConfig(inputs=(str(folder / "text.jsonl"),), output=str(output), vocab_size=300, validation_fraction=0.1)
    )
    return output
