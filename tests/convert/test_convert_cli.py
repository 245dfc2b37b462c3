"""`based import` and `based export` on real checkpoints."""

import dataclasses

import pytest
import torch

from based_megatron.checkpoint.full import read_full, write_full
from based_megatron.config import Config
from based_megatron.config.schema import DataConfig, ModelConfig, SourceConfig
from based_megatron.convert.cli import main_export, main_import
from based_megatron.convert.layout import our_shapes
from based_megatron.convert.released import from_released, to_released
from based_megatron.data_prep.tokenizer import train_tokenizer
from based_megatron.errors import CheckpointError

MODEL = ModelConfig(
    layer_pattern="cLS", hidden_size=32, ffn_hidden_size=256, num_heads=4, feature_dim=4, window_left=5, vocab_size=261
)


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in our_shapes(MODEL).items()}


@pytest.fixture
def run(tmp_path, weights):
    """A run folder, trained on a data folder with a tokenizer."""
    data = tmp_path / "data"
    data.mkdir()
    train_tokenizer(["hello world"], 261).save(data)
    write_full(tmp_path / "run", weights, Config(model=MODEL, data=DataConfig(path=str(data))))
    return tmp_path / "run"


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_export_of_a_run_and_import_of_the_export(run, weights, tmp_path, capsys):
    main_export([str(run), "--output", str(tmp_path / "hf")])
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    assert "16 greedy tokens equal" in capsys.readouterr().out
    main_import([str(tmp_path / "hf"), "--output", str(tmp_path / "again")])
    found, config = read_full(tmp_path / "again")
    assert_equal(found, weights)
    assert config.model == MODEL and config.run_dir == str(tmp_path / "again")


@pytest.mark.parametrize(
    ("variant", "words"),
    [({"feature_map": "rebased"}, "ReBased"), ({"prefix_tokens": 30}, "all tokens see in linear attention | 30 |")],
)
def test_export_of_a_variant_and_import_of_the_export(variant, words, tmp_path):
    model = dataclasses.replace(MODEL, layer_pattern="cL", **variant)
    generator = torch.Generator().manual_seed(0)
    shapes = our_shapes(model)
    weights = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    write_full(tmp_path / "run", weights, Config(model=model, data=DataConfig(path="gone")))
    main_export([str(tmp_path / "run"), "--output", str(tmp_path / "hf")])
    assert words in (tmp_path / "hf" / "README.md").read_text()
    main_import([str(tmp_path / "hf"), "--output", str(tmp_path / "again")])
    found, config = read_full(tmp_path / "again")
    assert_equal(found, weights)
    assert config.model == model
    with pytest.raises(CheckpointError, match=r"the released layout has no .*--format hf"):
        main_export([str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--format", "released"])


def test_export_of_a_step_in_the_released_layout_and_import_of_it(run, weights, tmp_path):
    main_export([str(run / "checkpoints" / "step-00000000"), "--output", str(tmp_path / "out"), "--format", "released"])
    assert_equal(from_released(tmp_path / "out")[0], weights)
    main_import([str(tmp_path / "out"), "--output", str(tmp_path / "again")])
    assert_equal(read_full(tmp_path / "again")[0], weights)


def test_reference_checkpoint_survives_import_and_export(shared_dir, tmp_path):
    reference = shared_dir / "fixtures" / "reference_checkpoint"
    main_import([str(reference), "--output", str(tmp_path / "run")])
    main_export([str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--format", "released"])
    expected, found = (
        torch.load(folder / "pytorch_model.bin", weights_only=True) for folder in (reference, tmp_path / "out")
    )
    assert_equal(found, expected)


def test_a_tokenizer_can_be_given(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    train_tokenizer(["quite another text"], 258).save(other)
    main_export([str(run), "--output", str(tmp_path / "hf"), "--tokenizer", str(other)])
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()


def test_the_tokenizer_of_a_mixture_is_found(run, weights, tmp_path):
    data = DataConfig(sources=(SourceConfig(path=str(tmp_path / "data")),))
    write_full(tmp_path / "mixed", weights, Config(model=MODEL, data=data))
    main_export([str(tmp_path / "mixed"), "--output", str(tmp_path / "hf")])
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_without_the_data_folder_the_export_says_what_it_lacks(weights, tmp_path, capsys):
    write_full(tmp_path / "run", weights, Config(model=MODEL, data=DataConfig(path="gone")))
    main_export([str(tmp_path / "run"), "--output", str(tmp_path / "hf")])
    assert "--tokenizer" in capsys.readouterr().out
    assert not (tmp_path / "hf" / "tokenizer.json").exists()


def test_outputs_in_the_way_are_refused(run, tmp_path):
    (tmp_path / "there").mkdir()
    for format in ("hf", "released"):
        with pytest.raises(CheckpointError, match="exists already"):
            main_export([str(run), "--output", str(tmp_path / "there"), "--format", format])
    with pytest.raises(CheckpointError, match="exists already"):
        main_import([str(run), "--output", str(tmp_path / "there")])


def test_a_damaged_export_is_refused(run, tmp_path):
    main_export([str(run), "--output", str(tmp_path / "hf")])
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is damaged"):
        main_import([str(tmp_path / "hf"), "--output", str(tmp_path / "again")])
    weights.unlink()
    with pytest.raises(CheckpointError, match="has neither"):
        main_import([str(tmp_path / "hf"), "--output", str(tmp_path / "again")])
    assert not (tmp_path / "again").exists()


def test_import_of_nothing_is_refused_in_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json") as raised:
        main_import([str(tmp_path / "nothing"), "--output", str(tmp_path / "run")])
    assert "\n" not in str(raised.value)


def test_import_keeps_a_window_and_vocabulary_that_are_not_the_defaults(tmp_path, weights):
    model = dataclasses.replace(MODEL, window_left=7)
    to_released(weights, model, tmp_path / "released")
    main_import([str(tmp_path / "released"), "--output", str(tmp_path / "run")])
    assert read_full(tmp_path / "run")[1].model == model
