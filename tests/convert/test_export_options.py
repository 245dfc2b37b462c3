"""What `based export` writes besides the weights, how it stores them, and `based verify-export`."""

import hashlib
import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from based_megatron.checkpoint.fragments import Fragment
from based_megatron.checkpoint.full import read_full, read_whole, write_full
from based_megatron.checkpoint.save import save_checkpoint
from based_megatron.config import Config, to_dict
from based_megatron.config.schema import DataConfig, ModelConfig
from based_megatron.convert.checksums import damage
from based_megatron.convert.cli import main_export, main_import, main_verify
from based_megatron.convert.exported import exported_length, read_export
from based_megatron.convert.layout import our_shapes
from based_megatron.convert.origin import Measured, origin_of
from based_megatron.convert.released import from_released
from based_megatron.convert.tokenizer import data_folder
from based_megatron.data_prep.tokenizer import train_tokenizer
from based_megatron.errors import CheckpointError, ConfigError, DataError
from based_megatron.parallel.sharding import ShardSpec
from based_megatron.run_folder.json_lines import append_line

MODEL = ModelConfig(
    layer_pattern="cLS", hidden_size=32, ffn_hidden_size=256, num_heads=4, feature_dim=4, window_left=5, vocab_size=261
)
STEP, TOKENS, FINGERPRINT = 40, 40 * 8 * 96, "f00d"


def drawn() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in our_shapes(MODEL).items()}


def corpus(folder, fingerprint=FINGERPRINT, text="hello world"):
    folder.mkdir(parents=True)
    train_tokenizer([text], 261).save(folder)
    (folder / "manifest.json").write_text(json.dumps({"fingerprint": fingerprint}))


def save(run, step=STEP, data="data/books", run_dir="runs/x", weights=None):
    """A checkpoint as training leaves it."""
    config = Config(model=MODEL, data=DataConfig(path=data, sequence_length_tokens=96), run_dir=run_dir)
    fragments = [
        Fragment(ShardSpec(name, tuple(tensor.shape)), 0, tensor.numel(), {"model": tensor.reshape(-1)})
        for name, tensor in (weights or drawn()).items()
    ]
    state = {
        "config": to_dict(config),
        "tokens_seen": TOKENS,
        "data_fingerprint": f"{FINGERPRINT}*1/seed=42/sequence_length_tokens=96",
    }
    return save_checkpoint(run / "checkpoints", step, fragments, state)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of tmp_path/home, looked at from another working folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    corpus(tmp_path / "home" / "data" / "books")
    save(tmp_path / "home" / "runs" / "x")
    return tmp_path / "home" / "runs" / "x"


def log(run, *events):
    for step, name, fields in events:
        append_line(run / "events.jsonl", {"time": 0.0, "step": step, "event": name, **fields})


# --- where it comes from


def test_step_tokens_and_lengths_are_in_output_config_tokenizer_and_card(run, tmp_path, capsys):
    main_export([str(run), "--output", str(tmp_path / "hf"), "--license", "apache-2.0"])
    assert "step 40, 30,720 tokens trained" in capsys.readouterr().out
    config = AutoConfig.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert (config.trained_steps, config.trained_tokens, config.max_position_embeddings) == (STEP, TOKENS, 96)
    assert exported_length(tmp_path / "hf") == 96
    assert AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True).model_max_length == 96
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: transformers\n")
    for row in ("| steps | 40 |", "| tokens | 30,720 |", "| data | books |", "were not trained | 96 |"):
        assert row in card
    assert str(tmp_path) not in card, "paths of a machine are nobody's business"


def test_losses_and_recall_are_those_of_the_step_that_is_exported(run, tmp_path):
    probes = {"induction/64": 4.5, "mqar/8": None}
    log(
        run,
        (10, "steps", {"loss": [9.0 - n for n in range(10)], "grad_norm": [1.0] * 10}),
        (30, "recall", {"ar_ppl": 700.0, "other_ppl": 70.0, "probes": {}}),
        (30, "validation", {"loss": 3.0}),
        (45, "steps", {"loss": [5.0 + n / 10 for n in range(10)], "grad_norm": [1.0] * 10}),
        (50, "validation", {"loss": 1.0}),
        # A restart has done steps 36 to 45 again.
        (30, "recall", {"ar_ppl": 600.5, "other_ppl": 60.0, "probes": probes, "by_count": {}}),
        (30, "validation", {"loss": 2.5}),
        (45, "steps", {"loss": [6.0 + n / 10 for n in range(10)], "grad_norm": [1.0] * 10}),
        (20, "validation", {"loss": 8.0}),
        (50, "recall", {"ar_ppl": 1.0, "other_ppl": 1.0, "probes": {}}),
    )
    origin = origin_of(read_whole(run))
    assert origin.training_loss == 6.4 and origin.validation_loss == Measured(30, 2.5)
    assert origin.recall == {"ar_ppl": 600.5, "other_ppl": 60.0, "induction/64": 4.5}
    main_export([str(run), "--output", str(tmp_path / "hf")])
    card = (tmp_path / "hf" / "README.md").read_text()
    for row in (
        "| training loss of the last step, nats a token | 6.4000 |",
        "| validation loss at step 30, nats a token | 2.5000 |",
        "| perplexity of tokens that the context tells | 600.5 |",
        "| loss of the probe induction/64 | 4.5 |",
    ):
        assert row in card
    assert "license" not in card.partition("---\n\n")[0]


def test_recall_of_another_validation_is_left_out(run):
    log(run, (20, "recall", {"ar_ppl": 1.0, "probes": {}}), (40, "validation", {"loss": 2.0}))
    assert origin_of(read_whole(run)).recall == {}


def test_weights_that_were_not_trained_here_do_not_claim_it(tmp_path):
    write_full(tmp_path / "run", drawn(), Config(model=MODEL))
    main_export([str(tmp_path / "run"), "--output", str(tmp_path / "hf")])
    assert "were not trained by the run" in (tmp_path / "hf" / "README.md").read_text()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["max_position_embeddings"] is None


# --- the tokenizer


def test_the_tokenizer_is_found_from_another_working_folder(run):
    assert data_folder(read_whole(run)) == run.parents[1] / "data" / "books"


def test_the_tokenizer_of_another_corpus_at_the_same_path_is_left_out(run, tmp_path, capsys):
    corpus(tmp_path / "elsewhere" / "data" / "books", "beef", "another text")
    assert data_folder(read_whole(run)) == run.parents[1] / "data" / "books"
    assert capsys.readouterr().err == ""
    shutil.rmtree(run.parents[1] / "data")
    assert data_folder(read_whole(run)) is None
    assert "has the fingerprint beef, the training data had f00d" in capsys.readouterr().err


def test_the_tokenizer_of_a_run_that_was_moved_is_found_by_its_fingerprint(run, tmp_path):
    moved = run.rename(tmp_path / "y")
    assert data_folder(read_whole(moved)) is None
    (tmp_path / "home" / "data").rename(tmp_path / "elsewhere" / "data")
    assert data_folder(read_whole(moved)) == tmp_path / "elsewhere" / "data" / "books"


def test_the_released_layout_has_the_tokenizer_too(run, tmp_path):
    main_export([str(run), "--output", str(tmp_path / "released"), "--format", "released"])
    found = tmp_path / "released" / "tokenizer.json"
    assert found.read_bytes() == (run.parents[1] / "data" / "books" / "tokenizer.json").read_bytes()
    assert from_released(tmp_path / "released")[0].keys() == drawn().keys()
    assert damage(tmp_path / "released") == []


def test_a_tokenizer_that_is_not_there_is_refused_before_weights_are_read(tmp_path):
    with pytest.raises(DataError, match="no tokenizer at nowhere"):
        main_export([str(tmp_path / "no run"), "--output", str(tmp_path / "hf"), "--tokenizer", "nowhere"])


# --- how weights are stored


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_what_the_export_loads_as_and_comes_back_in_float32(run, tmp_path, capsys, dtype):
    name = str(dtype).removeprefix("torch.")
    main_export([str(run), "--output", str(tmp_path / "hf"), "--dtype", name, "--max-shard-size", "30KB"])
    assert f"run in {name}: logits within" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"stored in {name}" in card and f"| logits of the model in {name} against float32 |" in card
    weights, _ = read_export(tmp_path / "hf")
    assert all(torch.equal(weights[key], value.to(dtype).float()) for key, value in drawn().items())
    main_import([str(tmp_path / "hf"), "--output", str(tmp_path / "again")])
    assert all(torch.equal(tensor, weights[key]) for key, tensor in read_full(tmp_path / "again")[0].items())
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 1 and all(
        sum(tensor.nbytes for tensor in tensors.values()) <= 30_000 or len(tensors) == 1
        for tensors in map(load_file, files)
    )


def test_weights_beyond_the_range_of_a_dtype_are_refused(tmp_path):
    weights = drawn()
    weights["layers.0.mlp.fc1.weight"][3, 3] = 7e4
    save(tmp_path / "run", weights=weights)
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.fc1.weight has values up to 7e\+04, beyond torch.float16"):
        main_export([str(tmp_path / "run"), "--output", str(tmp_path / "hf"), "--dtype", "float16"])
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--max-shard-size", "5 gigs"], "--max-shard-size '5 gigs' is no size"),
        (["--max-shard-size", "0GB"], "--max-shard-size '0GB' is no size"),
        (["--license", "a\nb: c"], "--license 'a.*' is no identifier"),
        (["--format", "released", "--dtype", "bfloat16"], "the released layout is one file in float32"),
        (["--format", "released", "--license", "mit"], "the released layout is one file in float32"),
    ],
)
def test_options_that_cannot_be_are_refused_before_work(tmp_path, words, reason):
    with pytest.raises(ConfigError, match=reason):
        main_export([str(tmp_path / "no run"), "--output", str(tmp_path / "hf"), *words])


# --- hashes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    write_full(root / "run", drawn(), Config(model=MODEL))
    main_export([str(root / "run"), "--output", str(root / "hf")])
    return root / "hf"


def test_hashes_are_those_of_all_files_but_the_card(made):
    lines = (made / "SHA256SUMS").read_text().splitlines()
    files = sorted(path for path in made.iterdir() if path.name not in ("SHA256SUMS", "README.md"))
    assert lines == [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in files]
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=made, check=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "README.md").write_text("edited"), "ok"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json is not as it was written"),
        (lambda folder: (folder / "modeling_based.py").unlink(), "modeling_based.py cannot be read (No such file"),
        (lambda folder: (folder / "extra.py").write_text(""), "extra.py is not listed in SHA256SUMS"),
    ],
)
def test_verify_export_names_what_differs(made, tmp_path, capsys, change, words):
    folder = shutil.copytree(made, tmp_path / "copy")
    change(folder)
    assert main_verify([str(folder)]) == (0 if words == "ok" else 1)
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "no hash\n", f"{'0' * 64}  ../x\n", "\udcff"])
def test_without_a_list_of_hashes_a_folder_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "SHA256SUMS").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(CheckpointError, match="SHA256SUMS") as caught:
        main_verify([str(tmp_path)])
    assert "\n" not in str(caught.value)
