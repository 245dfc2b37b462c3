"""A start is refused before its ranks join: by memory, by a missing checkpoint, and by `train --dry-run`, which writes nothing."""

import dataclasses
import re

import pytest
import torch

from based_megatron import cli
from based_megatron.config import load_config, parse_config
from based_megatron.errors import BasedError, ConfigError
from based_megatron.train.accept import accept, check_memory, check_precision, least_bytes, memory_bytes


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """The command line of a run that can start."""
    folder = tmp_path_factory.mktemp("accept")
    (folder / "text.txt").write_text("a few words of a corpus, said again and again. " * 2000)
    assert cli.main(["prep", str(folder / "text.txt"), "--output", str(folder / "data"), "--vocab-size", "300"]) == 0
    shape = ["--data.sequence-length-tokens", "32", "--validation.interval-steps", "0"]
    return ["--config", "tiny", "--data.path", str(folder / "data"), "--run-dir", str(folder / "run"), *shape]


def test_a_dry_run_says_yes_and_writes_nothing(arguments, tmp_path, capsys):
    assert cli.main(["train", *arguments, "--run-dir", str(tmp_path / "run"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "this run can start" in said and not (tmp_path / "run").exists()
    assert re.search(r"^data: \S+ tokens, [\d.e+]+ epochs$", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--checkpoint.load", "nowhere"], "no checkpoint in .*nowhere: change checkpoint.load"),
        (["--data.path", "nowhere"], "no manifest.json at .*nowhere"),
        (["--model.hidden-size", str(4 * 10**9)], "a rank needs at least .*GiB.*model.hidden_size"),
        (["--parallel.zero-bucket-elements", str(10**15)], "parallel.zero_bucket_elements"),
        (["--model.vocab-size", "8"], "model.vocab_size 8 is smaller"),
        (["--model.layer-pattern", "cX"], "'X'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_dry_run_refuses_what_the_start_would(arguments, change, words):
    with pytest.raises(BasedError, match=words):
        accept(parse_config([*arguments, *change]), world_size=1)


def test_fp8_needs_a_hopper(monkeypatch):
    config, gpu = parse_config(["--config", "tiny", "--train.precision", "fp8"]), torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(ConfigError, match=r"Hopper.*not NVIDIA A100; set train.precision=bf16"):
        check_precision(config, gpu)
    check_precision(config, torch.device("cpu"))
    check_precision(parse_config(["--config", "tiny"]), gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_precision(config, gpu)


def test_the_least_memory_of_a_1b_model():
    """bf16: 2 bytes of weights, 12 of masters and moments; 36 fp32 residuals of 4 x 2048 tokens; a bucket of bf16."""
    config, parameters = load_config("based-1b"), 1_349_453_056
    rest = 36 * 4 * 2048 * 1792 * 4 + 2 * config.parallel.zero_bucket_elements
    assert least_bytes(config, 1) == 14 * parameters + rest
    assert least_bytes(config, 8) == 2 * parameters + 12 * parameters // 8 + rest
    zero_3 = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, zero_stage=3))
    assert least_bytes(zero_3, 8) == 2 * parameters // 8 + 12 * parameters // 8 + rest
    check_memory(config, 8, least_bytes(config, 8))
    with pytest.raises(ConfigError, match=r"raise parallel\.tensor"):
        check_memory(config, 8, least_bytes(config, 8) - 1)


def test_a_cpu_has_the_memory_of_its_machine():
    assert memory_bytes(torch.device("cpu")) > 2**29
