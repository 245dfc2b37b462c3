"""Exports that are fine-tuned: documents packed in a row, masks, checkpointed layers, caches in training."""

import pytest
import torch
from hf_tiny import assert_close, tiny_model, tokens
from transformers.cache_utils import DynamicCache, LinearAttentionLayer

from based_megatron.convert.hf_files.mixers_based import LINEAR_CHUNK_TOKENS
from based_megatron.convert.hf_files.modeling_based import CACHE_NAME, document_numbers

LENGTHS = [3, 1, LINEAR_CHUNK_TOKENS + 2, LINEAR_CHUNK_TOKENS - 4, 2 * LINEAR_CHUNK_TOKENS + 7, 5]
"""Documents that begin and end within chunks, at their borders and chunks apart."""
TOTAL = sum(LENGTHS)


def as_positions(lengths: list[int]) -> dict[str, torch.Tensor]:
    return {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}


def as_numbers(lengths: list[int]) -> dict[str, torch.Tensor]:
    return {"seq_idx": torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None] % 2}


def as_offsets(lengths: list[int]) -> dict[str, torch.Tensor]:
    return {"cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0).int()}


FORMS = [as_positions, as_numbers, as_offsets]


def alone(model, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(piece, use_cache=False).logits for piece in ids.split(LENGTHS, dim=1)], dim=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", ["c", "L", "S", "A", "cLSA"])
def test_packed_documents_give_the_logits_of_each_alone(pattern, form):
    model, ids = tiny_model(pattern, window_left=37, conv_kernel=4), tokens(1, TOTAL)
    packed = model(ids, **form(LENGTHS)).logits
    assert_close(packed, alone(model, ids))
    assert (packed - model(ids).logits).abs().max() > 0.01  # a leak would be seen


def test_packed_documents_of_squares_give_the_logits_of_each_alone():
    model, ids = tiny_model("L", feature_map="rebased"), tokens(1, TOTAL)
    assert_close(model(ids, **as_positions(LENGTHS)).logits, alone(model, ids))


def test_packed_documents_give_the_gradients_of_each_alone():
    ids = tokens(1, TOTAL)
    weights = torch.randn(1, TOTAL, 64, generator=torch.Generator().manual_seed(3))
    gradients = []
    for packed in (True, False):
        model = tiny_model("cLSA").train()
        logits = model(ids, **as_positions(LENGTHS)).logits if packed else alone(model, ids)
        (logits * weights).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[1].items():
        assert_close(gradients[0][name], gradient, 1e-9 * max(1.0, gradient.abs().max().item()))


def test_rows_of_a_batch_have_documents_of_their_own():
    model, ids = tiny_model("cLSA"), tokens(2, 12)
    positions = torch.cat([as_positions([5, 7])["position_ids"], as_positions([12])["position_ids"]])
    found = model(ids, position_ids=positions).logits
    assert_close(found[:1, 5:], model(ids[:1, 5:]).logits)
    assert_close(found[1:], model(ids[1:]).logits)


def test_padding_is_no_document():
    """generate gives padding any positions: they must not cost a padded prompt its cache."""
    model, ids = tiny_model("cLSA"), tokens(1, 7)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    output = model(ids, attention_mask=mask, position_ids=torch.tensor([[1, 1, 1, 0, 1, 2, 3]]))
    assert output[CACHE_NAME] is not None
    assert_close(output.logits[:, 3:], model(ids[:, 3:]).logits)
    right = model(ids, attention_mask=mask.flip(1), position_ids=torch.tensor([[0, 1, 2, 3, 0, 0, 0]]), use_cache=False)
    assert_close(right.logits[:, :4], model(ids[:, :4]).logits)


def test_document_numbers():
    positions = torch.tensor([[4, 5, 0, 1, 0, 0]])
    assert document_numbers(positions, None, None, None, (1, 6)).tolist() == [[0, 0, 1, 1, 2, 3]]
    assert document_numbers(positions[:, :2], None, None, None, (1, 2)) is None
    assert document_numbers(None, torch.tensor([[7, 7, 3, 7]]), None, None, (1, 4)).tolist() == [[0, 0, 1, 2]]
    assert document_numbers(None, None, torch.tensor([0, 3, 4]), None, (1, 4)).tolist() == [[0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("pattern", "changes", "arguments", "reason"),
    [
        ("cLS", {}, {"use_cache": True}, "no state to go on from"),
        ("cL", {"prefix_tokens": 4}, {}, "no prefix of their own"),
        ("cLS", {}, {"seq_idx": torch.zeros(1, 3)}, r"seq_idx must be \[batch, tokens\]"),
    ],
)
def test_documents_that_cannot_be_kept_apart_are_refused(pattern, changes, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        tiny_model(pattern, **changes)(tokens(1, 9), **as_positions([4, 5]), **arguments)


def test_offsets_of_several_rows_are_refused():
    with pytest.raises(ValueError, match="batch of one row, but there are 2"):
        tiny_model("c")(tokens(2, 9), **as_offsets([4, 5]))


# --- masks


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1]]), "zeros between the tokens of row 1"),
        (torch.zeros(2, 4), "float32: give integers or booleans"),
        (torch.ones(2, 1, 4, 4, dtype=torch.bool), "must be"),
    ],
)
def test_masks_that_are_not_of_padding_are_refused(mask, reason):
    with pytest.raises(ValueError, match=reason):
        tiny_model("cLSA")(tokens(2, 4), attention_mask=mask)


def test_going_on_behind_right_padding_is_refused():
    model, ids = tiny_model("cLS"), tokens(1, 5)
    cache = model(ids[:, :4], attention_mask=torch.tensor([[1, 1, 1, 0]]))[CACHE_NAME]
    with pytest.raises(ValueError, match="zeros between"):
        model(ids[:, 4:], attention_mask=torch.tensor([[1, 1, 1, 0, 1]]), cache=cache)


@pytest.mark.parametrize("arguments", [{}, as_positions([4, 5])])
def test_a_graph_of_the_model_with_a_mask_is_whole(arguments):
    model, ids = tiny_model("cLSA", torch.float32), tokens(2, 9)
    mask = torch.ones_like(ids)
    if not arguments:
        mask[0, :3] = 0
    expected = model(ids, attention_mask=mask, use_cache=False, **arguments).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found = compiled(ids, attention_mask=mask, use_cache=False, **arguments).logits
    assert_close(found[:, 3:], expected[:, 3:], 1e-5)
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False, **arguments}
    exported = torch.export.export(model, (), given).module()(**given).logits
    assert_close(exported[:, 3:], expected[:, 3:], 1e-5)


# --- training


def test_checkpointed_layers_train_with_use_cache():
    ids, gradients = tokens(2, 9), []
    for checkpointing in (False, True):
        model = tiny_model("cLSA").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        output = model(ids, labels=ids, use_cache=checkpointing)
        assert CACHE_NAME not in output
        output.loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    assert_close(*gradients)


def test_checkpointed_layers_refuse_a_cache():
    model, ids = tiny_model("cLSA"), tokens(1, 9)
    cache = model(ids)[CACHE_NAME]
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="give no cache"):
        model(ids, cache=cache)


def test_pieces_train_through_a_detached_cache():
    """Truncated backpropagation: the gradient of the second piece, the first held fixed."""
    model, ids = tiny_model("cLSA").train(), tokens(1, 9)
    cache = model(ids[:, :5], use_cache=True)[CACHE_NAME]
    for layer in cache.layers:
        kept = (layer.conv_states, layer.recurrent_states) if isinstance(layer, LinearAttentionLayer) else ()
        for states in kept:
            for index, state in states.items():
                states[index] = None if state is None else state.detach()
        if not kept:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    weight = model.lm_head.weight
    model(ids[:, 5:], cache=cache, use_cache=True).logits.square().sum().backward()
    found = weight.grad.clone()
    epsilon, direction = 1e-6, torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)

    @torch.no_grad()
    def second_piece(sign: int) -> torch.Tensor:
        with_cache = model(ids[:, :5], use_cache=True)[CACHE_NAME]  # by the weights as they are
        weight.add_(sign * epsilon * direction)
        value = model(ids[:, 5:], cache=with_cache, use_cache=True).logits.square().sum()
        weight.sub_(sign * epsilon * direction)
        return value

    slope = (second_piece(1) - second_piece(-1)) / (2 * epsilon)
    torch.testing.assert_close((found * direction).sum(), slope, rtol=1e-6, atol=0)


# --- the rest of what users of exports do


def test_a_row_above_the_tokenizer_can_be_generated():
    """Tokens that are added for fine-tuning take these rows."""
    model = tiny_model("cLS", vocab_size=59)
    assert model.config.vocab_size == 64
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[60] = model.model.norm.weight
    hidden = model.model(tokens(1, 4) % 59).last_hidden_state[0, -1]
    sign = torch.sign(hidden @ model.lm_head.weight[60])
    with torch.no_grad():
        model.lm_head.weight[60] *= sign
    assert model.generate(tokens(1, 4) % 59, max_new_tokens=1, do_sample=False)[0, -1] == 60


@pytest.mark.parametrize("padding", [0, 2])
def test_a_cache_that_does_not_know_its_length_decodes_where_no_layer_is_attention(padding):
    model, ids = tiny_model("cLc"), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    cache, pieces, seen = DynamicCache(config=model.config), [], 0
    for piece in ids.split([5, 1, 3], dim=1):
        seen += piece.shape[1]
        pieces.append(model(piece, attention_mask=mask[:, :seen], cache=cache, use_cache=True).logits)
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    assert_close(torch.cat(pieces, dim=1)[0], expected[0])
    assert_close(torch.cat(pieces, dim=1)[1, padding:], expected[1, padding:])


def test_generate_takes_an_empty_cache_that_does_not_count_and_refuses_a_full_one():
    model, ids = tiny_model("cL"), tokens(1, 6)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cache = DynamicCache(config=model.config)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), model.generate(ids, **options))
    assert cache.layers[0].conv_states[0] is not None, "the given cache has the states"
    with pytest.raises(ValueError, match="does not know its length"):
        model.generate(ids, past_key_values=cache, **options)


def test_a_cache_of_transformers_decodes_where_a_layer_is_attention():
    model, ids = tiny_model("cLSA"), tokens(1, 9)
    cache = DynamicCache(config=model.config)
    pieces = [model(piece, cache=cache, use_cache=True).logits for piece in ids.split([5, 1, 3], dim=1)]
    assert_close(torch.cat(pieces, dim=1), model(ids).logits)
