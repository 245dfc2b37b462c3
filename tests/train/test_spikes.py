"""Spikes of loss and gradient norm, found by the median and median deviation of a window."""

import dataclasses
import json
import math
import statistics

import pytest
import torch

from based_megatron.config import GuardsConfig, load_config
from based_megatron.data.jumps import DataJumps
from based_megatron.train.guard import NOT_FINITE, Guard
from based_megatron.train.skips import SkipCount
from based_megatron.train.spikes import HAS_RISEN, REASONS, SpikeWindow, reasons

CPU = torch.device("cpu")
SETTINGS = GuardsConfig(window_steps=16, warmup_steps=8, threshold=5.0)


def judged(window: SpikeWindow, loss: float, norm: float) -> tuple[bool, list[str]]:
    """(whether the step is skipped, why); a step that is not skipped joins the window."""
    skip = bool(window.judge(torch.tensor(loss).double(), torch.tensor(norm).double()))
    if not skip:
        window.keep()
    return skip, reasons(window.verdict.tolist())


def warm(
    settings: GuardsConfig = SETTINGS, steps: int = 16, noise: float = 0.1
) -> tuple[SpikeWindow, list[float], list[float]]:
    """A window of some steps, and their losses and norms."""
    window, generator = SpikeWindow(settings, CPU), torch.Generator().manual_seed(1)
    losses = (3.0 * torch.exp(noise * torch.randn(steps, generator=generator))).tolist()
    norms = (0.5 * torch.exp(3 * noise * torch.randn(steps, generator=generator))).tolist()
    for loss, norm in zip(losses, norms, strict=True):
        window.judge(torch.tensor(loss).double(), torch.tensor(norm).double())
        window.keep()
    return window, losses, norms


def limit_of(values: list[float], threshold: float, least: float) -> float:
    """The largest value that is no spike, from the definition."""
    logs = [math.log(torch.tensor(value).double()) for value in values]
    median = statistics.median_low(logs)
    deviation = 1.4826 * statistics.median_low([abs(x - median) for x in logs])
    return math.exp(median + threshold * max(deviation, least))


@pytest.mark.parametrize("noise", [0.1, 0.0])
def test_the_limits_are_medians_and_deviations_of_the_logarithms(noise):
    """Without noise, the least deviations: 1 % of a loss, 20 % of a norm."""
    _, losses, norms = warm(noise=noise)
    loss_limit, norm_limit = limit_of(losses, 5.0, 0.01), limit_of(norms, 5.0, 0.2)
    for loss, norm, expected in (
        (loss_limit * 0.999, norm_limit * 0.999, []),
        (loss_limit * 1.001, 0.1, [REASONS[1]]),
        (0.1, norm_limit * 1.001, [REASONS[2]]),
        (loss_limit * 2, norm_limit * 2, [REASONS[1], REASONS[2]]),
        (1e-9, 0.0, []),
    ):
        assert judged(warm(noise=noise)[0], loss, norm) == (bool(expected), expected)


def test_nothing_is_judged_before_enough_steps_are_known():
    window, _, _ = warm(steps=7)
    assert judged(window, 1e6, 1e6) == (False, [])
    assert judged(window, 1e9, 1e9)[0]


def test_a_loss_that_is_not_finite_is_skipped_from_the_first_step():
    for spike in ("skip", "record"):
        window = SpikeWindow(dataclasses.replace(SETTINGS, spike=spike), CPU)
        assert judged(window, math.nan, 1.0) == (True, [REASONS[0]])
        assert judged(window, math.inf, 1.0)[0]


def test_the_window_holds_the_last_good_steps():
    """Skipped steps stay out; older ones are forgotten, so that a level that changes slowly is followed."""
    window, _, _ = warm()
    before = window.state()["window"]
    assert judged(window, 1e3, 1e3)[0] and window.state()["window"] == before
    assert not judged(window, 2.5, 0.4)[0]
    for row, old, new in zip(window.state()["window"], before, (2.5, 0.4), strict=True):
        assert row[:-1] == old[1:] and row[-1] == pytest.approx(math.log(new))


def test_recorded_spikes_are_not_skipped():
    window, _, _ = warm(dataclasses.replace(SETTINGS, spike="record"))
    assert judged(window, 1e3, 0.5) == (False, [REASONS[1]])


@pytest.mark.parametrize(("spike", "rollback"), [("skip", True), ("skip", False), ("record", True)])
def test_a_loss_that_rises_slowly_and_stays_is_found(spike, rollback):
    """No step of it is a spike. The reason is told only where something can be done."""
    settings = dataclasses.replace(SETTINGS, spike=spike, rollback=rollback)
    window, _, _ = warm(settings, noise=0.0)
    found, loss = [], 3.0
    for _ in range(60):
        loss *= 1.003
        found.append(judged(window, loss, 0.5))
    if spike == "record":
        assert all(why == [] for _, why in found)
    first = next((place for place, (skip, _) in enumerate(found) if skip), None)
    if not rollback or spike == "record":
        assert first is None
        return
    assert first is not None and found[first] == (True, [HAS_RISEN])
    # The median of 16 steps lags half a window behind, and their median deviation is that of four steps.
    assert first - 7 == pytest.approx(5 * 1.4826 * 4, abs=2)


def test_state_is_exact_through_json():
    window, _, _ = warm(steps=40)
    other = SpikeWindow(SETTINGS, CPU)
    other.restore(json.loads(json.dumps(window.state(), allow_nan=False)))
    assert other.state() == window.state()
    shorter = SpikeWindow(dataclasses.replace(SETTINGS, window_steps=10), CPU)
    shorter.restore(window.state())
    assert shorter.state()["window"] == [row[-10:] for row in window.state()["window"]]


def guard_with(limit: int = 3, **changes) -> Guard:
    config = load_config("tiny")
    settings = dataclasses.replace(SETTINGS, **changes)
    train = dataclasses.replace(config.train, max_skipped_steps=limit)
    return Guard(dataclasses.replace(config, guards=settings, train=train), CPU)


def settle(guard: Guard, step: int, loss: float, norm: float = 1.0) -> bool:
    values = torch.tensor([loss, norm]).double()
    skip = guard.judge(*values)
    applied = bool(values.isfinite().all()) and not (skip is not None and bool(skip))
    guard.settle(step, *values, applied)
    return applied


def test_recorded_spikes_are_read_once():
    guard = guard_with(spike="record")
    for step in range(1, 12):
        settle(guard, step, 1000.0 if step == 10 else 3.0)
    (spike,) = guard.spikes()
    assert (spike.step, spike.loss, spike.grad_norm, spike.reason) == (10, 1000.0, 1.0, REASONS[1])
    assert guard.spikes() == []


def test_guards_that_are_off_judge_nothing():
    guard = guard_with(spike="off")
    assert all(settle(guard, step, 10.0**step) for step in range(1, 20)) and guard.spikes() == []
    settle(guard, 20, math.nan)
    assert guard.reason(math.nan) == NOT_FINITE and guard.skips == SkipCount(1, 1)


def test_a_guard_goes_on_from_a_checkpoint():
    guard, other = guard_with(), guard_with()
    for step in range(1, 20):
        settle(guard, step, 3.0 + 0.1 * (step % 3))
    settle(guard, 20, 50.0)
    guard.returned(20, 27, rollbacks=2)
    other.restore(json.loads(json.dumps(guard.state())))
    assert (other.skips, other.rollbacks, other.data) == (SkipCount(1, 1), 2, DataJumps(((20, 27),)))
    for step in range(21, 30):
        assert settle(guard, step, 3.2) == settle(other, step, 3.2)
    assert other.state() == guard.state()


def test_a_lasting_rise_goes_back_by_more_than_the_window():
    guard = guard_with()
    settle(guard, 50, math.nan)
    wish = guard.wants_return(50, HAS_RISEN)
    assert wish is not None and wish.latest_step == 50 - 16
    assert guard.wants_return(50, REASONS[1]) is None, "one skipped step is no reason"


def test_data_jumps():
    jumps = DataJumps()
    assert [jumps.data_step(step) for step in (0, 5)] == [0, 5]
    jumps = jumps.jump(4, 9).jump(8, 20)
    assert [jumps.data_step(step) for step in range(10)] == [0, 1, 2, 3, 9, 10, 11, 12, 20, 21]
    assert jumps.jump(6, 30).jumps == ((4, 9), (6, 30)) and jumps.jump(4, 30).jumps == ((4, 30),)
    assert DataJumps.read(json.loads(json.dumps(jumps.jumps))) == jumps
