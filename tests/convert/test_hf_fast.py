"""Exports with the kernels of based_megatron give what plain PyTorch gives: values, states, gradients. A GPU is not asked for."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from hf_tiny import assert_close, tiny_model, tokens

from based_megatron.convert.hf_files import fast_based
from based_megatron.convert.hf_files.modeling_based import BasedCache

CLOSE = 2e-4


CHECKS = (fast_based._attention_agrees, fast_based._convolution_agrees, fast_based._window_agrees)


@pytest.fixture(autouse=True)
def unchecked():
    """What was found of kernels in a test is nothing to the next one."""
    for check in CHECKS:
        check.cache_clear()
    yield
    for check in CHECKS:
        check.cache_clear()


@pytest.fixture(params=["reference", pytest.param("triton", id="interpreted", marks=pytest.mark.slow)])
def kernels(request):
    """Surroundings in which the model uses the kernels, all of which must agree."""

    @contextmanager
    def used():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fast_based, "backend", lambda x: request.param)
            patch.setattr(fast_based.logger, "warning", lambda line, *words: pytest.fail(line % words))
            yield
        assert all(check.cache_info().currsize == 1 for check in CHECKS)

    return used


@pytest.mark.parametrize("variant", [{}, {"feature_map": "rebased"}])
def test_prefill_in_pieces_and_steps_equal_plain_pytorch(kernels, variant):
    model, ids = tiny_model("cLS", torch.float32, **variant), tokens(2, 23)
    expected, caches = model(ids, use_cache=False).logits, []
    for pieces in ([9, 13, 1], [23]):
        with kernels():
            cache = BasedCache(model.config)
            logits = [model(piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)]
        assert_close(torch.cat(logits, 1), expected, CLOSE)
        caches.append(cache)
    plain = BasedCache(model.config)
    model(ids, past_key_values=plain)
    for cache in caches:
        assert_close(cache.layers[1].recurrent_states[0], plain.layers[1].recurrent_states[0], CLOSE)
        assert_close(cache.layers[0].conv_states[0], plain.layers[0].conv_states[0], CLOSE)


def test_packed_documents_and_gradients_equal_plain_pytorch(kernels):
    model, ids = tiny_model("cLS", torch.float32).train(), tokens(1, 21)
    positions = torch.cat([torch.arange(8), torch.arange(13)])[None]
    found = []
    for surroundings in (kernels, nullcontext):
        model.zero_grad()
        with surroundings():
            output = model(ids, position_ids=positions, labels=ids)
            output.loss.backward()
        found.append((output.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    assert_close(found[0][0], found[1][0], CLOSE)
    for name, gradient in found[0][1].items():
        assert_close(gradient, found[1][1][name], CLOSE)


def test_padded_rows_and_single_tokens_are_left_to_plain_pytorch(monkeypatch):
    model, ids = tiny_model("cLS", torch.float32), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits, model(ids[:, :1], use_cache=False).logits
    monkeypatch.setattr(fast_based, "backend", lambda x: "none such")
    assert torch.equal(model(ids, attention_mask=mask, use_cache=False).logits, expected[0])
    assert torch.equal(model(ids[:, :1], use_cache=False).logits, expected[1])


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_kernels_that_differ_are_not_used(monkeypatch, fault):
    from based_megatron.kernels import gated_conv, sliding_window, taylor_attention

    model, ids = tiny_model("cLS", torch.float32), tokens(2, 9)
    expected = model(ids, use_cache=False).logits
    monkeypatch.setattr(fast_based, "backend", lambda x: "reference")
    said = []
    monkeypatch.setattr(fast_based.logger, "warning", lambda line, *words: said.append(line % words))
    places = (
        (gated_conv, "gated_conv_fused"),
        (sliding_window, "sliding_window_attention"),
        (taylor_attention, "taylor_attention"),
    )
    for module, name in places:
        real = getattr(module, name)

        def damaged(*args, real=real, **options):
            if fault == "raises":
                raise TypeError("an option of another version")
            found = real(*args, **options)
            return (1.01 * found[0], found[1]) if isinstance(found, tuple) else 1.01 * found

        monkeypatch.setattr(module, name, damaged)
    for _ in range(2):
        assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert len(said) == 3 and all("are not used for" in line for line in said), "once for each kind"


def test_only_a_gpu_with_the_package_takes_kernels(monkeypatch):
    class OnGpu:
        device, dtype = torch.device("cuda"), torch.bfloat16

    monkeypatch.setattr(fast_based, "is_installed", lambda: True)
    assert fast_based.backend(OnGpu()) == "triton"
    assert fast_based.backend(torch.zeros(1)) is None
    OnGpu.dtype = torch.float16
    assert fast_based.backend(OnGpu()) is None
    OnGpu.dtype = torch.bfloat16
    monkeypatch.setattr(fast_based, "is_installed", lambda: False)
    assert fast_based.backend(OnGpu()) is None
