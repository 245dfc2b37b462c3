"""The choice of kernels: auto takes what is built, and a refusal names the key."""

import pytest
import torch

from based_megatron.errors import ConfigError
from based_megatron.kernels.backend import resolve_backend


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("requested", ["auto", "reference"])
def test_auto_takes_the_reference_while_nothing_else_is_built(requested: str, device: str) -> None:
    assert resolve_backend(requested, torch.device(device)) == "reference"


@pytest.mark.parametrize("requested", ["triton", "cutlass"])
def test_a_refusal_names_the_value_and_the_key(requested: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.backend is .*{requested}"):
        resolve_backend(requested, torch.device("cpu"))
