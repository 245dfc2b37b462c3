"""`based bench prefill`: a prompt of 4096 tokens, from tokens to states and the last logits, against a transformer.

Legend: B sequences, L prompt tokens.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from based_megatron.bench.decode import agreement
from based_megatron.bench.keys import Baseline, Method, Operation, Quantity, Sizes
from based_megatron.bench.models import based_model, llama, one_rank, parameters_in_billions, preset_name
from based_megatron.bench.report import Case, Row, Target
from based_megatron.bench.timing import Bench, Call, Timing, attempt
from based_megatron.inference.engine import Engine, PromptGraph

TARGET_SPEEDUP = 1.6
BUDGET_MS = 1500.0


def cases(bench: Bench) -> list[Case]:
    """The cases of `based bench prefill`."""
    return [Case("prefill", functools.partial(prefill_rows, bench, (2,) if bench.quick else (1, 4, 16)))]


def prefill_rows(bench: Bench, batches: tuple[int, ...]) -> list[Row]:
    """Milliseconds of a prompt, ours and the transformer's in one run."""
    L = bench.size(4096, 48)
    with one_rank(bench) as topology:
        model = based_model(bench, topology)
        checks = agreement(bench, model, topology, [bench.size(512, 20)])
        size = parameters_in_billions(model)
        times = [_ours(bench, Engine(model), B, L) for B in batches]
        del model
    rows = []
    for B, timing, baseline in zip(batches, times, transformer(bench, batches, L), strict=True):
        row = Row(
            Operation.PREFILL,
            timing.ms,
            sizes=Sizes(batch=B, prompt_tokens=L),
            model=preset_name(bench),
            method=timing.method,
            baselines={Baseline.LLAMA: baseline},
            checks=checks,
            rates={Quantity.TOKENS_PER_SECOND: 1e3 * B * L / timing.ms},
            note=f"{size:.3f} G parameters, logits of the last token; baseline: Hugging Face Llama, SDPA",
        )
        if isinstance(baseline, Timing) and not bench.quick:
            row = dataclasses.replace(
                row,
                target=Target("at most", baseline.ms / TARGET_SPEEDUP),
                rates={**row.rates, Quantity.LLAMA_RATIO: baseline.ms / timing.ms},
            )
        rows.append(row)
    return rows


def _ours(bench: Bench, engine: Engine, B: int, L: int) -> Timing:
    tokens_BL = torch.randint(0, engine.model.config.model.vocab_size, (B, L), device=bench.device)
    prompts = PromptGraph(engine, B, L)
    timing = bench.time(functools.partial(prompts.run, tokens_BL), graph=False, budget_ms=BUDGET_MS)
    return dataclasses.replace(timing, method=Method.GRAPH) if bench.device.type == "cuda" else timing


def transformer(bench: Bench, batches: tuple[int, ...], L: int) -> list[Timing | str]:
    """Times in which a Hugging Face Llama fills its cache and computes the last logits, or why there are none."""
    model = attempt(lambda: llama(bench))
    if isinstance(model, str):
        return [model] * len(batches)

    def prompts(B: int) -> Call:
        tokens_BL = torch.zeros(B, L, dtype=torch.int64, device=bench.device)

        @torch.no_grad()
        def call() -> None:
            model(input_ids=tokens_BL, use_cache=True, logits_to_keep=1)

        return call

    return [bench.baseline(functools.partial(prompts, B), budget_ms=BUDGET_MS) for B in batches]
