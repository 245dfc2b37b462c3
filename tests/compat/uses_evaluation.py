"""Evaluating an export. Each function is one use: its docstring says in the table what was tried."""

from pathlib import Path

import torch
from opened import TEXTS, logits_of, model_of, tokenizer_of


def lm_eval(export: Path, tmp: Path) -> None:
    """lm-eval's HFLM: log-likelihoods of continuations, and generation until a string"""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=str(export), trust_remote_code=True, device="cpu", batch_size=3, dtype="float32")
    model, tokenizer = model_of(export), tokenizer_of(export)
    pairs = [(text, " and the rest") for text in TEXTS]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    for (context, rest), (found, _) in zip(pairs, harness.loglikelihood(requests, disable_tqdm=True), strict=True):
        ids = torch.tensor([tokenizer(context + rest)["input_ids"]])
        start = len(tokenizer(context)["input_ids"])
        logs = logits_of(model, ids).log_softmax(-1)[0, start - 1 : -1]
        expected = logs.gather(1, ids[0, start:, None]).sum().item()
        assert abs(found - expected) < 1e-2, (found, expected)
    options = {"until": ["zzz"], "max_gen_toks": 5, "do_sample": False}
    asked = [Instance("generate_until", {}, (text, options), number) for number, text in enumerate(TEXTS)]
    texts = harness.generate_until(asked, disable_tqdm=True)
    assert len(texts) == len(TEXTS) and any(texts)


USES = (lm_eval,)
