"""A mixer of another package (examples/moving_average) works everywhere, and no file of ours knows of it."""

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from based_megatron.checkpoint.full import read_full
from based_megatron.config import Config, DataConfig, ModelConfig, ParallelConfig
from based_megatron.convert.exported import read_export
from based_megatron.convert.huggingface import export_huggingface, hf_model
from based_megatron.convert.layout import our_shapes
from based_megatron.convert.released import to_released
from based_megatron.errors import CheckpointError, ConfigError
from based_megatron.inference.engine import Engine
from based_megatron.model.build import build_model
from based_megatron.model.check import check_mixers
from based_megatron.model.mixers import MIXERS, layer_mixers, mixers_of, registry
from based_megatron.monitor.flops import parameter_breakdown, training_flops_per_token
from based_megatron.parallel.linear import shard_spec
from based_megatron.parallel.sequence.plan import whole_sequence
from based_megatron.train.optimizer import parameter_groups
from support.layouts import build_run, gather_unsharded, parameters_of, small_config, topology_of
from support.runs import losses, prepare_corpus, train_in_pool

EXAMPLE = Path(__file__).parents[2] / "examples" / "moving_average"
MODULE = "moving_average"
MODEL = ModelConfig(
    layer_pattern="mcm", mixers=MODULE, hidden_size=8, ffn_hidden_size=16, num_heads=2, vocab_size=10, vocab_multiple=4
)
JOB = (
    "--model.layer-pattern", "mSm", "--model.mixers", MODULE, "--train.steps", "4", "--validation.interval-steps", "0",
)  # fmt: skip


@pytest.fixture(autouse=True)
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))


def on_rank(function: Any, *args: Any) -> Any:
    """Ranks of a pool may have started without the example on their path."""
    sys.path.insert(0, str(EXAMPLE))
    return function(*args)


def config_of(parallel: ParallelConfig | None = None) -> Config:
    config = small_config(parallel)
    model = dataclasses.replace(config.model, layer_pattern="mcSm", mixers=MODULE)
    return dataclasses.replace(config, model=model)


def test_parameters_and_flops_are_counted():
    """8 x 8 weights twice and 8 decays in each of 2 layers; 2 operations a channel besides the linear layers."""
    assert parameter_breakdown(MODEL)["moving_average"] == 2 * (2 * 64 + 8)
    without = dataclasses.replace(MODEL, layer_pattern="c")
    mlp, layers = 3 * 8 * 16, 2
    expected = layers * (6 * (2 * 64 + mlp) + 3 * 2 * 8)
    assert training_flops_per_token(MODEL, 16) - training_flops_per_token(without, 16) == expected


def trained(parallel: ParallelConfig) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Losses and norms of three steps with documents, and the whole weights after them."""
    run = build_run(config_of(parallel))
    found = [run.train_step(number, packed=True) for number in range(3)]
    return found, gather_unsharded(parameters_of(run))


@pytest.mark.parametrize("size", [2])
def test_tensor_parallel_ranks_train_as_one(worker_pool, size):
    (one,) = worker_pool(1).run(on_rank, trained, ParallelConfig())
    several = worker_pool(size).run(on_rank, trained, ParallelConfig(tensor=size))[0]
    assert several[0] == [pytest.approx(step, rel=1e-4) for step in one[0]]
    for name, weight in one[1].items():
        torch.testing.assert_close(several[1][name], weight, rtol=1e-3, atol=1e-4)


def built_facts() -> tuple[dict[str, tuple[int, ...]], dict[str, float], float, float]:
    """Shapes by name, weight decay by name, and errors of documents apart and of decoding."""
    config, topology = config_of(), topology_of()
    (chunk,) = build_model(config, topology, torch.float64)
    model = chunk.eval()
    shapes = {shard_spec(p).name: shard_spec(p).shape for p in model.parameters()}
    decays = {
        shard_spec(p).name: group["weight_decay"]
        for group in parameter_groups(model, config.optimizer)
        for p in group["params"]
    }
    tokens = torch.randint(0, 91, (2, 12), generator=torch.Generator().manual_seed(1)).to(topology.device)
    with torch.no_grad():
        logits = model(tokens, whole_sequence(None, 12, topology.device)).transpose(0, 1)
    engine = Engine(model)
    first, states = engine.prefill(tokens[:, :5])
    first, states = engine.prefill(tokens[:, 5:8], states)
    found = [first, *(engine.decode_step(tokens[:, t], states) for t in range(8, 12))]
    decoding = float((torch.stack(found, dim=1) - logits[:, 7:]).abs().max())
    nbytes = sum(mixer.state_bytes(config.model, torch.float64) for mixer in layer_mixers(config.model))
    return shapes, decays, decoding, states.bytes_per_sequence() - states.position_B.element_size() - nbytes


def test_it_is_built_decayed_and_decoded_as_its_class_says(worker_pool):
    ((shapes, decays, decoding, more_bytes),) = worker_pool(1).run(on_rank, built_facts)
    expected = layer_mixers(config_of().model)[0].parameter_shapes(config_of().model)
    assert {name.removeprefix("layers.0.mixer."): s for name, s in shapes.items() if "0.mixer." in name} == expected
    assert decays["layers.0.mixer.decay_logit"] == 0 < decays["layers.0.mixer.in_proj.weight"]
    assert decoding < 1e-10
    assert more_bytes == 0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return prepare_corpus(tmp_path_factory.mktemp("corpus"), documents=100)


@pytest.fixture(scope="module")
def run_dir(worker_pool, corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    worker_pool(1).run(on_rank, train_in_pool, folder, corpus, *JOB)
    return folder


def test_a_job_resumes_bit_for_bit(worker_pool, run_dir, corpus, tmp_path):
    shutil.copytree(run_dir / "checkpoints" / "step-00000002", tmp_path / "checkpoints" / "step-00000002")
    worker_pool(1).run(on_rank, train_in_pool, tmp_path, corpus, *JOB)
    expected, found = losses(run_dir), losses(tmp_path)
    assert sorted(expected) == [1, 2, 3, 4] and found == {step: expected[step] for step in (3, 4)}
    weights, whole = read_full(tmp_path)[0], read_full(run_dir)[0]
    assert weights.keys() == whole.keys() and all(torch.equal(weights[name], whole[name]) for name in whole)


def test_an_export_is_proven_and_comes_back(run_dir, tmp_path):
    """The checkpoint's config names the module; the proof reloads the folder alone, decodes and generates."""
    weights, config = read_full(run_dir)
    assert config.model.mixers == MODULE
    proof = export_huggingface(weights, config.model, tmp_path / "export")
    assert proof.generated_tokens > 0 and proof.cache_difference < 1e-4
    assert (tmp_path / "export" / "moving_average_hf.py").read_bytes() == (
        EXAMPLE / "moving_average_hf.py"
    ).read_bytes()
    back, model = read_export(tmp_path / "export", MODULE)
    assert model == config.model and all(torch.equal(back[name], weights[name]) for name in weights)
    with pytest.raises(CheckpointError, match=r"unknown mixers: moving_average.*--mixers"):
        read_export(tmp_path / "export")


def test_exports_of_one_name_and_different_mixers_load_in_one_process(tmp_path):
    kinds, patterns = {}, {"first": "cc", "second": "mc"}
    for parent, pattern in patterns.items():
        model, folder = dataclasses.replace(MODEL, layer_pattern=pattern), tmp_path / parent / "export"
        export_huggingface({name: torch.randn(shape) for name, shape in our_shapes(model).items()}, model, folder)
        layers = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).model.layers
        kinds[parent] = [type(layer.mixer).__name__ for layer in layers]
    assert kinds == {
        "first": ["BasedGatedConv", "BasedGatedConv"],
        "second": ["MovingAverageForExport", "BasedGatedConv"],
    }


def state_logits(weights: dict[str, torch.Tensor], config: Config, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, L, U] of the training model."""
    topology = topology_of()
    (chunk,) = build_model(config, topology)
    for parameter in chunk.parameters():
        parameter.data.copy_(weights[shard_spec(parameter).name])
    with torch.no_grad():
        plan = whole_sequence(None, tokens.shape[1], topology.device)
        return chunk(tokens.to(topology.device), plan).transpose(0, 1).cpu()


def test_the_exported_model_is_the_trained_one(worker_pool, run_dir):
    weights, config = read_full(run_dir)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="fp32", backend="reference"))
    tokens = torch.arange(24).view(2, 12)
    (expected,) = worker_pool(1).run(on_rank, state_logits, weights, config, tokens)
    with torch.no_grad():
        found = hf_model(weights, config.model)(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_released_layout_refuses_it(tmp_path):
    with pytest.raises(CheckpointError, match="the released layout has no moving average"):
        to_released({}, MODEL, tmp_path / "released")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"parallel": ParallelConfig(context=2)}, r"parallel\.context 2.*moving average, letter m"),
        ({"data": DataConfig(path="x", carry_state=True)}, r"data\.carry_state.*moving average, letter m"),
        ({"model": dataclasses.replace(MODEL, mixers="")}, r"cannot read 'm'.*add the module.*model\.mixers"),
        ({"model": dataclasses.replace(MODEL, mixers="no.such")}, r"cannot import the mixers of 'no\.such'.*model\.mixers"),
        ({"model": dataclasses.replace(MODEL, mixers="moving_average_hf")}, r"defines no Mixer.*model\.mixers"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused_in_one_line(changes, expected):
    with pytest.raises(ConfigError, match=expected) as error:
        check_mixers(dataclasses.replace(Config(model=MODEL), **changes))
    assert "\n" not in str(error.value)


def test_a_config_within_its_limits_is_accepted():
    check_mixers(Config(model=MODEL, parallel=ParallelConfig(tensor=2, pipeline=2)))


BROKEN = {
    "same_letter": ("class Other(MovingAverage):\n    letter, name = 'c', 'other'", r"both have the letter 'c'"),
    "same_name": (
        "class Other(MovingAverage):\n    letter, name, hf_name = 'o', 'gated_conv', None",
        r"both have the name 'gated_conv'",
    ),
    "same_export": (
        "class Other(MovingAverage):\n    letter, name, hf_name = 'o', 'other', 'conv'",
        r"both have the hf_name 'conv'",
    ),
    "no_flops": (
        "class Other(Mixer):\n    letter, name = 'o', 'other'\n    parameter_shapes = MovingAverage.parameter_shapes",
        r"no_flops\.Other does not say its mixing_flops",
    ),
    "long_letter": ("class Other(MovingAverage):\n    letter, name = 'oo', 'other'", "has the letter 'oo'"),
    "broken": ("raise ValueError('broken\\nin two lines')", r"cannot import the mixers of 'broken' \(ValueError: broken"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_mixer_that_cannot_be_used_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    source, expected = BROKEN[name]
    header = "from moving_average import MovingAverage\nfrom based_megatron.model.mixers import Mixer\n\n\n"
    (tmp_path / f"{name}.py").write_text(header + source)
    with pytest.raises(ConfigError, match=expected) as error:
        mixers_of(ModelConfig(mixers=name))
    assert "model.mixers" in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A distribution whose metadata names the module, as pip leaves it."""
    metadata = tmp_path / "moving_average-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: moving-average\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[based_megatron.mixers]\nmoving_average = moving_average\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._found.cache_clear()
    yield
    registry._found.cache_clear()


def test_an_installed_mixer_needs_no_mention(installed):
    assert list(mixers_of(ModelConfig())) == [*MIXERS, "m"]
    assert list(mixers_of(MODEL)) == [*MIXERS, "m"], "named twice, found once"
    assert layer_mixers(ModelConfig(layer_pattern="cm*2"))[3].name == "moving_average"


def real_state_bytes(letter: str, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes for each of three sequences: of the tensors of a built mixer, and as the class says."""
    config = small_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, layer_pattern=letter))
    topology = topology_of()
    (chunk,) = build_model(config, topology, dtype)
    mixer: Any = chunk.layers["0"].mixer  # type: ignore[union-attr]
    state = mixer.zero_state(3, topology.device)
    return sum(x.nbytes for x in vars(state).values()) // 3, MIXERS[letter].state_bytes(config.model, dtype)


def all_state_bytes() -> dict[str, tuple[int, int]]:
    assert dist.get_world_size() == 1
    return {letter: real_state_bytes(letter, torch.bfloat16) for letter in "cLS"}


def test_state_bytes_are_those_of_the_tensors(worker_pool):
    """bf16, 4 heads of 8: 2 rows of 64 channels; 45 packed rows of 8 + 1 in fp32, 16 keys of 8 + 8, a count; 12 keys and values."""
    expected = {"c": 2 * 64 * 2, "L": 4 * (45 * 9 * 4 + 16 * 16 * 2 + 4), "S": 12 * 2 * 32 * 2}
    (found,) = worker_pool(1).run(all_state_bytes)
    assert found == {letter: (nbytes, nbytes) for letter, nbytes in expected.items()}
    with pytest.raises(ConfigError, match="no state of constant size"):
        MIXERS["A"].state_bytes(ModelConfig(), torch.float32)
