"""The proof that an export gives the model that went into it, measured on the export as a user would load it.

Legend: B sequences, T tokens, U vocabulary columns.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from based_megatron.convert.hf_files.modeling_based import CACHE_NAME
from based_megatron.errors import CheckpointError

RELOAD_TOLERANCE = 1e-5
# Decoding step by step and padding sum in another order: float32 rounding, relative to the largest logit.
ORDER_TOLERANCE = 1e-4
MOST_PROMPT_TOKENS = 512
DECODED_TOKENS = 8
GENERATED_TOKENS = 16
PADDING_TOKENS = 5
DTYPE_TOLERANCE = 0.25
"""Running in 16 bits is not exact; this finds what is wrong altogether, relative to the largest logit."""


@dataclass(frozen=True)
class Proof:
    """Measurements of an export. Differences are the largest absolute ones over all logits."""

    tensors: int
    """Tensors that are bit-equal."""
    parameters: int
    prompt_tokens: int
    logits_scale: float
    """Largest absolute logit."""
    reload_difference: float
    """Reloaded model against the one in memory."""
    cache_difference: float
    """Prefill in two chunks and single steps against one forward pass."""
    padding_difference: float
    """A left-padded row in a batch against the row alone."""
    generated_tokens: int
    """Greedy tokens that are equal with and without the cache."""
    state_bytes: int
    """State of one sequence after the prompt."""
    dtype: torch.dtype
    """What the weights are stored in, and loaded in by default."""
    dtype_difference: float
    """The model run in that dtype against the same weights in float32."""


@torch.no_grad()
def prove(folder: Path, model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> Proof:
    """Reload an export with AutoModelForCausalLM and compare it with `model`, in float32, which was saved there as `dtype`.

    Raises CheckpointError for the first comparison that fails.
    """
    reloaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    _compare_weights(reloaded.state_dict(), model.state_dict())
    config = model.config
    length = min(config.sliding_window + 2 * DECODED_TOKENS, MOST_PROMPT_TOKENS)
    # A prefix is that of the first call: rows are longer, the padded one too.
    length = max(length, config.prefix_tokens + 2 * DECODED_TOKENS)
    first = max(length // 2, config.prefix_tokens)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(config.tokenizer_vocab_size, (2, length), generator=generator)

    expected = model(ids_BT, use_cache=False).logits
    scale = expected.abs().max().item()
    full = reloaded(ids_BT, use_cache=False).logits
    reload_difference = _compare("the reloaded model", full, expected, RELOAD_TOLERANCE * max(1.0, scale))

    tolerance = ORDER_TOLERANCE * max(1.0, scale)
    pieces, cache = [], None
    for piece_ids in ids_BT.split([first, length - first - DECODED_TOKENS, *[1] * DECODED_TOKENS], dim=1):
        output = reloaded(piece_ids, cache=cache, use_cache=True)
        pieces.append(output.logits)
        cache = getattr(output, CACHE_NAME)
    assert cache is not None
    cache_difference = _compare("decoding with the cache", torch.cat(pieces, dim=1), full, tolerance)

    padded_BT, mask_BT = ids_BT.clone(), torch.ones_like(ids_BT)
    mask_BT[1, :PADDING_TOKENS] = 0
    padded = reloaded(padded_BT, attention_mask=mask_BT, use_cache=False).logits[1:, PADDING_TOKENS:]
    alone = reloaded(ids_BT[1:, PADDING_TOKENS:], use_cache=False).logits
    padding_difference = _compare("a left-padded row", padded, alone, tolerance)

    _compare_generation(reloaded, ids_BT, tolerance)
    dtype_difference = 0.0 if dtype == torch.float32 else _compare_dtype(folder, dtype, ids_BT, full)
    return Proof(
        tensors=len(model.state_dict()),
        parameters=sum(p.numel() for p in model.parameters()),
        prompt_tokens=length,
        logits_scale=scale,
        reload_difference=reload_difference,
        cache_difference=cache_difference,
        padding_difference=padding_difference,
        generated_tokens=GENERATED_TOKENS,
        state_bytes=cache.state_bytes() // len(ids_BT),
        dtype=dtype,
        dtype_difference=dtype_difference,
    )


def _compare_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    different = [name for name in expected if name not in found or not torch.equal(found[name], expected[name])]
    if different or found.keys() != expected.keys():
        names = different or sorted(found.keys() ^ expected.keys())
        raise CheckpointError(f"the export is not what was saved: {len(names)} tensors differ, such as {names[0]}")


def _compare(what: str, found: Tensor, expected: Tensor, tolerance: float) -> float:
    difference = (found - expected).abs().max().item()
    if not difference <= tolerance:  # not a number fails too
        raise CheckpointError(
            f"the export is wrong: {what} differs by {difference:.2g} in its logits, over {tolerance:.2g}"
        )
    return difference


def _compare_dtype(folder: Path, dtype: torch.dtype, ids_BT: Tensor, full_BTU: Tensor) -> float:
    """The difference of logits between the model as it loads by default, which must be in this dtype, and the one in float32."""
    native = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    if native.dtype != dtype:
        raise CheckpointError(f"the export is wrong: it was saved as {dtype} but loads as {native.dtype}")
    logits_BTU = native(ids_BT, use_cache=False).logits.float()
    tolerance = DTYPE_TOLERANCE * max(1.0, full_BTU.abs().max().item())
    return _compare(f"the model in {dtype}", logits_BTU, full_BTU, tolerance)


def _compare_generation(model: Any, ids_BT: Tensor, tolerance: float) -> None:
    """Greedy tokens must be equal with and without the cache, unless two logits are equal within the tolerance."""
    cached, plain = (
        model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            do_sample=False,
            min_new_tokens=GENERATED_TOKENS,
            max_new_tokens=GENERATED_TOKENS,
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    )
    for with_cache, without in zip(cached, plain, strict=True):
        differing = (with_cache != without).nonzero()
        if len(differing):
            first = int(differing[0])
            logits_U = model(without[None, :first], use_cache=False).logits[0, -1]
            if (logits_U[with_cache[first]] - logits_U[without[first]]).abs() > 2 * tolerance:
                raise CheckpointError(f"the export is wrong: greedy generation with the cache differs at token {first}")
