"""The choice of kernels: auto takes what is built for the device, and a refusal names the key."""

import pytest
import torch

from based_megatron.errors import ConfigError
from based_megatron.kernels.backend import resolve_backend


@pytest.mark.parametrize(
    ("requested", "device", "backend"),
    [
        ("auto", "cpu", "reference"),
        ("auto", "cuda", "triton"),
        ("reference", "cuda", "reference"),
        ("triton", "cuda", "triton"),
    ],
)
def test_auto_is_triton_on_a_gpu_and_reference_elsewhere(requested: str, device: str, backend: str) -> None:
    assert resolve_backend(requested, torch.device(device)) == backend


def test_a_cpu_only_interprets_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("triton", torch.device("cpu")) == "triton"
    assert resolve_backend("auto", torch.device("cpu")) == "reference"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match=r"train\.backend is triton on device cpu.*train\.backend"):
        resolve_backend("triton", torch.device("cpu"))


@pytest.mark.parametrize("requested", ["auto", "triton"])
def test_a_gpu_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch, requested: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"train\.backend is {requested}.*not installed"):
        resolve_backend(requested, torch.device("cuda"))


def test_a_refusal_names_the_value_and_the_key() -> None:
    with pytest.raises(ConfigError, match=r"train\.backend is .*cutlass"):
        resolve_backend("cutlass", torch.device("cpu"))
