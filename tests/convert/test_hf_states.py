"""States, padding and generation of the Hugging Face model."""

from types import SimpleNamespace

import pytest
import torch
from hf_tiny import TINY, assert_close, tiny_model, tokens
from transformers import DynamicCache, GenerationConfig, StaticCache

from based_megatron.convert.hf_files import modeling_based
from based_megatron.convert.hf_files.modeling_based import CACHE_NAME, BasedCache

CACHE_NAMES = pytest.mark.parametrize("name", ["cache", "past_key_values"])

# --- states


@pytest.mark.parametrize("pattern", ["cLSAc", "cLc", "AA", "LS"])
def test_prefill_then_single_steps_equals_one_pass_for_every_split(pattern):
    model, ids = tiny_model(pattern), tokens(2, 17)
    expected = model(ids, use_cache=False).logits
    for split in range(1, 17):
        output = model(ids[:, :split], use_cache=True)
        logits = [output.logits]
        for t in range(split, 17):
            logits.append(model(ids[:, t : t + 1], cache=getattr(output, CACHE_NAME)).logits)
        assert_close(torch.cat(logits, 1), expected)


@pytest.mark.parametrize("pattern", ["cLSAc", "cLc"])
def test_prefill_in_chunks_equals_one_pass(pattern):
    model, ids = tiny_model(pattern), tokens(2, 23)
    cache, logits = BasedCache(model.config), []
    for chunk in ids.split([1, 2, 9, 3, 8], dim=1):
        logits.append(model(chunk, past_key_values=cache).logits)
    assert_close(torch.cat(logits, 1), model(ids, use_cache=False).logits)


def test_the_plain_dynamic_cache_of_transformers_works():
    model, ids = tiny_model("cLS"), tokens(1, 12)
    cache = DynamicCache(config=model.config)
    logits = [model(chunk, past_key_values=cache).logits for chunk in ids.split([7, 1, 4], dim=1)]
    assert_close(torch.cat(logits, 1), model(ids, use_cache=False).logits)


def test_window_and_kernel_of_one_token_need_no_state():
    model, ids = tiny_model("cS", window_left=0, conv_kernel=1), tokens(1, 9)
    cache = BasedCache(model.config)
    logits = [model(chunk, past_key_values=cache).logits for chunk in ids.split([4, 1, 4], dim=1)]
    assert_close(torch.cat(logits, 1), model(ids, use_cache=False).logits)


def test_state_has_the_packed_shape_in_float32_and_does_not_grow():
    model = tiny_model("cLS", torch.bfloat16)
    config, cache = model.config, BasedCache(model.config)
    assert cache.state_bytes() == 0
    model(tokens(2, 20), past_key_values=cache)
    state = cache.layers[1].recurrent_states[0]
    features = 1 + 4 + 4 * 5 // 2
    assert state.shape == (2, 4, features, 8 + 1) and state.dtype == torch.float32
    assert cache.layers[0].conv_states[0].shape == (2, 2 * config.hidden_size, 2)
    assert cache.layers[2].keys.shape == (2, 4, config.sliding_window - 1, 8)
    expected = 2 * (4 * features * 9 * 4 + 64 * 2 * 2 + 2 * 32 * 5 * 2)
    assert cache.state_bytes() == expected
    model(tokens(2, 31, seed=1), past_key_values=cache)
    model(tokens(2, 1, seed=2), past_key_values=cache)
    assert cache.state_bytes() == expected and cache.get_seq_length() == 52


def test_bfloat16_counts_tokens_beyond_256():
    """A normaliser in bfloat16 would stop counting there."""
    model = tiny_model("L", torch.bfloat16)
    cache = BasedCache(model.config)
    model(tokens(1, 300), past_key_values=cache)
    model(tokens(1, 1), past_key_values=cache)
    assert cache.layers[0].recurrent_states[0][0, :, 0, -1].tolist() == [301.0] * 4


def test_a_reset_cache_starts_over():
    model, ids = tiny_model("cLSA"), tokens(1, 8)
    cache = BasedCache(model.config)
    model(tokens(1, 11, seed=3), past_key_values=cache)
    cache.reset()
    assert_close(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits)


# --- the two names of the cache: transformers 5.24 calls it cache, older versions past_key_values


@CACHE_NAMES
def test_a_cache_is_continued_under_either_name(name):
    model, ids = tiny_model("cLS"), tokens(1, 9)
    expected = model(ids, use_cache=False, output_hidden_states=True)
    cache = BasedCache(model.config)
    logits = [model(chunk, **{name: cache}).logits for chunk in ids.split([4, 1, 4], dim=1)]
    assert_close(torch.cat(logits, 1), expected.logits)
    cache = BasedCache(model.config)
    hidden = [model.model(chunk, **{name: cache}).last_hidden_state for chunk in ids.split([4, 1, 4], dim=1)]
    assert_close(torch.cat(hidden, 1), expected.hidden_states[-1])


@CACHE_NAMES
def test_outputs_carry_the_cache_under_the_name_of_the_version(monkeypatch, name):
    monkeypatch.setattr(modeling_based, "CACHE_NAME", name)
    for output in ("BaseModelOutputWithPast", "CausalLMOutputWithPast"):  # those of the other version
        monkeypatch.setattr(modeling_based, output, SimpleNamespace)
    model, ids = tiny_model("cL"), tokens(1, 5)
    for output in (model(ids, use_cache=True), model.model(ids, use_cache=True)):
        assert isinstance(getattr(output, name), BasedCache)


@CACHE_NAMES
def test_generation_begins_with_our_cache_under_the_name_of_the_version(monkeypatch, name):
    monkeypatch.setattr(modeling_based, "CACHE_NAME", name)
    inputs = {}
    tiny_model("cL")._prepare_cache_for_generation(GenerationConfig(), inputs)
    assert isinstance(inputs.pop(name), BasedCache) and not inputs


def test_the_name_of_the_version_is_that_of_its_generation():
    model, ids = tiny_model("cL"), tokens(1, 5)
    assert CACHE_NAME in model(ids, use_cache=True)
    prepared = model.prepare_inputs_for_generation(ids, **{CACHE_NAME: BasedCache(model.config)})
    assert isinstance(prepared[CACHE_NAME], BasedCache)


def test_a_cache_under_both_names_is_refused():
    model = tiny_model("cL")
    cache = BasedCache(model.config)
    with pytest.raises(ValueError, match="give one of cache and past_key_values"):
        model(tokens(1, 5), cache=cache, past_key_values=cache)


# --- padding


@pytest.mark.parametrize("pattern", ["cLSA", "cLc", "S"])
def test_left_padded_rows_equal_the_rows_alone(pattern):
    model, ids = tiny_model(pattern), tokens(3, 19)
    mask = torch.ones_like(ids)
    mask[1, :6], mask[2, :14] = 0, 0
    logits = model(ids, attention_mask=mask).logits
    for row, start in enumerate((0, 6, 14)):
        assert_close(logits[row : row + 1, start:], model(ids[row : row + 1, start:]).logits)


@pytest.mark.parametrize("chunks", [[12, 1, 1, 1, 1, 1, 2], [3, 9, 7]])
def test_left_padded_rows_decode_like_the_rows_alone(chunks):
    model, ids = tiny_model("cLSAc"), tokens(2, 19)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0  # with the second case, more than the whole first chunk
    cache, logits, seen = BasedCache(model.config), [], 0
    for chunk in ids.split(chunks, dim=1):
        seen += chunk.shape[1]
        logits.append(model(chunk, attention_mask=mask[:, :seen], past_key_values=cache).logits)
    assert_close(torch.cat(logits, 1)[1:, 7:], model(ids[1:, 7:], use_cache=False).logits)


def test_the_content_of_padding_does_not_matter():
    model, ids = tiny_model("cLSA"), tokens(1, 15)
    mask = (torch.arange(15) >= 5).long()[None]
    other = torch.where(mask.bool(), ids, (ids + 7) % TINY["vocab_size"])
    assert torch.equal(model(ids, attention_mask=mask).logits[:, 5:], model(other, attention_mask=mask).logits[:, 5:])


def test_positions_matter_only_relative_to_each_other():
    model, ids = tiny_model("SA"), tokens(1, 12)
    assert_close(model(ids, position_ids=torch.arange(12)[None] + 1000).logits, model(ids).logits)


def test_a_mask_that_does_not_cover_the_cache_is_refused():
    model, ids = tiny_model("cL"), tokens(1, 6)
    cache = getattr(model(ids, use_cache=True), CACHE_NAME)
    with pytest.raises(ValueError, match=r"cached \+ new tokens\] = \[1, 7\], got \[1, 1\]"):
        model(ids[:, :1], attention_mask=torch.ones(1, 1), past_key_values=cache)


def test_caches_of_other_kinds_are_refused():
    model, ids = tiny_model("cLS"), tokens(1, 6)
    with pytest.raises(ValueError, match="StaticCache is not supported"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=8))
    with pytest.raises(ValueError, match="made for another model"):
        model(ids, past_key_values=DynamicCache())


# --- generate


@pytest.mark.parametrize("pattern", ["cLSAc", "cLc"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}])
def test_generation_with_a_cache_equals_generation_without(pattern, options):
    model, ids = tiny_model(pattern), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    both = [
        model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, use_cache=use, **extra)
        for use, extra in ((True, options), (False, {k: v for k, v in options.items() if k == "num_beams"}))
    ]
    assert torch.equal(*both) and both[0].shape == (2, 21)
    alone = model.generate(ids[1:, 4:], do_sample=False, max_new_tokens=12, **options)
    assert torch.equal(both[0][1:, 4:], alone)


@CACHE_NAMES
def test_generation_continues_a_cache_under_either_name(name):
    model, ids = tiny_model("cLSAc"), tokens(1, 9)
    cache = BasedCache(model.config)
    model(ids[:, :6], cache=cache)
    continued = model.generate(ids, do_sample=False, max_new_tokens=8, **{name: cache})
    assert torch.equal(continued, model.generate(ids, do_sample=False, max_new_tokens=8))
    assert cache.get_seq_length() == 9 + 7


def test_generation_reads_one_token_a_step():
    model, lengths = tiny_model("cLSc"), []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.generate(tokens(2, 9), do_sample=False, max_new_tokens=4)
    assert lengths == [9, 1, 1, 1]


def test_rows_above_the_tokenizer_have_logits():
    model, ids = tiny_model("cL"), tokens(2, 5)
    assert model.config.vocab_size == 64 and model.config.tokenizer_vocab_size == 61
    assert model(ids).logits.shape[-1] == 64


def test_assisted_decoding_is_refused_as_states_cannot_roll_back():
    model, ids = tiny_model("cL"), tokens(1, 5)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, assistant_model=tiny_model("cL"), max_new_tokens=3)
