"""AdamW over flat tensors: the formula in fp64, torch's own, and what stands around the update."""

import dataclasses

import pytest
import torch
from kernel_oracles import DEVICE
from torch import Tensor

from based_megatron.kernels.adamw import AdamW, adamw

BACKENDS = ("reference", "triton")
NUMBERS = AdamW(lr=3e-2, step=1, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.3)


@dataclasses.dataclass
class Held:
    """Masters and moments."""

    master: Tensor
    mean: Tensor
    square: Tensor

    def copy(self, dtype: torch.dtype = torch.float32) -> "Held":
        return Held(*(x.to(dtype, copy=True) for x in vars(self).values()))

    def update(self, numbers: AdamW, gradient: Tensor, **options) -> None:
        adamw(numbers, self.master, gradient, self.mean, self.square, **options)


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def held(numel: int) -> Held:
    """After some steps: a second moment is positive."""
    torch.manual_seed(numel)
    return Held(some(numel), some(numel), some(numel).square())


def oracle(numbers: AdamW, before: Held, gradient: Tensor) -> Held:
    """From the paper's formulas (Loshchilov and Hutter 2019, algorithm 2), fp64."""
    w, m, v, g = (x.double() for x in (before.master, before.mean, before.square, gradient))
    b1, b2, t = numbers.beta1, numbers.beta2, numbers.step
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    step = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + numbers.eps)
    return Held(w - numbers.lr * (step + numbers.weight_decay * w), m, v)


def assert_close(found: Held, wanted: Held, limit: float = 5e-7) -> None:
    for got, want in zip(vars(found).values(), vars(wanted).values(), strict=True):
        assert float((got.double() - want).abs().max()) <= limit * float(want.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("numel", [1, 1000, 4099])
@pytest.mark.parametrize("step", [1, 7, 20_000])
def test_the_update_is_the_formula(backend: str, numel: int, step: int) -> None:
    numbers, now, gradient = NUMBERS._replace(step=step), held(numel), some(numel)
    wanted = oracle(numbers, now, gradient)
    now.update(numbers, gradient, backend=backend)
    assert_close(now, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_is_added_to_the_corrected_root(backend: str) -> None:
    """With gradients as small as eps it decides the update."""
    zeros, gradient = Held(*(torch.zeros(64, device=DEVICE) for _ in range(3))), 1e-6 * some(64)
    now = zeros.copy()
    now.update(NUMBERS, gradient, backend=backend)
    assert_close(now, oracle(NUMBERS, zeros, gradient))


@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_steps_are_those_of_torch(backend: str) -> None:
    numel = 300
    now = Held(some(numel), *(torch.zeros(numel, device=DEVICE) for _ in range(2)))
    weight = torch.nn.Parameter(now.master.clone())
    torchs = torch.optim.AdamW([weight], lr=3e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    for step in range(1, 21):
        weight.grad = some(numel)
        torchs.step()
        now.update(NUMBERS._replace(step=step), weight.grad, backend=backend)
    assert_close(now, Held(weight.detach(), *(torchs.state[weight][key] for key in ("exp_avg", "exp_avg_sq"))), 2e-6)


def test_the_reference_has_the_bits_of_torch() -> None:
    """So a run on a CPU goes on as it would have before."""
    now = held(77)
    weight = torch.nn.Parameter(now.master.clone())
    torchs = torch.optim.AdamW([weight], lr=3e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3, foreach=False)
    torchs.state[weight] = {
        "step": torch.tensor(4.0),
        "exp_avg": now.mean.clone(),
        "exp_avg_sq": now.square.clone(),
    }
    weight.grad = some(77)
    torchs.step()
    now.update(NUMBERS._replace(step=5), weight.grad)
    assert torch.equal(now.master, weight) and torch.equal(now.square, torchs.state[weight]["exp_avg_sq"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_scaled_and_weights_rounded(backend: str) -> None:
    numel = 2500
    now, gradient, scale = held(numel), some(numel), torch.tensor(0.37, device=DEVICE)
    weight, kept = torch.zeros(numel, dtype=torch.bfloat16, device=DEVICE), gradient.clone()
    wanted = oracle(NUMBERS, now, 0.37 * gradient)
    now.update(NUMBERS, gradient, scale=scale, weight_N=weight, backend=backend)
    assert_close(now, wanted)
    assert torch.equal(gradient, kept), "gradients are looked at after the update"
    assert torch.equal(weight, now.master.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("good", [True, False])
def test_a_bad_step_leaves_everything_alone(backend: str, good: bool) -> None:
    numel = 1500
    now, weight = held(numel), some(numel).bfloat16()
    before, weight_before = now.copy(), weight.clone()
    gradient = some(numel) if good else torch.full((numel,), torch.nan, device=DEVICE)
    now.update(
        NUMBERS, gradient, scale=torch.tensor(1.0 if good else torch.nan, device=DEVICE), weight_N=weight,
        is_good=torch.tensor(good, device=DEVICE), backend=backend,
    )  # fmt: skip
    for held_now, held_before in zip(vars(now).values(), vars(before).values(), strict=True):
        assert torch.equal(held_now, held_before) != good
    assert torch.equal(weight, weight_before) != good


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_in_the_middle_of_a_buffer(backend: str) -> None:
    """A rank's range of the flat gradients begins anywhere, and its neighbours' are not touched."""
    now, whole, weights = held(700), some(1000), torch.zeros(1000, dtype=torch.bfloat16, device=DEVICE)
    wanted = oracle(NUMBERS, now, whole[141:841])
    now.update(NUMBERS, whole[141:841], weight_N=weights[141:841], backend=backend)
    assert_close(now, wanted)
    assert not weights[:141].any() and not weights[841:].any() and weights[141:841].all()


def test_the_reference_takes_fp64() -> None:
    now, gradient = held(50).copy(torch.float64), some(50).double()
    wanted = oracle(NUMBERS, now, gradient)
    now.update(NUMBERS, gradient)
    assert_close(now, wanted, 1e-15)
