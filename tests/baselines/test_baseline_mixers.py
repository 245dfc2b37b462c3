"""Every baseline is what its class says, decodes what it trains, keeps documents apart, and trains alike in every layout it offers."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from baseline_cases import MIXES_DOCUMENTS, SLICED, SYSTEMS, TENSOR, WITHOUT_STATE, config_of

from based_megatron.baselines import __all__ as names
from based_megatron.config import ModelConfig, ParallelConfig
from based_megatron.errors import ConfigError
from based_megatron.inference.engine import Engine
from based_megatron.model.build import build_model
from based_megatron.model.check import check_mixers
from based_megatron.model.mixers import MIXERS, layer_mixers, mixers_of
from based_megatron.monitor.flops import parameter_breakdown, parameter_count
from based_megatron.parallel.linear import is_tied_copy, shard_spec
from based_megatron.parallel.sequence.documents import Documents
from based_megatron.parallel.sequence.plan import whole_sequence
from based_megatron.preflight.shapes import local_parameters
from support.cases import each
from support.layouts import build_run, gather_unsharded, parameters_of, topology_of

LAYOUTS = {
    "dp2-zero1": ParallelConfig(),
    "dp2-zero3": ParallelConfig(zero_stage=3),
    "pp2": ParallelConfig(pipeline=2),
    "tp2": ParallelConfig(tensor=2),
    "tp2-without-sequence-parallel": ParallelConfig(tensor=2, sequence_parallel=False, zero_stage=2),
    "cp2": ParallelConfig(context=2),
}
TOKENS = 70
"""More than a chunk of 64."""


def test_the_room_has_all_of_them():
    found = mixers_of(ModelConfig(mixers="based_megatron.baselines"))
    own = {mixer.__name__ for letter, mixer in found.items() if letter not in MIXERS}
    assert own == set(names) and {mixer.name for mixer in found.values()} >= SYSTEMS.keys()
    assert {mixer.name for mixer in found.values() if mixer.__name__ in names} == SYSTEMS.keys()


def facts(name: str) -> dict[str, Any]:
    """What a built fp64 model is, beside what its class says."""
    config, topology = config_of(name), topology_of()
    (chunk,) = build_model(config, topology, torch.float64)
    model = chunk.eval()
    mixer = layer_mixers(config.model)[0]
    prefix = "layers.0.mixer."
    shapes = {shard_spec(p).name: shard_spec(p).shape for p in model.parameters()}
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 91, (2, TOKENS), generator=generator).to(topology.device)
    ids = torch.zeros(2, TOKENS, dtype=torch.int32)
    ids[0, 9:], ids[0, 10:], ids[1, 64:] = 1, 2, 1
    with torch.no_grad():
        logits = model(tokens, whole_sequence(None, TOKENS, topology.device)).transpose(0, 1)
        packed = model(tokens, whole_sequence(Documents.from_ids(ids), TOKENS, topology.device)).transpose(0, 1)
        pieces = [(0, 0, 9), (0, 9, 10), (0, 10, TOKENS), (1, 0, 64), (1, 64, TOKENS)]
        alone = [
            model(tokens[b : b + 1, i:j], whole_sequence(None, j - i, topology.device))[:, 0] for b, i, j in pieces
        ]
        other = tokens.clone()
        other[:, 40] += 1
        changed = model(other, whole_sequence(None, TOKENS, topology.device)).transpose(0, 1) - logits
    return {
        "shapes": {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)},
        "stated shapes": mixer.parameter_shapes(config.model),
        "parameters": sum(p.numel() for p in model.parameters() if not is_tied_copy(p)),
        "documents": max(
            float((packed[b, i:j] - found).abs().max()) for (b, i, j), found in zip(pieces, alone, strict=True)
        ),
        "moved by the past": float((packed - logits)[0, 10:].abs().max()),
        "moved by later tokens": float(changed[:, :40].abs().max()),
        "moved by an earlier token": float(changed[:, 45:].abs().max()),
        **({} if name in WITHOUT_STATE else decoded_facts(model, config.model, tokens, logits)),
    }


def decoded_facts(model: Any, config: ModelConfig, tokens: torch.Tensor, logits: torch.Tensor) -> dict[str, Any]:
    """The error of decoding, after two pieces of a prompt, and bytes of a state."""
    with torch.no_grad():
        first, states = Engine(model).prefill(tokens[:, :5])
        first, states = Engine(model).prefill(tokens[:, 5:66], states)
        decoded = [first, *(Engine(model).decode_step(tokens[:, t], states) for t in range(66, TOKENS))]
    state = model.layers["0"].mixer.zero_state(3, tokens.device)
    return {
        "decoding": float((torch.stack(decoded, dim=1) - logits[:, 65:]).abs().max()),
        "state bytes": sum(x.nbytes for x in vars(state).values()) // 3,
        "stated bytes": layer_mixers(config)[0].state_bytes(config, torch.float64),
    }


@pytest.fixture(scope="module")
def all_facts(worker_pool) -> dict[str, dict[str, Any]]:
    (found,) = worker_pool(1).run(each, facts, list(SYSTEMS))
    return found


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_built_mixer_is_what_its_class_says(all_facts, name):
    found, model = all_facts[name], config_of(name).model
    assert found["shapes"] == found["stated shapes"]
    assert name in WITHOUT_STATE or found["state bytes"] == found["stated bytes"]
    assert found["parameters"] == parameter_count(model)
    mixer = layer_mixers(model)[0]
    layers = layer_mixers(model).count(mixer)
    assert parameter_breakdown(model)[mixer.name] == layers * sum(map(math.prod, found["shapes"].values()))


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_token_moves_the_later_ones_alone(all_facts, name):
    """Fourier transforms round earlier outputs by a little of each token."""
    assert all_facts[name]["moved by later tokens"] < 1e-12
    assert all_facts[name]["moved by an earlier token"] > 1e-6


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name not in WITHOUT_STATE])
def test_decoding_equals_the_forward(all_facts, name):
    """Two pieces of a prompt, then single tokens: steps are the recurrence that the chunks are compared with."""
    assert all_facts[name]["decoding"] < 1e-10


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name not in MIXES_DOCUMENTS])
def test_documents_do_not_see_each_other(all_facts, name):
    """Rotary tables are fp32: a document that begins at another position differs by their rounding."""
    assert all_facts[name]["documents"] < 1e-5
    assert all_facts[name]["moved by the past"] > 1e-3, "without documents, the past counts"


def trained(name: str, layout: str, recompute: Any = "none") -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Losses and norms of two steps with documents, and the whole weights after them."""
    config = config_of(name, LAYOUTS[layout], recompute=recompute)
    # Without it AdamW moves a weight by the sign of its gradient, which rounding decides where the gradient is almost zero.
    optimizer = dataclasses.replace(config.optimizer, eps=1e-4)
    run = build_run(dataclasses.replace(config, optimizer=optimizer))
    found = [run.train_step(number, packed=True) for number in range(2)]
    return found, {} if LAYOUTS[layout].zero_stage == 3 else gather_unsharded(parameters_of(run))


@pytest.fixture(scope="module")
def single(worker_pool) -> dict[Any, Any]:
    (found,) = worker_pool(1).run(each, trained, [(name, "dp2-zero1") for name in SYSTEMS])
    return {name: result for (name, _), result in found.items()}


@pytest.fixture(scope="module")
def double(worker_pool) -> dict[Any, Any]:
    some, found = {"tp2": TENSOR, "cp2": SLICED}, {}
    for layout in LAYOUTS:  # a call each: an answer that takes long is taken for a hang
        cases = [(name, layout) for name in SYSTEMS if name in some.get(layout[:3], SYSTEMS)]
        found |= worker_pool(2).run(each, trained, cases)[0]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_layout_equals_the_single_process(single, double, name, layout):
    """Losses, norms, and weights after AdamW, which moves each by about the sign of its gradient first: a wrong gradient shows."""
    if (name, layout) not in double:
        pytest.skip("refused: see test_tensor_ranks_that_a_mixer_cannot_use_are_refused and test_slices_are_refused")
    (steps, weights), (expected_steps, expected) = double[name, layout], single[name]
    assert steps[0] == pytest.approx(expected_steps[0], rel=1e-5)
    assert steps[1] == pytest.approx(expected_steps[1], rel=1e-3)
    assert weights.keys() == (expected.keys() if LAYOUTS[layout].zero_stage < 3 else set())
    for parameter, weight in weights.items():
        torch.testing.assert_close(
            weight, expected[parameter], rtol=0, atol=5e-6, msg=lambda text, at=parameter: f"{at}: {text}"
        )


def test_recomputed_activations_are_the_same(worker_pool, single):
    (found,) = worker_pool(1).run(each, trained, [(name, "dp2-zero1", "mixer") for name in SYSTEMS])
    for name in SYSTEMS:
        steps = zip(found[name, "dp2-zero1", "mixer"][0], single[name][0], strict=True)
        assert all(step == pytest.approx(expected, rel=1e-6) for step, expected in steps)


def shards(name: str) -> dict[str, int]:
    """Elements of each parameter on a rank."""
    (chunk,) = build_model(config_of(name, LAYOUTS["tp2"]), topology_of(LAYOUTS["tp2"]))
    return {shard_spec(p).name: p.numel() for p in chunk.parameters()}


def test_preflight_knows_the_shards(worker_pool):
    found = worker_pool(2).run(each, shards, list(TENSOR))
    for name in TENSOR:
        expected = {p.name: p.numel for p in local_parameters(config_of(name, LAYOUTS["tp2"]), 0)}
        assert [rank[name] for rank in found] == [expected, expected]


@pytest.mark.parametrize("name", SYSTEMS)
def test_tensor_ranks_that_a_mixer_cannot_use_are_refused(name):
    config = config_of(name, LAYOUTS["tp2"])
    if name in TENSOR:
        return check_mixers(config)
    with pytest.raises(ConfigError, match=r"parallel\.tensor 2.*cannot do; set parallel\.tensor=1") as error:
        check_mixers(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", MIXES_DOCUMENTS)
def test_documents_that_cannot_be_kept_apart_are_refused(name):
    config = config_of(name)
    check_mixers(config)
    with pytest.raises(ConfigError, match=rf"data\.isolate_documents keeps documents.*which {name}, letter") as error:
        check_mixers(dataclasses.replace(config, data=dataclasses.replace(config.data, isolate_documents=True)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", WITHOUT_STATE)
def test_decoding_without_a_state_is_refused(name):
    model = config_of(name).model
    with pytest.raises(ConfigError, match="no state of constant size to decode with"):
        layer_mixers(model)[0].state_bytes(model, torch.float32)


@pytest.mark.parametrize("name", SYSTEMS)
def test_slices_are_refused(name):
    config = config_of(name, LAYOUTS["cp2"])
    if name in SLICED:
        return check_mixers(config)
    with pytest.raises(ConfigError, match=r"parallel\.context 2 cuts sequences"):
        check_mixers(config)
