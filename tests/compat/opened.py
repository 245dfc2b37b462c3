"""The export as anyone opens it, and what uses are compared with. Legend: B batch, T tokens, U vocabulary columns."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

TEXTS = ["the cat sat on the mat", "a dog", "the sun and the moon", "hello", "once upon a time there was", "the end"]
CLOSE = dict(rtol=0.0, atol=1e-4)
"""Float32 sums in another order: logits are about 1."""


def model_of(export: Path, **options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, **options).eval()


def tokenizer_of(export: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(export, trust_remote_code=True)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids_BT: Tensor, **inputs) -> Tensor:
    """Float32 logits [B, T, U] of one plain forward pass."""
    return model(ids_BT, use_cache=False, **inputs).logits.float()


def some_ids(rows: int = 2, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(1, 260, (rows, length), generator=torch.Generator().manual_seed(seed))


def greedy_by_hand(model: PreTrainedModel, ids_1T: Tensor, new_tokens: int) -> Tensor:
    """Greedy decoding that runs the whole sequence again for each token."""
    for _ in range(new_tokens):
        ids_1T = torch.cat([ids_1T, logits_of(model, ids_1T)[:, -1:].argmax(-1)], dim=1)
    return ids_1T
