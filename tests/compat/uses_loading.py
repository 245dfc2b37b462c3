"""Loading, saving, changing an export. Each function is one use: its docstring says in the table what was tried."""

import copy
import math
from pathlib import Path

import torch
from opened import CLOSE, logits_of, model_of, some_ids, tokenizer_of
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM


def load(export: Path, tmp: Path) -> None:
    """load with AutoModelForCausalLM; the loss is that of the logits"""
    model, ids = model_of(export), some_ids()
    logits = logits_of(model, ids)
    by_hand = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=ids).loss, by_hand, **CLOSE)


def base_model(export: Path, tmp: Path) -> None:
    """load with AutoModel: hidden states that the output projection makes logits of"""
    base, whole, ids = AutoModel.from_pretrained(export, trust_remote_code=True).eval(), model_of(export), some_ids()
    hidden = base(ids).last_hidden_state
    torch.testing.assert_close(whole.lm_head(hidden), logits_of(whole, ids), **CLOSE)


def save_and_reload(export: Path, tmp: Path) -> None:
    """save_pretrained, in one file and in shards, and load again: equal bits"""
    model = model_of(export)
    for size in ("5GB", "20KB"):
        model.save_pretrained(tmp / size, max_shard_size=size)
        again = model_of(tmp / size).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    assert len(list((tmp / "20KB").glob("*.safetensors"))) > 1


def dtypes(export: Path, tmp: Path) -> None:
    """dtype bfloat16, float16, float64, auto: logits near those of float32"""
    expected = logits_of(model_of(export), some_ids())
    for dtype in (torch.bfloat16, torch.float16, torch.float64, "auto"):
        model = model_of(export, dtype=dtype)
        assert model.dtype == (torch.float32 if dtype == "auto" else dtype)
        assert (logits_of(model, some_ids()) - expected).abs().max() < 0.05 * max(1.0, expected.abs().max())


def device_map(export: Path, tmp: Path) -> None:
    """device_map cpu and auto (accelerate)"""
    import accelerate  # noqa: F401  asked for by transformers

    expected = logits_of(model_of(export), some_ids())
    for place in ("cpu", "auto"):
        torch.testing.assert_close(logits_of(model_of(export, device_map=place), some_ids()), expected, **CLOSE)


def new_model_of_the_config(export: Path, tmp: Path) -> None:
    """a new model of the config: its loss is that of chance"""
    config = AutoConfig.from_pretrained(export, trust_remote_code=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    loss = model(some_ids(), labels=some_ids()).loss.item()
    assert abs(loss - math.log(config.vocab_size)) < 0.5


def deep_copy(export: Path, tmp: Path) -> None:
    """copy.deepcopy, torch.save and torch.load of the state dict"""
    model = model_of(export)
    other = copy.deepcopy(model)
    torch.save(model.state_dict(), tmp / "weights.pt")
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert model.lm_head.weight.any(), "a copy has weights of its own"
    other.load_state_dict(torch.load(tmp / "weights.pt"))
    assert torch.equal(logits_of(other, some_ids()), logits_of(model, some_ids()))


def added_tokens(export: Path, tmp: Path) -> None:
    """add tokens, resize the embedding, save, load: they can be generated"""
    model, tokenizer = model_of(export), tokenizer_of(export)
    assert tokenizer.add_tokens([f"<new-{n}>" for n in range(40)]) == 40
    model.resize_token_embeddings(len(tokenizer))
    new = len(tokenizer) - 1
    with torch.no_grad():  # a row that any hidden state points to, one way or the other
        hidden = model.model(some_ids(1)).last_hidden_state[0, -1]
        model.lm_head.weight[new] = 100 * hidden
    model.save_pretrained(tmp / "more")
    tokenizer.save_pretrained(tmp / "more")
    again = model_of(tmp / "more")
    generated = again.generate(
        some_ids(1), max_new_tokens=1, do_sample=False, attention_mask=torch.ones_like(some_ids(1))
    )
    assert generated[0, -1] == new and tokenizer_of(tmp / "more").decode([new]) == "<new-39>"


USES = (load, base_model, save_and_reload, dtypes, device_map, new_model_of_the_config, deep_copy, added_tokens)
