"""State dict to Hugging Face and back, and exports that prove themselves."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from based_megatron.config.pattern import parse_layer_pattern
from based_megatron.config.schema import ModelConfig
from based_megatron.convert import huggingface, proof
from based_megatron.convert.exported import read_export
from based_megatron.convert.huggingface import export_huggingface, from_hf, hf_config, hf_model, model_config, to_hf
from based_megatron.convert.layout import count_parameters, our_shapes, short_pattern
from based_megatron.data_prep.tokenizer import train_tokenizer
from based_megatron.errors import CheckpointError

CONFIG = ModelConfig(
    layer_pattern="cLSA c",
    hidden_size=32,
    ffn_hidden_size=48,
    num_heads=4,
    feature_dim=4,
    window_left=5,
    conv_kernel=4,
    conv_expand=6,
    rotary_base=500.0,
    rotary_fraction=0.5,
    norm_eps=1e-6,
    vocab_size=261,
    vocab_multiple=16,
    init_std=0.01,
)


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in our_shapes(config).items()}


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_bit_exact_and_keeps_every_setting(tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    weights = random_weights(config)
    hf_weights, hf = to_hf(weights, config)
    assert ("lm_head.weight" in hf_weights) is not tied
    back, config_back = from_hf(hf_weights, hf)
    assert_equal(back, weights)
    assert dataclasses.replace(config_back, layer_pattern=config.layer_pattern) == config
    assert parse_layer_pattern(config_back.layer_pattern) == "cLSAc"


def test_fused_rows_go_where_they_belong():
    weights = random_weights(CONFIG)
    hf, _ = to_hf(weights, CONFIG)
    D, F, E = 32, 48, 16
    fc1, linear, window = (weights[f"layers.{n}.weight"] for n in ("0.mlp.fc1", "1.mixer.qkv", "2.mixer.qkv"))
    assert torch.equal(hf["model.layers.0.mlp.up_proj.weight"], fc1[:F])
    assert torch.equal(hf["model.layers.0.mlp.gate_proj.weight"], fc1[F:])
    assert torch.equal(hf["model.layers.1.mixer.k_proj.weight"], linear[E : 2 * E])
    assert torch.equal(hf["model.layers.1.mixer.v_proj.weight"], linear[2 * E :])
    assert torch.equal(hf["model.layers.2.mixer.k_proj.weight"], window[D : 2 * D])


def test_the_model_has_exactly_the_converted_tensors():
    config = dataclasses.replace(CONFIG, tie_embeddings=False)
    model = hf_model(random_weights(config), config)
    assert_equal(model.state_dict(), to_hf(random_weights(config), config)[0])
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config)


def test_a_tied_model_has_one_parameter_for_both_ends():
    model = hf_model(random_weights(CONFIG), CONFIG)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == 272 and not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("layers.1.mixer.qkv.weight"), "1 tensors missing (layers.1.mixer.qkv.weight)"),
        (lambda w: w.update(extra=torch.zeros(1)), "1 unexpected (extra)"),
        (lambda w: w.update({"final_norm.weight": torch.zeros(31)}), "final_norm.weight is [31], expected [32]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, words):
    weights = random_weights(CONFIG)
    change(weights)
    with pytest.raises(CheckpointError) as raised:
        to_hf(weights, CONFIG)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("letters", "pattern"),
    [
        ("cLScc" * 5 + "cc", "cLScc*5 cc"),
        ("A" * 24, "A*24"),
        ("cLSccccL", "cLSccccL"),
        ("c", "c"),
        ("cLS" * 3 + "A" + "cS" * 4, "cLS*3 A cS*4"),
        ("ccccLS", "ccccLS"),
        ("cLSc" * 2, "cLSc*2"),
    ],
)
def test_repeats_of_a_pattern_are_written_once(letters, pattern):
    assert short_pattern(letters) == pattern and parse_layer_pattern(pattern) == letters


def test_config_survives_json():
    hf = hf_config(CONFIG)
    assert model_config(type(hf).from_dict(json.loads(hf.to_json_string()))) == model_config(hf)


# --- export


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["hello world, said the world"], 261).save(folder)
    return folder


@pytest.fixture(scope="module")
def export(tmp_path_factory, tokenizer_folder):
    output = tmp_path_factory.mktemp("exports") / "model"
    return output, export_huggingface(random_weights(CONFIG), CONFIG, output, tokenizer_folder)


def test_export_proves_itself(export):
    output, measured = export
    assert measured.tensors == len(our_shapes(CONFIG)) + 5 + 6 + 1  # fc1 in two, qkv in three, the tied output
    assert measured.parameters == count_parameters(CONFIG)
    assert measured.reload_difference == 0.0
    assert 0 < measured.cache_difference < 1e-5 and 0 < measured.padding_difference < 1e-5
    card = (output / "README.md").read_text()
    assert f"{measured.parameters:,}" in card
    assert f"{measured.cache_difference:.2g}" in card and f"{measured.padding_difference:.2g}" in card


def test_export_holds_what_a_user_needs_and_nothing_else(export):
    output, _ = export
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "config.json",
        "configuration_based.py",
        "fast_based.py",
        "generation_config.json",
        "inputs_based.py",
        "mixers_based.py",
        "model.safetensors",
        "modeling_based.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in output.parent.iterdir()] == ["model"]
    assert (output / "model.safetensors").stat().st_mode == (output / "config.json").stat().st_mode
    generation = json.loads((output / "generation_config.json").read_text())
    # Rows above the tokenizer's are free for tokens that are added: nothing may keep them from being generated.
    assert "suppress_tokens" not in generation and generation["eos_token_id"] == 0


def test_export_stores_the_tied_embedding_once(export):
    output, _ = export
    assert "lm_head.weight" not in load_file(output / "model.safetensors")


def test_export_loads_without_our_package(export, tmp_path):
    """A process where importing based_megatron fails gives the logits and text of the model in memory."""
    output, _ = export
    ids = torch.tensor([[5, 9, 77, 4]])
    script = """
import sys; sys.modules["based_megatron"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
batch = tokenizer(["hello world", "world"], padding=True, return_tensors="pt")
assert batch["attention_mask"].tolist()[1][0] == 0, "not padded on the left"
assert model.generate(**batch, max_new_tokens=5).shape[1] > batch["input_ids"].shape[1]
torch.save(model(torch.tensor([[5, 9, 77, 4]])).logits.detach(), sys.argv[2])
"""
    subprocess.run([sys.executable, "-c", script, str(output), str(tmp_path / "logits.pt")], check=True, timeout=120)
    expected = hf_model(random_weights(CONFIG), CONFIG)(ids).logits.detach()
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-6)


def test_exported_tokenizer_is_the_one_of_the_data(export, tokenizer_folder):
    output, _ = export
    assert (output / "tokenizer.json").read_bytes() == (tokenizer_folder / "tokenizer.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(output, trust_remote_code=True)
    assert tokenizer.decode(tokenizer("hello <world>\n  !")["input_ids"]) == "hello <world>\n  !"


def test_a_saved_export_can_be_saved_again(export, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(export[0], trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert_equal(again.state_dict(), model.state_dict())


def test_an_older_export_that_names_its_mixers_in_layer_types_loads(export, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(export[0], older)
    config = json.loads((older / "config.json").read_text())
    config["layer_types"] = config.pop("mixers")
    assert config["layer_types"][0] == "conv"
    (older / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(older, trust_remote_code=True)
    assert_equal(model.state_dict(), hf_model(random_weights(CONFIG), CONFIG).state_dict())
    assert_equal(read_export(older)[0], random_weights(CONFIG))


def test_an_export_that_differs_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    class Damaged(huggingface.BasedForCausalLM):
        def save_pretrained(self, folder, **kwargs):
            super().save_pretrained(folder, **kwargs)
            weights = load_file(folder / "model.safetensors")
            weights["model.norm.weight"][3] += 1e-7
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    Damaged.__name__ = "BasedForCausalLM"
    monkeypatch.setattr(huggingface, "BasedForCausalLM", Damaged)
    with pytest.raises(CheckpointError, match=r"1 tensors differ, such as model\.norm\.weight"):
        export_huggingface(random_weights(CONFIG), CONFIG, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("slip", "words"),
    [
        ("conv state", "decoding with the cache"),
        ("padding", "a left-padded row"),
        ("nan", "the reloaded model"),
    ],
)
def test_the_proof_sees_slips_of_the_modeling_code(tmp_path, monkeypatch, slip, words):
    """The code that ships is broken on purpose; the model in memory is right."""
    edits = {
        "conv state": ("u1_BCS[..., -past:]", "u1_BCS[..., :past]"),
        "padding": ("v_BHTV = v_BHTV * valid_BT", "v_BHTV = v_BHTV * torch.ones_like(valid_BT)"),
        "nan": ("return self.out_proj(F.silu", "return float('nan') * self.out_proj(F.silu"),
    }
    good, bad = edits[slip]
    real = proof.prove

    def prove_broken(folder, *others):
        text = (folder / "mixers_based.py").read_text()
        assert good in text
        (folder / "mixers_based.py").write_text(text.replace(good, bad))
        return real(folder, *others)

    monkeypatch.setattr(huggingface, "prove", prove_broken)
    with pytest.raises(CheckpointError, match=words):
        export_huggingface(random_weights(CONFIG), CONFIG, tmp_path / slip.replace(" ", "_"))
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match="exists already: choose another --output"):
        export_huggingface(random_weights(CONFIG), CONFIG, tmp_path / "model")


def test_a_tokenizer_that_is_too_large_is_refused(tmp_path, tokenizer_folder):
    config = dataclasses.replace(CONFIG, vocab_size=200)
    with pytest.raises(CheckpointError, match="has 261 entries, the model only 200"):
        export_huggingface(random_weights(config), config, tmp_path / "model", tokenizer_folder)


def test_weights_of_another_dtype_are_refused(tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in random_weights(CONFIG).items()}
    with pytest.raises(CheckpointError, match=r"not torch\.bfloat16"):
        export_huggingface(weights, CONFIG, tmp_path / "model")
