"""Folders of weights and configs that others made: only what belongs to them is read, and what is wrong is one line."""

import json
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from based_megatron.checkpoint.full import write_full
from based_megatron.config import Config
from based_megatron.config.schema import ModelConfig
from based_megatron.convert.cli import main_export, main_import
from based_megatron.convert.exported import read_export
from based_megatron.convert.huggingface import export_huggingface
from based_megatron.convert.layout import our_shapes
from based_megatron.convert.released import from_released, to_released
from based_megatron.convert.released_config import released_config
from based_megatron.errors import CheckpointError

MODEL = ModelConfig(
    layer_pattern="cLS", hidden_size=32, ffn_hidden_size=256, num_heads=4, feature_dim=4, window_left=5, vocab_size=61
)
TARGET = released_config(MODEL)["alt_mixer_2"]["_target_"]


def drawn() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in our_shapes(MODEL).items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An export and a folder in the released layout, of the same weights."""
    root = tmp_path_factory.mktemp("made")
    export_huggingface(drawn(), MODEL, root / "hf")
    to_released(drawn(), MODEL, root / "released")
    return root


@pytest.fixture
def folders(made, tmp_path):
    """Copies of them, to be damaged."""
    return shutil.copytree(made, tmp_path / "copy")


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def split_safetensors(folder):
    """Two files and their index in place of the one file."""
    weights = load_file(folder / "model.safetensors")
    names, places = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", ["model.fp16.safetensors", "adapter_model.safetensors", "a.safetensors"])
def test_other_files_that_lie_in_an_export_are_not_read(folders, split, name):
    folder = folders / "hf"
    stray = {key: torch.zeros_like(value) for key, value in load_file(folder / "model.safetensors").items()}
    if split:
        split_safetensors(folder)
    save_file(stray, folder / name)
    weights, model = read_export(folder)
    assert_equal(weights, drawn())
    assert model == MODEL


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda places: {**places, "model.norm.weight": "../x.safetensors"}, "no file of its folder"),
        (lambda places: {**places, "model.norm.weight": "model-2.safetensors"}, "which .* places elsewhere|is damaged"),
        (lambda places: {**places, "extra": "model-0.safetensors"}, "lacks extra"),
        (lambda places: [], "cannot read"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(folders, damage, reason):
    places = split_safetensors(folders / "hf")
    (folders / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": damage(places)}))
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_export(folders / "hf")
    assert "\n" not in str(caught.value)


def test_an_export_without_weights_is_refused(folders):
    (folders / "hf" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        read_export(folders / "hf")


def test_a_released_checkpoint_in_several_files_is_read_by_its_index(folders):
    folder = folders / "released"
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    places = {}
    for number, part in enumerate((sorted(weights)[:5], sorted(weights)[5:])):
        torch.save({name: weights[name] for name in part}, folder / f"part-{number}.bin")
        places |= dict.fromkeys(part, f"part-{number}.bin")
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    torch.save({name: torch.zeros(1) for name in weights}, folder / "stray.bin")
    assert_equal(from_released(folder)[0], drawn())


def test_a_flipped_bit_in_a_pickled_file_is_found(folders):
    file = folders / "released" / "pytorch_model.bin"
    content, weight = bytearray(file.read_bytes()), drawn()["embedding.weight"]
    place = content.index(weight.numpy().tobytes()[:64])
    content[place + 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"the checksum of .* is wrong"):
        from_released(folders / "released")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_size": "32"}, "hidden_size must be a whole number of at least 1, not '32'"),
        ({"hidden_size": 0}, "hidden_size must be .* not 0"),
        ({"intermediate_size": -5}, "intermediate_size must be .* not -5"),
        ({"num_attention_heads": 0}, "num_attention_heads must be .* not 0"),
        ({"num_attention_heads": 5}, "is not a multiple of num_attention_heads 5"),
        ({"feature_dim": 2.5}, "feature_dim must be .* not 2.5"),
        ({"feature_dim": 2000}, "model.feature_dim is 2000"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be .* not '3'"),
        ({"num_hidden_layers": 10**9, "mixers": []}, "num_hidden_layers must be at most 10000, not 1000000000"),
        ({"rotary_fraction": 2.0}, r"model.rotary_fraction is 2\.0"),
        ({"rotary_base": "big"}, "rotary_base"),
        ({"rms_norm_eps": -1.0}, r"model.norm_eps is -1\.0"),
        ({"sliding_window": -3}, "model.window_left is -4"),
        ({"sliding_window": None}, "config.json is not that of a Based export|sliding_window"),
    ],
)
def test_an_export_whose_config_cannot_be_is_one_line(folders, change, reason):
    file = folders / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_export(folders / "hf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rotary_emb_fraction": 2.0}, r"model.rotary_fraction is 2\.0"),
        ({"layer_norm_epsilon": -1e-5}, "model.norm_eps is -1e-05"),
        ({"layer_norm_epsilon": "small"}, "'small' for model.norm_eps"),
        ({"initializer_range": 0.0}, "model.init_std"),
        ({"n_layer": 0}, "n_layer 0: it must be 1 to 10000"),
        ({"n_layer": 10**9}, "n_layer 1000000000: it must be 1 to 10000"),
        ({"n_layer": "3"}, "config.json is not that of a released Based checkpoint"),
        ({"n_inner": -256}, "n_inner -256"),
        ({"alt_mixer_2": {"_target_": TARGET, "window_size": -4}}, "model.window_left is -2"),
        ({"alt_mixer_2": {"_target_": TARGET, "window_size": 7.5}}, "model.window_left"),
    ],
)
def test_a_released_config_that_cannot_be_is_one_line(folders, change, reason):
    file = folders / "released" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=reason) as caught:
        from_released(folders / "released")
    assert "\n" not in str(caught.value)


# --- export and import


@pytest.mark.parametrize("format", ["hf", "released"])
def test_weights_that_are_no_numbers_are_not_exported(tmp_path, format):
    weights = drawn()
    weights["layers.1.mixer_norm.weight"][3] = float("nan")
    write_full(tmp_path / "run", weights, Config(model=MODEL))
    with pytest.raises(CheckpointError, match=r"layers.1.mixer_norm.weight of .* has 1 of 32 values that are nan"):
        main_export([str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--format", format])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def nearly_full():
    """No file may grow beyond 20,000 bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_leaves_nothing(made, tmp_path, nearly_full):
    with pytest.raises(CheckpointError, match="cannot write") as caught:
        to_released(drawn(), MODEL, tmp_path / "released")
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        main_import([str(made / "hf"), "--output", str(tmp_path / "run")])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
