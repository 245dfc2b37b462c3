"""`based bench train`: forward and backward of a micro batch on one device, against a transformer of that size.

Legend: B sequences, L tokens of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from based_megatron.bench.keys import Baseline, Operation, Passes, Quantity, Sizes
from based_megatron.bench.models import (
    based_model,
    llama,
    model_config,
    one_rank,
    parameters_in_billions,
    preset_name,
    with_backend,
)
from based_megatron.bench.report import Case, Check, Row, Target, relative_error
from based_megatron.bench.timing import Bench, attempt
from based_megatron.model.based_model import BasedModel
from based_megatron.monitor.flops import peak_flops, training_flops_per_token
from based_megatron.parallel.sequence.plan import whole_sequence
from based_megatron.parallel.topology import Topology

TARGET_TOKENS_PER_SECOND = 60_000.0
GIB = 2**30


def cases(bench: Bench) -> list[Case]:
    """The cases of `based bench train`."""
    return [Case("training step, forward + backward", lambda: training_step(bench))]


def training_step(bench: Bench) -> Row:
    """Tokens per second of forward + backward, without the optimizer and without communication."""
    B, L = bench.size(8, 1), bench.size(2048, 16)
    with one_rank(bench) as topology:
        model = based_model(bench, topology)
        checks = agreement(bench, model, topology)
        tokens_per_second, peak_gib = measure(bench, model, step_of(bench, model, topology, B, L), B * L)
        size = parameters_in_billions(model)
        del model
    rates = {Quantity.PEAK_GIB: peak_gib} if peak_gib else {}
    peak = peak_flops(torch.cuda.get_device_name(bench.device)) if bench.device.type == "cuda" else None
    if peak:
        flops_per_token = training_flops_per_token(model_config(bench), L)
        rates[Quantity.MFU_PERCENT] = 100 * tokens_per_second * flops_per_token / peak
    return Row(
        Operation.TRAINING_STEP,
        tokens_per_second,
        Quantity.TOKENS_PER_SECOND,
        Passes.BOTH,
        Sizes(batch=B, tokens=L),
        preset_name(bench),
        target=None if bench.quick else Target("at least", TARGET_TOKENS_PER_SECOND),
        baselines={
            Baseline.LLAMA: transformer(bench, B, L, compiled=False),
            Baseline.LLAMA_COMPILED: transformer(bench, B, L, compiled=True),
        },
        checks=checks,
        rates=rates,
        note=f"{size:.3f} G parameters; baseline: Hugging Face Llama, SDPA"
        + ("" if bench.quick else ", 1.420 G parameters"),
    )


def step_of(bench: Bench, model: BasedModel, topology: Topology, B: int, L: int) -> Callable[[], Tensor]:
    """A call that runs forward and backward on random tokens, one document a sequence, and returns the mean loss."""
    tokens_BL = torch.randint(0, model.config.model.vocab_size, (B, L + 1), device=bench.device)
    plan = whole_sequence(None, L, topology.device)
    inputs_BL, labels_BL = tokens_BL[:, :-1].contiguous(), tokens_BL[:, 1:].contiguous()

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(inputs_BL, plan, labels_BL).mean()
        loss.backward()
        return loss.detach()

    return step


def agreement(bench: Bench, model: BasedModel, topology: Topology) -> dict[str, Check]:
    """Errors of loss and gradients of a small batch against the reference backend in a wider dtype, with the same weights.

    bf16 rounds at each of 36 layers, so gradients err by some percent in any implementation. The limit is what the reference
    backend errs in the same dtype, and a half more.
    """
    wider = torch.float32 if bench.dtype == torch.bfloat16 else torch.float64
    exact_model = based_model(dataclasses.replace(bench, dtype=wider, backend="reference"), topology)
    with torch.no_grad():
        for exact_parameter, parameter in zip(exact_model.parameters(), model.parameters(), strict=True):
            exact_parameter.copy_(parameter)
    exact = outcome(bench, exact_model, topology)
    del exact_model
    plain = outcome(bench, with_backend(model, "reference"), topology)
    found = outcome(bench, with_backend(model, bench.backend), topology)
    small = 1e-3 if bench.dtype == torch.bfloat16 else 1e-5
    return {
        name: Check(relative_error(found[name], x), max(1.5 * relative_error(plain[name], x), small))
        for name, x in exact.items()
    }


def outcome(bench: Bench, model: BasedModel, topology: Topology) -> dict[str, Tensor]:
    """Loss and some gradients of one step, whose tokens are those of the seed."""
    torch.manual_seed(bench.seed)
    names = {"embedding.weight", "layers.0.mlp.fc1.weight", "layers.1.mixer.qkv.weight", "final_norm.weight"}
    loss = step_of(bench, model, topology, 1, bench.size(512, 16))()
    gradients = {
        f"d {name}": parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if name in names and parameter.grad is not None
    }
    return {"loss": loss, **gradients}


def transformer(bench: Bench, B: int, L: int, compiled: bool) -> float | str:
    """Tokens per second of the same step of a Hugging Face Llama, or why there are none.

    compiled: layer and loss each, not the model as one graph: all layers share one compilation, of seconds.
    """
    if compiled and bench.quick:
        return "not in a quick run"

    def tokens_per_second() -> float:
        model = llama(bench)
        if compiled:
            for layer in model.model.layers:
                layer.compile(dynamic=False)
            model.loss_function = torch.compile(model.loss_function, dynamic=False)
        tokens_BL = torch.randint(0, model.config.vocab_size, (B, L), device=bench.device)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            model(input_ids=tokens_BL, labels=tokens_BL, use_cache=False).loss.backward()

        return measure(bench, model, step, B * L)[0]

    return attempt(tokens_per_second)


def measure(bench: Bench, model: nn.Module, step: Callable[[], object], tokens: int) -> tuple[float, float]:
    """(tokens per second, GiB at the peak or 0 on a CPU)."""
    on_gpu = bench.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    timing = bench.time(step, graph=False, budget_ms=3000.0)
    model.zero_grad(set_to_none=True)
    return 1e3 * tokens / timing.ms, torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0
