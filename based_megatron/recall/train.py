"""One point of the study: a model trained at several learning rates, of which the worse ones are given up on the way.

Rates are judged by the training loss, and not before every model has left chance: attention sits there for hundreds of steps and then
learns all in fifty. The best rate is trained to the end, or until it solves the tests.

Legend: B examples, T tokens, K queries, U vocabulary.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from based_megatron.kernels.cross_entropy import vocab_cross_entropy
from based_megatron.recall.graphs import GraphedSteps
from based_megatron.recall.mqar import Data, Examples

WEIGHT_DECAY = 0.1
TEST_TOKENS = 32_768
"""Tokens of a batch of tests: the longest examples are few at a time."""
JUDGED_SHARE = 0.25
"""The last part of a stage, whose mean loss compares rates."""


@dataclass(frozen=True)
class Stage:
    """A part of the training, up to an epoch at which some rates go on."""

    until_epoch: int
    rates_left: int


@dataclass(frozen=True)
class Recipe:
    """How every model of a sweep is trained."""

    rates: tuple[float, ...]
    epochs: int
    stages: tuple[Stage, ...] = ()
    """Ends of stages before the last, in order; none: every rate is trained to the end."""
    batch_examples: int = 256
    warmup_steps: int = 10
    clip_grad_norm: float = 1.0
    target: float = 0.99
    """Mean accuracy at which training stops."""
    test_every_epochs: int = 1
    """Epochs between tests of the rates that go to the end."""
    ordered: bool = False
    """Train on segment after segment in every epoch, as Zoology does, instead of shuffled batches."""


@dataclass(frozen=True)
class RateResult:
    """What became of one learning rate."""

    rate: float
    epochs: int
    """Epochs that it was trained for."""
    loss: float
    """Mean loss of the last part of its last stage, in nats a query."""
    accuracy: Mapping[str, float] | None = None
    """Accuracy by segment of the tests; None for a rate that was given up."""

    @property
    def mean_accuracy(self) -> float:
        """Mean over the segments, -1 for a rate that was given up."""
        return mean(self.accuracy) if self.accuracy else -1.0


class OutOfTime(Exception):
    """The time of a sweep is over in the middle of a run."""


def mean(accuracy: Mapping[str, float]) -> float:
    """Mean accuracy: every segment counts alike."""
    return sum(accuracy.values()) / len(accuracy)


def race(
    build: Callable[[], nn.Module], data: Data, recipe: Recipe, seed: int, check_time: Callable[[], None] = lambda: None
) -> list[RateResult]:
    """Train one model at all rates of the recipe; returns what became of each, in order of rates.

    build: a new model, always with the same weights. check_time: called before every step, raises OutOfTime when there is no more.
    """
    total = recipe.epochs * data.batches_per_epoch(recipe.batch_examples)
    graph_pool = torch.cuda.graph_pool_handle() if data.device.type == "cuda" else None
    running = [Run(build(), rate, recipe, total, seed, graph_pool) for rate in recipe.rates]
    results: dict[float, RateResult] = {}
    last = Stage(recipe.epochs, len(running))
    begin = 0
    for stage in (*recipe.stages, last):
        for run in running:
            for epoch in range(begin, stage.until_epoch):
                batches = data.batches(epoch, recipe.batch_examples, seed, ordered=recipe.ordered)
                run.train(batches, epoch, check_time)
                if stage is last and ((epoch + 1) % recipe.test_every_epochs == 0 or epoch + 1 == recipe.epochs):
                    results[run.rate] = run.result(epoch + 1, run.test(data.test))
                    if results[run.rate].mean_accuracy > recipe.target:
                        break
        if stage is not last:
            results |= {run.rate: run.result(stage.until_epoch) for run in running}
            running = sorted(running, key=lambda run: results[run.rate].loss)[: stage.rates_left]
        begin = stage.until_epoch
    return [results[rate] for rate in recipe.rates]


class Run:
    """A model in training at one rate: AdamW with weight decay on everything, a few steps of warm-up, a cosine to 0."""

    def __init__(
        self, model: nn.Module, rate: float, recipe: Recipe, total_steps: int, seed: int, graph_pool: Any = None
    ) -> None:
        """graph_pool: where CUDA graphs of steps have their memory; None: no graphs."""
        self.model, self.rate, self.recipe, self.total_steps, self.seed = model, rate, recipe, total_steps, seed
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        on_gpu = self.device.type == "cuda"
        self.lr = torch.tensor(rate, device=self.device) if on_gpu else rate
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.lr, weight_decay=WEIGHT_DECAY, fused=on_gpu or None, capturable=on_gpu
        )
        self.steps = 0
        self.losses: list[Tensor] = []
        """Losses of the last epoch's steps, on the device: nobody waits for them before a stage ends."""
        self._step = self._update if graph_pool is None else GraphedSteps(self._update, graph_pool)

    def train(self, batches: Iterable[Examples], epoch: int, check_time: Callable[[], None] = lambda: None) -> None:
        """One epoch."""
        torch.manual_seed(zlib.crc32(f"{self.seed} dropout {epoch}".encode()))
        self.model.train()
        self.losses = []
        for batch in batches:
            check_time()
            self._set_rate()
            self.losses.append(self._step(batch).clone())
            self.steps += 1

    def result(self, epochs: int, accuracy: Mapping[str, float] | None = None) -> RateResult:
        """The run as it is now. Its loss is infinite if it has diverged: it then comes last."""
        judged = self.losses[-math.ceil(JUDGED_SHARE * len(self.losses)) :]
        loss = float(torch.stack(judged).mean())
        return RateResult(self.rate, epochs, loss if math.isfinite(loss) else math.inf, accuracy)

    @torch.no_grad()
    def test(self, sets: Sequence[Examples]) -> dict[str, float]:
        """Accuracy of each segment: the mean over examples of the part of queries whose most likely token is the answer."""
        self.model.eval()
        found = {}
        for examples in sets:
            B, T = examples.tokens_BT.shape
            size = max(1, TEST_TOKENS // T)
            parts = [examples.rows(slice(first, first + size)) for first in range(0, B, size)]
            right = [self.model(part.tokens_BT, part.positions_BK).argmax(-1) == part.answers_BK for part in parts]
            found[f"{T}/{examples.answers_BK.shape[1]}"] = float(torch.cat(right).double().mean())
        return found

    def _set_rate(self) -> None:
        done = self.steps / self.total_steps
        rate = self.rate * min(1.0, (self.steps + 1) / self.recipe.warmup_steps) * (1 + math.cos(math.pi * done)) / 2
        if isinstance(self.lr, Tensor):
            self.lr.fill_(rate)
        else:
            self.optimizer.param_groups[0]["lr"] = rate

    def _update(self, batch: Examples) -> Tensor:
        """One step of the optimizer; returns the mean loss of the queries, on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = query_loss(self.model(batch.tokens_BT, batch.positions_BK), batch.answers_BK)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_grad_norm, foreach=True)
        self.optimizer.step()
        return loss.detach()


def query_loss(logits_BKU: Tensor, answers_BK: Tensor) -> Tensor:
    """Mean cross entropy of the answers, in nats. On a GPU the gradient is written over the logits, which are most of a step's memory."""
    logits, answers = logits_BKU.flatten(0, 1).float(), answers_BK.flatten()
    if logits.is_cuda:
        return vocab_cross_entropy(logits, answers, backend="triton").mean()
    return functional.cross_entropy(logits, answers)
