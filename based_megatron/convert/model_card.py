"""README.md of an export: what the model is, how to use it, and what was measured on this very export."""

from collections import Counter

import torch
import transformers

from based_megatron.config.schema import ModelConfig
from based_megatron.convert.origin import Origin
from based_megatron.convert.proof import Proof
from based_megatron.model.mixers import layer_mixers

TEMPLATE = """\
---
{license}library_name: transformers
pipeline_tag: text-generation
tags:
- based
- linear-attention
---

# Based, {parameters:,} parameters

A causal language model of the [Based](https://arxiv.org/abs/2402.18668) architecture, trained with `based_megatron`.
It decodes with a state of constant size: {state_bytes:,} bytes for a sequence in float32, whatever its length{growth}.

| | |
|---|---|
| layers | {layers} ({mixers}), pattern `{pattern}` |
| hidden size | {hidden_size} |
| MLP width | {ffn_hidden_size} |
| heads | {num_heads} |
| feature dim of linear attention | {feature_dim} |
| weights of linear attention | {weights} |
| first tokens that all tokens see in linear attention | {prefix_tokens} |
| previous keys in a window | {window_left} |
| vocabulary | {vocab_size} tokens in {rows} embedding rows; the rows above are free for new tokens |

## Training

{training}

## Use

The modeling files in this folder need torch and transformers 5.17 to 5.24; newer ones are untested. {tokenizer}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(PATH, trust_remote_code=True)
inputs = tokenizer(["The"], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=64)))
```

Batches of prompts of different lengths are padded on the left. Right padding is fine for a single forward pass only.

## Checks

Weights are stored in {dtype}. Measured on this export when it was written: reloaded with `AutoModelForCausalLM`, on a CPU in float32,
with a batch of two random sequences of {prompt_tokens} tokens. Differences are the largest over all logits, where the largest logit was
{scale:.3g}.

| check | result |
|---|---|
| weights equal to those of the checkpoint{rounded}, bit for bit | {tensors} of {tensors} tensors |
| logits of the reloaded model against the model in memory | {reload_difference:.2g} |
| prefill in two chunks and single steps against one forward pass | {cache_difference:.2g} |
| a left-padded row in a batch against the row alone | {padding_difference:.2g} |
| greedy generation with the cache against without | {generated_tokens} of {generated_tokens} tokens equal |
{dtype_row}
`based verify-export` or `sha256sum --check SHA256SUMS` compares the files with their hashes.

Versions: torch {torch_version}, transformers {transformers_version}.
"""

WEIGHTS = {
    "taylor": "1 + s + s²/2",
    "rebased": "s², queries and keys normed, scaled and shifted ([ReBased](https://arxiv.org/abs/2402.10644))",
}
"""Weights of a key whose product with the query is s, by model.feature_map."""


RECALL = {
    "ar_ppl": "perplexity of tokens that the context tells",
    "other_ppl": "perplexity of all other tokens",
}
"""Rows of the card for measures of recall by their names; probes, which are losses, go by their own."""


def model_card(config: ModelConfig, proof: Proof, origin: Origin, has_tokenizer: bool, license: str = "") -> str:
    """The text of README.md."""
    layers = layer_mixers(config)
    mixers = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in Counter(mixer.name for mixer in layers).items())
    dtype = str(proof.dtype).removeprefix("torch.")
    is_rounded = proof.dtype != torch.float32
    return TEMPLATE.format(
        license=f"license: {license}\n" if license else "",
        training=_training(origin),
        dtype=dtype,
        rounded=f" rounded to {dtype}" if is_rounded else "",
        dtype_row=f"| logits of the model in {dtype} against float32 | {proof.dtype_difference:.2g} |\n"
        if is_rounded
        else "",
        parameters=proof.parameters,
        state_bytes=proof.state_bytes,
        growth=""
        if not any("full_attention" in (mixer.hf_name, mixer.hf_cache_layer) for mixer in layers)
        else "; its full attention layers keep all keys and values on top, counted here at "
        f"{proof.prompt_tokens} tokens",
        layers=len(layers),
        mixers=mixers,
        pattern=config.layer_pattern,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_heads=config.num_heads,
        feature_dim=config.feature_dim,
        weights=WEIGHTS[config.feature_map],
        prefix_tokens=config.prefix_tokens,
        window_left=config.window_left,
        vocab_size=config.vocab_size,
        rows=config.embedding_rows,
        tokenizer="The tokenizer is that of the training data."
        if has_tokenizer
        else "No tokenizer was exported: use the one that the training data was made with.",
        prompt_tokens=proof.prompt_tokens,
        scale=proof.logits_scale,
        tensors=proof.tensors,
        reload_difference=proof.reload_difference,
        cache_difference=proof.cache_difference,
        padding_difference=proof.padding_difference,
        generated_tokens=proof.generated_tokens,
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
    )


def _training(origin: Origin) -> str:
    """A table of what is known of the training, or a sentence."""
    if not origin.tokens:
        return "These weights were not trained by the run that they were exported from."
    rows = [("steps", f"{origin.step:,}"), ("tokens", f"{origin.tokens:,}")]
    if origin.sequence_length_tokens is not None:
        rows.append(
            ("tokens of a sequence; longer ones run, but were not trained", f"{origin.sequence_length_tokens:,}")
        )
    if origin.corpora:
        rows.append(("data", ", ".join(origin.corpora)))
    if origin.training_loss is not None:
        rows.append(("training loss of the last step, nats a token", f"{origin.training_loss:.4f}"))
    if origin.validation_loss is not None:
        at = f"validation loss at step {origin.validation_loss.step:,}, nats a token"
        rows.append((at, f"{origin.validation_loss.value:.4f}"))
    rows += [(RECALL.get(name, f"loss of the probe {name}"), f"{value:.4g}") for name, value in origin.recall.items()]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
