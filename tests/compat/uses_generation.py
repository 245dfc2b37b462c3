"""Generating with an export. Each function is one use: its docstring says in the table what was tried."""

from pathlib import Path
from threading import Thread

import torch
from opened import CLOSE, TEXTS, greedy_by_hand, logits_of, model_of, some_ids, tokenizer_of
from transformers import TextIteratorStreamer, pipeline


def greedy(export: Path, tmp: Path) -> None:
    """generate, greedily: the tokens of whole forward passes"""
    model, ids = model_of(export), some_ids(1)
    model.generation_config.eos_token_id = None
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert torch.equal(found, greedy_by_hand(model, ids, 12))


def batches(export: Path, tmp: Path) -> None:
    """a batch of texts of different lengths, padded on the left: as each alone"""
    model, tokenizer = model_of(export), tokenizer_of(export)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    rows = model.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for text, row in zip(TEXTS, rows, strict=True):
        alone = model.generate(
            **tokenizer(text, return_tensors="pt"), max_new_tokens=8, min_new_tokens=8, do_sample=False
        )
        assert torch.equal(row[-8:], alone[0, -8:]), text


def right_padding(export: Path, tmp: Path) -> None:
    """one forward pass of a batch that is padded on the right"""
    model, ids = model_of(export), some_ids()
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    padded = logits_of(model, ids, attention_mask=mask)
    torch.testing.assert_close(padded[1:, :15], logits_of(model, ids[1:, :15]), **CLOSE)


def sampling(export: Path, tmp: Path) -> None:
    """sampling with temperature, top-k, top-p, min-p, repetition penalty, several sequences: the same seed, the same tokens"""
    model, ids = model_of(export), some_ids(1)
    choices = ({"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}, {"repetition_penalty": 1.3}, {"num_return_sequences": 3})
    for choice in choices:
        found = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            options = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12, "min_new_tokens": 12, **choice}
            found.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options))
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def beams(export: Path, tmp: Path) -> None:
    """beam search: as without a cache"""
    model, ids = model_of(export), some_ids()
    options = dict(
        num_beams=4, max_new_tokens=8, min_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids)
    )
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def streaming(export: Path, tmp: Path) -> None:
    """TextIteratorStreamer in a thread: the text of the tokens"""
    model, tokenizer = model_of(export), tokenizer_of(export)
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=model.generate, kwargs=dict(**inputs, streamer=streamer, **options))
    thread.start()
    pieces = list(streamer)
    thread.join()
    tokens = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert "".join(pieces) == tokenizer.decode(tokens)


def text_pipeline(export: Path, tmp: Path) -> None:
    """pipeline("text-generation"), one text and a batch"""
    tokenizer = tokenizer_of(export)
    pipe = pipeline("text-generation", model=model_of(export), tokenizer=tokenizer, device="cpu")
    options = dict(max_new_tokens=6, do_sample=False, return_full_text=False)
    alone = [pipe(text, **options)[0]["generated_text"] for text in TEXTS]
    batched = [found[0]["generated_text"] for found in pipe(TEXTS, batch_size=3, **options)]
    assert alone == batched and any(alone)


def stop_strings(export: Path, tmp: Path) -> None:
    """stop strings and several ends of text"""
    model, tokenizer = model_of(export), tokenizer_of(export)
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    whole = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, start:]
    third = int(whole[2])
    first = whole.tolist().index(third)
    ended = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=[third, 0])[0, start:]
    assert ended.tolist() == whole[: first + 1].tolist()
    word = tokenizer.decode(whole[2:3])
    stopped = model.generate(**inputs, max_new_tokens=12, do_sample=False, stop_strings=[word], tokenizer=tokenizer)
    assert word in tokenizer.decode(stopped[0, start:]) and stopped.shape[1] - start <= first + 1


def turns(export: Path, tmp: Path) -> None:
    """a second turn that goes on from the cache of the first: as all tokens at once"""
    model, ids = model_of(export), some_ids(1)
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    first = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **options)
    cache = getattr(first, "cache", None)
    cache = first.past_key_values if cache is None else cache
    more = torch.cat([first.sequences, some_ids(1, 7, seed=1)], dim=1)
    mask = torch.ones_like(more)
    second = model.generate(more, attention_mask=mask, past_key_values=cache, **options)
    assert torch.equal(second, model.generate(more, attention_mask=mask, **options))


def embeddings_in(export: Path, tmp: Path) -> None:
    """generate from inputs_embeds: as from their tokens"""
    model, ids = model_of(export), some_ids(1)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
    found = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options)
    assert torch.equal(found[0, -6:], model.generate(ids, **options)[0, -6:])


def scores_out(export: Path, tmp: Path) -> None:
    """scores and hidden states of each step"""
    model, ids = model_of(export), some_ids(1)
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_logits=True,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    expected = logits_of(model, found.sequences)[0, 23:27]
    torch.testing.assert_close(torch.cat(found.logits), expected, **CLOSE)
    assert len(found.hidden_states) == 4 and len(found.hidden_states[0]) == model.config.num_hidden_layers + 1


def guesses_are_refused(export: Path, tmp: Path) -> None:
    """assisted and prompt lookup decoding: refused in one line, as a state cannot go back"""
    model, ids = model_of(export), some_ids(1)
    for choice in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
        try:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, **choice)
        except (ValueError, NotImplementedError):
            continue
        raise AssertionError(f"{choice} was taken")


USES = (
    greedy,
    batches,
    right_padding,
    sampling,
    beams,
    streaming,
    text_pipeline,
    stop_strings,
    turns,
    embeddings_in,
    scores_out,
    guesses_are_refused,
)
