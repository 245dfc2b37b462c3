"""Fixtures of the tests of decoding."""

import pytest
import torch

from based_megatron.checkpoint.full import write_full
from based_megatron.config import Config
from based_megatron.config.schema import DataConfig
from based_megatron.convert.huggingface import export_huggingface
from based_megatron.data_prep.tokenizer import train_tokenizer
from based_megatron.parallel.topology import leaving
from support.decoding import MODEL, weights_of


@pytest.fixture(scope="module", autouse=True)
def alone():
    """The groups of a process that decodes by itself, which other tests of the process must not find."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with leaving():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """A run, its export and its data folder."""
    root = tmp_path_factory.mktemp("generate")
    (root / "data").mkdir()
    train_tokenizer(["hello world, said the world"], 261).save(root / "data")
    write_full(root / "run", weights_of(), Config(model=MODEL, data=DataConfig(path=str(root / "data"))))
    export_huggingface(weights_of(), MODEL, root / "export", root / "data")
    return root
