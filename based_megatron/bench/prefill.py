"""`based bench prefill`: a prompt of 4096 tokens, from tokens to states and the last logits, beside a transformer.

Legend: B sequences, L prompt tokens.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from based_megatron.bench.decode import agreement
from based_megatron.bench.models import based_model, llama, one_rank, parameters_in_billions
from based_megatron.bench.report import Case, Row, Target
from based_megatron.bench.timing import Bench, Call, Timing, attempt
from based_megatron.inference.engine import Engine, PromptGraph

TARGET_SPEEDUP = 1.6
BUDGET_MS = 1500.0


def cases(bench: Bench) -> list[Case]:
    """What `based bench prefill` runs."""
    return [Case("prefill", functools.partial(prefill_rows, bench, (2,) if bench.quick else (1, 4, 16)))]


def prefill_rows(bench: Bench, batches: tuple[int, ...]) -> list[Row]:
    """Milliseconds of a prompt, with the transformer's in the same run."""
    L = bench.size(4096, 48)
    with one_rank(bench) as topology:
        model = based_model(bench, topology)
        checks = agreement(bench, model, topology, [bench.size(512, 20)])
        size = parameters_in_billions(model)
        times = [_ours(bench, Engine(model), B, L) for B in batches]
        del model
    peers = transformer(bench, batches, L)
    rows = []
    for B, timing, peer in zip(batches, times, peers, strict=True):
        row = Row(
            f"prefill {L} tokens",
            f"{'tiny' if bench.quick else 'based-1b'} B{B}",
            timing.ms,
            peers={"Llama": peer},
            checks=checks,
            rates={"tok/s": 1e3 * B * L / timing.ms},
            note=f"{size:.3f} G parameters, logits of the last token, one CUDA graph; peer: Hugging Face Llama, SDPA, by "
            f"{peer.method if isinstance(peer, Timing) else peer}",
        )
        if isinstance(peer, Timing) and not bench.quick:
            target = Target("at most", peer.ms / TARGET_SPEEDUP)
            row = dataclasses.replace(row, target=target, rates={**row.rates, "x Llama": peer.ms / timing.ms})
        rows.append(row)
    return rows


def _ours(bench: Bench, engine: Engine, B: int, L: int) -> Timing:
    tokens_BL = torch.randint(0, engine.model.config.model.vocab_size, (B, L), device=bench.device)
    prompts = PromptGraph(engine, B, L)
    timing = bench.time(functools.partial(prompts.run, tokens_BL), graph=False, budget_ms=BUDGET_MS)
    return dataclasses.replace(timing, method="graph") if bench.device.type == "cuda" else timing


def transformer(bench: Bench, batches: tuple[int, ...], L: int) -> list[Timing | str]:
    """The same of a Hugging Face Llama: it fills its cache and computes the last logits. Or why there is no time."""
    model = attempt(lambda: llama(bench))
    if isinstance(model, str):
        return [model] * len(batches)

    def prompts(B: int) -> Call:
        tokens_BL = torch.zeros(B, L, dtype=torch.int64, device=bench.device)

        @torch.no_grad()
        def call() -> None:
            model(input_ids=tokens_BL, use_cache=True, logits_to_keep=1)

        return call

    return [bench.peer(functools.partial(prompts, B), budget_ms=BUDGET_MS) for B in batches]
