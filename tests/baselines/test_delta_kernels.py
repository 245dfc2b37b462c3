"""fla-core's kernels of the delta rules and of RWKV-7, which run bf16 on a GPU, against the plain operations in fp64."""

import importlib.util

import pytest
import torch
from recurrences import some_ids
from torch import Tensor
from torch.nn import functional

from based_megatron.baselines import fla
from based_megatron.baselines.operations.delta import delta_rule
from based_megatron.baselines.operations.dplr import dplr

B, T, H, K = 3, 200, 2, 64


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def some_inputs(name: str) -> tuple[Tensor, ...]:
    """What a mixer hands over, bf16 but for rates and decays."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, a = torch.randn(4, B, T, H, K, generator=generator).unbind()
    k, rates = functional.normalize(k, dim=-1), torch.rand(2, B, T, H, generator=generator)
    narrow = [x.cuda().bfloat16() for x in (q, k, v)]
    if name == "dplr":
        kk = functional.normalize(a, dim=-1)
        ab = [x.cuda().bfloat16() for x in (-kk, kk * rates[0, ..., None])]
        inputs = [*narrow, *ab, -0.6 * torch.rand(B, T, H, K, generator=generator).cuda()]
    else:
        inputs = [*narrow, rates[0].cuda(), *([-rates[1].cuda()] if name == "gated" else [])]
    return tuple(x.requires_grad_() for x in inputs)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="fla-core is not installed")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["plain", "gated", "dplr"])
def test_the_kernels_agree_with_the_plain_operations(name, packed):
    inputs = some_inputs(name)
    ids = some_ids(B, T).to("cuda") if packed else None
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    options = {"document_ids_BT": ids} if name == "dplr" else {"document_ids_BT": ids, "scale": K**-0.5}
    plain, kernel = (dplr, fla.dplr) if name == "dplr" else (delta_rule, fla.delta_rule)
    none = (None,) if name == "plain" else ()
    found, expected = kernel(*inputs, *none, **options)[0], plain(*exact, **options)[0]
    assert found.dtype == torch.bfloat16 and relative(found, expected) < 1e-2
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to("cuda")
    of_found = torch.autograd.grad((found.double() * cotangent).sum(), inputs)
    of_exact = torch.autograd.grad((expected * cotangent).sum(), exact)
    assert max(relative(x, y) for x, y in zip(of_found, of_exact, strict=True)) < 2e-2
