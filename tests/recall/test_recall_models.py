"""Models of the study: logits at queries alone are those of all positions, and its convolution is right in every form."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from based_megatron.config import ModelConfig
from based_megatron.model.mixers import MixerInputs
from based_megatron.parallel.sequence.documents import Documents
from based_megatron.parallel.sequence.plan import whole_sequence
from based_megatron.parallel.topology import Topology
from based_megatron.recall.model import ProductModel, RecallModel
from based_megatron.recall.mqar import NO_LABEL, TINY, Data, Segment, Task, draw
from based_megatron.recall.progress import Progress
from based_megatron.recall.systems import BASE_CONV, BASELINES
from based_megatron.recall.train import OutOfTime, Recipe, Run, Stage, query_loss, race
from support.layouts import topology_of

MODEL = ModelConfig(
    layer_pattern="bL", mixers=BASE_CONV, hidden_size=16, ffn_hidden_size=32, num_heads=2, feature_dim=4, window_left=3,
    vocab_size=64, vocab_multiple=1, init_std=0.3,
)  # fmt: skip


def with_pattern(pattern: str) -> ModelConfig:
    return dataclasses.replace(MODEL, layer_pattern=pattern)


def with_baselines(pattern: str) -> ModelConfig:
    modules, options = f"{BASE_CONV},{BASELINES}", ("mamba2.head_dim=16",) if "N" in pattern else ()
    return dataclasses.replace(MODEL, layer_pattern=pattern, mixers=modules, mixer_options=options)


def losses_and_gradients(kind: Any, pattern: str) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and gradients with logits at queries, and with logits everywhere and labels that are mostly NO_LABEL."""
    topology = topology_of()
    model = kind(with_pattern(pattern), topology, backend="reference", seed=3).eval()
    examples = draw(TINY, Segment(32, 4, 0), 6, torch.Generator().manual_seed(1))
    tokens, positions = examples.tokens_BT.to(topology.device), examples.positions_BK.to(topology.device)
    everywhere = torch.arange(32, device=topology.device).expand(6, 32)
    labels = examples.labels().to(topology.device)
    found = []
    for loss in (
        query_loss(model(tokens, positions), examples.answers_BK.to(topology.device)),
        functional.cross_entropy(model(tokens, everywhere).flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL),
    ):
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append([loss.detach().cpu(), *(gradient.cpu() for gradient in gradients)])
    return found[0], found[1]


@pytest.mark.parametrize(("kind", "pattern"), [(RecallModel, "bL"), (RecallModel, "bA"), (ProductModel, "cLS")])
def test_the_loss_of_queries_is_that_of_all_labels(worker_pool, kind, pattern):
    ((at_queries, everywhere),) = worker_pool(1).run(losses_and_gradients, kind, pattern)
    for found, expected in zip(at_queries, everywhere, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def product_logits() -> tuple[Tensor, Tensor]:
    """Logits [B, T, U] of the wrapper at all positions, and of the product's own forward."""
    topology = topology_of()
    model = ProductModel(with_pattern("cLSA"), topology, backend="reference", seed=3)
    tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1)).to(topology.device)
    with torch.no_grad():
        found = model(tokens, torch.arange(12, device=topology.device).expand(2, 12))
        expected = model.model(tokens, whole_sequence(None, 12, topology.device)).transpose(0, 1)
    return found.cpu(), expected.cpu()


def test_the_products_model_is_the_one_that_trains(worker_pool):
    ((found, expected),) = worker_pool(1).run(product_logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def order_matters(pattern: str) -> bool:
    """Whether the answer at the last token changes when the two tokens before all others change places."""
    topology = topology_of()
    model = RecallModel(with_pattern(pattern), topology, backend="reference", seed=3).eval()
    tokens = torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(1)).to(topology.device)
    swapped, last = tokens.clone(), torch.tensor([[11]], device=topology.device)
    swapped[:, [4, 5]] = tokens[:, [5, 4]]
    with torch.no_grad():
        return not torch.allclose(model(tokens, last), model(swapped, last), atol=1e-6)


def test_softmax_attention_has_no_positions(worker_pool):
    """Alone it sees a set of tokens; behind a convolution it sees their order."""
    assert worker_pool(1).run(order_matters, "A") == [False]
    assert worker_pool(1).run(order_matters, "bA") == [True]


def layers_by_hand(block: str) -> tuple[Tensor, Tensor]:
    """The residual at all tokens after both layers, by the model and by the formula of the block."""
    topology = topology_of()
    model = RecallModel(with_pattern("bL"), topology, backend="reference", seed=3, block=block).double().eval()
    tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1)).to(topology.device)
    everywhere, inputs = torch.arange(12).expand(2, 12), MixerInputs(whole_sequence(None, 12, topology.device), None)
    with torch.no_grad():
        found = model(tokens, everywhere.to(topology.device))
        r_TBD = model.embedding(tokens).transpose(0, 1)
        for mixer in model.mixers:
            r_TBD = r_TBD + mixer(functional.layer_norm(r_TBD, (16,)), inputs=inputs)[0]
            if block == "residual norm":
                r_TBD = r_TBD + functional.layer_norm(r_TBD, (16,))
        expected = functional.linear(functional.layer_norm(r_TBD, (16,)).transpose(0, 1), model.embedding.weight)
    return found.cpu(), expected.cpu()


@pytest.mark.parametrize("block", ["plain", "residual norm"])
def test_a_block_is_its_formula(worker_pool, block):
    ((found, expected),) = worker_pool(1).run(layers_by_hand, block)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def first_values(block: str) -> dict[str, float]:
    """Standard deviations of two projections, relative to those that PyTorch's linear layers start with."""
    model = dataclasses.replace(MODEL, layer_pattern="NN", mixers=BASELINES, hidden_size=64, init_std=0.02)
    mixer = RecallModel(model, topology_of(), backend="reference", seed=3, block=block).mixers[0]
    weights = {"in": mixer.zxdt.weight, "out": mixer.out_proj.weight}
    return {name: float(weight.std() * (3 * weight.shape[1]) ** 0.5) for name, weight in weights.items()}


def test_mamba_starts_as_in_its_authors_code(worker_pool):
    """Two layers: the projection back is divided by sqrt(2)."""
    (found,) = worker_pool(1).run(first_values, "pytorch start")
    assert found == pytest.approx({"in": 1.0, "out": 2**-0.5}, rel=0.02)
    (plain,) = worker_pool(1).run(first_values, "plain")
    assert plain == pytest.approx({"in": 0.02 * 192**0.5, "out": 0.01 * 384**0.5}, rel=0.02)


def compiled_and_plain(pattern: str) -> tuple[list[Tensor], list[Tensor], int]:
    """Losses and gradients of two models by both forms, at two lengths and in a batch that is not full, and the graphs compiled."""
    from torch._dynamo.utils import counters

    topology, settings = topology_of(), with_baselines(pattern)
    found: tuple[list[Tensor], list[Tensor]] = [], []
    torch.compiler.reset()
    counters.clear()
    # Without the compiler's last stage, which takes seconds a graph.
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for seed in (0, 1):
        for some, examples in zip(found, (3, 0), strict=True):
            model = RecallModel(settings, topology, backend="reference", seed=seed, compiled_examples=examples)
            for rows, length in ((3, 16), (3, 24), (2, 24)):
                torch.manual_seed(seed)
                tokens = torch.randint(0, 64, (rows, length)).to(topology.device)
                logits = model(tokens, tokens[:, :4] % length)
                some += [logits.detach(), *torch.autograd.grad(query_loss(logits, tokens[:, :4]), model.parameters())]
    monkeypatch.undo()
    graphs = counters["stats"]["unique_graphs"]
    assert not counters["graph_break"], dict(counters["graph_break"])
    return found[0], found[1], graphs


@pytest.mark.parametrize(
    "pattern", ["bE", *(pytest.param(p, marks=pytest.mark.slow) for p in ("bD", "bG", "bR", "bW", "bV", "NN"))]
)
def test_compiled_layers_are_the_plain_ones(worker_pool, pattern):
    """Each length and mixer is compiled once, whole, for models of all rates and full batches alone."""
    ((compiled, plain, graphs),) = worker_pool(1).run(compiled_and_plain, pattern)
    for found, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert graphs == 2 * len(set(pattern))


def base_conv(topology: Topology) -> Any:
    model = RecallModel(with_pattern("bb"), topology, backend="reference", seed=3).double()
    return model.mixers[0]


def conv_errors() -> dict[str, float]:
    """Largest errors of BaseConv: against PyTorch's convolution, of documents apart, and of decoding."""
    topology = topology_of()
    mixer, device = base_conv(topology), topology.device
    x_LBD = torch.randn(9, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)

    def mixed(x: Tensor, documents: Documents | None = None) -> Tensor:
        return mixer(x, inputs=MixerInputs(whole_sequence(documents, len(x), device), None))[0]

    with torch.no_grad():
        whole = mixed(x_LBD)
        padded_BDS = functional.pad(x_LBD.permute(1, 2, 0), (2, 0))
        conv_BDL = functional.conv1d(padded_BDS, mixer.conv_weight[:, None], mixer.conv_bias, groups=16)
        expected = x_LBD + conv_BDL.permute(2, 0, 1) * functional.linear(x_LBD, mixer.gate.weight, mixer.gate.bias)
        ids = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
        apart = mixed(x_LBD, Documents.from_ids(ids))
        pieces = torch.cat([mixed(x_LBD[:4, :1]), mixed(x_LBD[4:, :1])])
        state = mixer.empty_state(MODEL, 2, torch.float64, device)
        x_BLD = x_LBD.transpose(0, 1)
        decoded = [mixer.prefill(x_BLD[:, :1], state, None), mixer.prefill(x_BLD[:, 1:5], state, None)]
        decoded += [mixer.step(x_BLD[:, t], state, None)[:, None] for t in range(5, 9)]
    pairs = {
        "formula": (whole, expected),
        "documents": (apart[:, :1], pieces),
        "one document": (apart[:, 1], whole[:, 1]),
        "decoding": (torch.cat(decoded, dim=1).transpose(0, 1), whole),
    }
    return {name: float((found - expected).abs().max()) for name, (found, expected) in pairs.items()}


def test_the_convolution_is_right_in_every_form(worker_pool):
    (errors,) = worker_pool(1).run(conv_errors)
    assert {name: error for name, error in errors.items() if not error < 1e-12} == {}


SHORT = Task(64, tuple(Segment(32, pairs, 512) for pairs in (2, 4)), (Segment(32, 2, 50),))


def raced(recipe: Recipe) -> list[Any]:
    topology = topology_of()
    data = Data(SHORT, topology.device)
    return race(lambda: RecallModel(with_pattern("bb"), topology, backend="reference", seed=0), data, recipe, 0)


def test_the_worse_rates_are_given_up_at_the_ends_of_stages(worker_pool):
    recipe = Recipe(rates=(1e-9, 1e-2, 1e-3, 1e30), epochs=3, stages=(Stage(1, 2), Stage(2, 1)), batch_examples=128)
    (results,) = worker_pool(1).run(raced, recipe)
    assert [result.rate for result in results] == list(recipe.rates)
    assert [result.epochs for result in results] == [1, 3, 2, 1], "a rate that diverges goes first"
    assert [result.accuracy is None for result in results] == [True, False, True, True]
    assert results[1].loss < results[2].loss < results[0].loss < results[3].loss == float("inf")


def test_training_stops_when_the_tests_are_solved(worker_pool):
    ((solved,), (unsolved,)) = (
        worker_pool(1).run(raced, Recipe(rates=(1e-2,), epochs=2, target=target))[0] for target in (-1.0, 1.0)
    )
    assert (solved.epochs, unsolved.epochs) == (1, 2)


@dataclasses.dataclass
class Stopped:
    """Stops a race after so many steps."""

    steps: int

    def check_time(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise OutOfTime


def raced_in_pieces(folder: Path, steps: int) -> tuple[list[Any], list[Any], int]:
    """Results of a race that goes on, of one that stops again and again, and the pieces that this one took."""
    topology = topology_of()
    data = Data(SHORT, topology.device)
    recipe = Recipe(rates=(1e-3, 1e-2, 3e-2), epochs=3, stages=(Stage(1, 2), Stage(2, 1)), batch_examples=128)

    def whole(**options: Any) -> list[Any]:
        return race(
            lambda: RecallModel(with_pattern("bb"), topology, backend="reference", seed=0), data, recipe, 0, **options
        )

    for pieces in range(1, 20):
        try:
            found = whole(check_time=Stopped(steps).check_time, saver=Progress(folder, "key"))
            return whole(), found, pieces
        except OutOfTime:
            continue
    raise AssertionError("it never ends")


def test_a_race_in_pieces_ends_as_one_that_goes_on(worker_pool, tmp_path):
    """Three rates: 6 epochs of 8 steps in all. Pieces of 12 steps end in the middle of every other epoch, which is done again."""
    ((expected, found, pieces),) = worker_pool(1).run(raced_in_pieces, tmp_path, 12)
    assert found == expected and pieces == 6


def tiny_race(pattern: str) -> list[Any]:
    from based_megatron.recall.presets import PRESETS
    from based_megatron.recall.systems import SYSTEMS

    topology, preset = topology_of(), PRESETS["tiny"]
    point = SYSTEMS[pattern].tiny[0](preset.task.vocab_size)
    data = Data(preset.task, topology.device)
    return race(lambda: RecallModel(point.model, topology, backend="reference", seed=0), data, preset.recipe, 0)


@pytest.mark.slow
def test_attention_learns_the_tiny_task(worker_pool):
    """A few CPU seconds. What it reaches is the ceiling: some queries follow a filler that names their key."""
    (rates,) = worker_pool(1).run(tiny_race, "attention")
    assert max(rate.mean_accuracy for rate in rates) > 0.95


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["bL", "bA", "bS", "GE", "NM"])
def test_replayed_steps_are_those_that_are_launched(pattern, monkeypatch):
    """Losses of 20 steps at two shapes, also of compiled layers, without dropout, whose random numbers a graph draws in another order."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    from based_megatron.parallel.topology import join_alone

    topology = join_alone(torch.device("cuda"))
    data = Data(SHORT, topology.device)
    found = []
    monkeypatch.setattr("based_megatron.recall.model.EMBEDDING_DROPOUT", 0.0)
    for pool, examples in ((None, 0), (torch.cuda.graph_pool_handle(), 0), (torch.cuda.graph_pool_handle(), 100)):
        model = RecallModel(
            with_baselines(pattern),
            topology,
            backend="auto",
            seed=0,
            compiled_examples=examples,
        )
        run = Run(model, 1e-2, Recipe(rates=(1e-2,), epochs=2), 20, 0, pool)
        losses = []
        for epoch in range(2):
            run.train(data.batches(epoch, 100, 0), epoch)
            losses += [float(loss) for loss in run.losses]
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-3) and found[0][-1] < found[0][0]
    assert found[2] == pytest.approx(found[0], rel=1e-3)
