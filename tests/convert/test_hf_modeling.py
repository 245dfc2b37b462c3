"""The Hugging Face model: mixers against their definitions, and the interface."""

import pytest
import torch
from hf_tiny import TINY, assert_close, tiny_model, tokens
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from based_megatron.config.schema import ModelConfig
from based_megatron.convert.hf_files.configuration_based import BasedConfig
from based_megatron.convert.hf_files.mixers_based import (
    ATTENTION_BLOCK_TOKENS,
    LINEAR_CHUNK_TOKENS,
    BasedAttention,
    BasedGatedConv,
    BasedLinearAttention,
    causal_attention,
    packed_features,
    rotate,
    taylor_attention,
)
from based_megatron.convert.hf_files.modeling_based import BasedCache, BasedForCausalLM
from based_megatron.convert.huggingface import hf_config

# --- mixers against their definitions


@pytest.mark.parametrize("length", [1, LINEAR_CHUNK_TOKENS, LINEAR_CHUNK_TOKENS + 1, 2 * LINEAR_CHUNK_TOKENS + 37])
def test_taylor_attention_equals_its_quadratic_definition(length):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, length, 4, dtype=torch.float64)
    v = torch.randn(2, 3, length, 5, dtype=torch.float64)
    s = torch.einsum("bhie,bhje->bhij", q, k) / 4**0.5
    w = torch.tril(1 + s + s**2 / 2)
    y, state = taylor_attention(q, k, v, None, None)
    assert_close(y, w @ v / w.sum(-1, keepdim=True))
    assert_close(state[..., 0, -1], torch.full((2, 3), float(length), dtype=torch.float64))


def test_features_are_packed_and_multiply_to_the_kernel():
    torch.manual_seed(0)
    q, k = torch.randn(2, 50, 16, dtype=torch.float64)
    s = (q * k).sum(-1)
    for square, rows, kernel in ((False, 153, 1 + s + s**2 / 2), (True, 136, s**2)):
        assert packed_features(q, square).shape == (50, rows)
        assert_close((packed_features(q, square) * packed_features(k, square)).sum(-1), kernel)


@pytest.mark.parametrize("window", [None, 1, 6, ATTENTION_BLOCK_TOKENS + 3])
@pytest.mark.parametrize(("past", "length"), [(0, 7), (4, 3), (0, 2 * ATTENTION_BLOCK_TOKENS + 5), (9, 1)])
def test_causal_attention_equals_masked_softmax(window, past, length):
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 2, past + length, 4, dtype=torch.float64)
    q = torch.randn(2, 2, length, 4, dtype=torch.float64)
    age = torch.arange(past, past + length)[:, None] - torch.arange(past + length)
    seen = (age >= 0) & (age < (window or past + length))
    weights = (q @ k.transpose(-1, -2) / 4**0.5).masked_fill(~seen, float("-inf")).softmax(-1)
    assert_close(causal_attention(q, k, v, None, window), weights @ v)


def test_padding_sees_itself_so_that_it_stays_finite_in_every_kernel():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[False, False, False, True, True]])
    assert_close(causal_attention(q, k, v, mask, None)[:, :, :3], v[:, :, :3])


def test_rotary_rotates_half_split_pairs_of_the_first_dims_only():
    x = torch.zeros(1, 1, 1, 6, dtype=torch.float64)
    x[..., 0], x[..., 5] = 1.0, 7.0
    angle = torch.tensor([0.3, 0.5, 0.3, 0.5], dtype=torch.float64).view(1, 1, 1, 4)
    turned = rotate(x, angle.cos(), angle.sin()).flatten()
    expected = torch.tensor([0.3, 0.3], dtype=torch.float64)
    assert_close(turned[[0, 2]], torch.stack([expected[0].cos(), expected[1].sin()]))
    assert turned[5] == 7.0 and turned[[1, 3, 4]].abs().max() == 0


def test_each_mixer_reaches_exactly_as_far_back_as_it_should():
    """Influence of token 0 on the outputs after it: window_left tokens, conv_kernel - 1 tokens, all."""
    ids = tokens(1, 14)
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % TINY["vocab_size"]
    for letter, reach in {"S": TINY["window_left"], "c": 2, "L": 13, "A": 13}.items():
        model = tiny_model(letter)
        moved = (model(ids).logits - model(changed).logits).abs().amax(-1)[0] > 1e-12
        assert moved.tolist() == [i <= reach for i in range(14)], letter


# --- the rest of the interface


def test_logits_to_keep_and_hidden_states():
    model, ids = tiny_model("cLS"), tokens(2, 7)
    logits = model(ids).logits
    assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]])
    hidden = model(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == 4
    assert_close(model.lm_head(hidden[-1]), logits)


def test_embeddings_as_input_equal_ids():
    model, ids = tiny_model("cLS"), tokens(1, 7)
    assert_close(model(inputs_embeds=model.model.embed_tokens(ids)).logits, model(ids).logits)


def test_loss_is_the_mean_over_labels_that_count():
    model, ids = tiny_model("cLS"), tokens(2, 7)
    labels = ids.clone()
    labels[0, 3] = -100
    logp = model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    logp[0, 2] = 0.0
    # The loss of transformers is computed in float32.
    assert model(ids, labels=labels).loss.item() == pytest.approx(-logp.sum().item() / 11, abs=1e-6)


def test_what_a_trainer_gathers_from_an_evaluation_is_the_logits_alone():
    """transformers.Trainer adds a list to these keys, and gathers every output that is not among them."""
    model, ids = tiny_model("cLS"), tokens(2, 9)
    outputs = model(ids, labels=ids, use_cache=True)
    ignored = model.config.keys_to_ignore_at_inference + ["loss"]  # noqa: RUF005  as Trainer does
    assert [key for key in outputs if key not in ignored] == ["logits"]


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("cLSA").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert_close(gradients[1][name], gradient)


def test_bfloat16_weights_keep_a_float32_residual():
    model = tiny_model("cLSA", torch.bfloat16)
    hidden = model(tokens(1, 7), output_hidden_states=True).hidden_states
    assert [h.dtype for h in hidden] == [torch.float32] * 4 + [torch.bfloat16]


def test_fresh_weights_are_initialised_as_released():
    torch.manual_seed(0)
    config = hf_config(
        ModelConfig(layer_pattern="cL", hidden_size=256, ffn_hidden_size=256, num_heads=4, vocab_size=999)
    )
    model = BasedForCausalLM(config)
    layer = model.model.layers[0]
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for back in (layer.mlp.down_proj, layer.mixer.out_proj, model.model.layers[1].mixer.o_proj):
        assert back.weight.std().item() == pytest.approx(0.02 / 4**0.5, rel=0.02)
    assert layer.mixer.in_proj.bias.abs().max() == 0 and (layer.mixer_norm.weight == 1).all()
    assert layer.mixer.conv_weight.abs().max().item() == pytest.approx(3**-0.5, rel=0.01)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_wrong_number_of_mixers_is_refused():
    with pytest.raises(ValueError, match=r"3 mixers.* got 2, with unknown mamba"):
        BasedConfig(num_hidden_layers=3, mixers=["conv", "mamba"])


@pytest.mark.parametrize("read_again", [False, True])
def test_what_is_built_does_not_depend_on_layer_types(read_again):
    """Versions of transformers rename entries of layer_types: 5.17 makes linear_attention of conv."""
    config = hf_config(ModelConfig(layer_pattern="cLSA", **TINY))
    config.layer_types = ["linear_attention"] * 4
    if read_again:
        config = BasedConfig.from_dict(config.to_dict())
        kinds = [LinearAttentionLayer, LinearAttentionLayer, DynamicSlidingWindowLayer, DynamicLayer]
        assert [type(layer) for layer in BasedCache(config).layers] == kinds
    mixers = [layer.mixer for layer in BasedForCausalLM(config).model.layers]
    assert [type(mixer) for mixer in mixers] == [BasedGatedConv, BasedLinearAttention, BasedAttention, BasedAttention]
    assert [mixer.window for mixer in mixers[2:]] == [TINY["window_left"] + 1, None]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layer_pattern": "cLScc*5 cc"}, 362_620_928),
        ({"layer_pattern": "cLScc*4 cLSccc*2 cLSc", "hidden_size": 1792, "ffn_hidden_size": 3584}, 1_349_453_056),
        (
            {"layer_pattern": "A*24", "ffn_hidden_size": 2816, "rotary_fraction": 0.5, "vocab_multiple": 16},
            359_810_048,
        ),
    ],
)
def test_models_have_the_published_numbers_of_parameters(changes, expected):
    with torch.device("meta"):
        model = BasedForCausalLM(hf_config(ModelConfig(**changes)))
    assert sum(p.numel() for p in model.parameters()) == expected
