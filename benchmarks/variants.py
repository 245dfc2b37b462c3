"""Based, ReBased and JRT in time: one layer of linear attention alone, and whole training steps.

    python -m benchmarks.variants --output benchmarks/results/h100-variants.json     one GPU
    python -m benchmarks.variants --quick --output runs/variants.json                a CPU: all paths, no times to compare

The layer is the mixer with its projections, without the norm and the MLP around it, in bf16; its backward pass gives the gradients of
the input and of all weights. A step trains on random tokens, update included. Prints a line for each and writes them as JSON.

Legend: B sequences, L tokens of each, D hidden size.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from based_megatron.bench.report import device_name
from based_megatron.bench.timing import Bench
from based_megatron.config import Config, ModelConfig, load_config
from based_megatron.kernels.backend import resolve_backend
from based_megatron.model.build import build_model, whole_model
from based_megatron.model.mixers import MixerInputs
from based_megatron.parallel.environment import rank_from_environment
from based_megatron.parallel.sequence.plan import whole_sequence
from based_megatron.parallel.topology import Topology, build_topology, join, leave, pick_device
from based_megatron.train.optimizer import build_engine, set_learning_rate
from based_megatron.train.step import build_step
from benchmarks.saves import RandomBatches

WARMUP_STEPS = 5


@dataclass(frozen=True)
class Case:
    """The sizes that all variants are timed at."""

    preset: str
    sequences: int
    tokens: int
    prefix_tokens: int
    steps: int

    def variants(self) -> dict[str, dict[str, Any]]:
        """Settings of the model, by the name of the variant."""
        return {
            "Based": {},
            "ReBased": {"feature_map": "rebased"},
            "JRT": {"prefix_tokens": self.prefix_tokens},
            "ReBased with JRT": {"feature_map": "rebased", "prefix_tokens": self.prefix_tokens},
        }


FULL, QUICK = Case("based-360m", 16, 2048, 1024, 15), Case("tiny", 1, 48, 16, WARMUP_STEPS + 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Time every variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="tiny sizes on a CPU")
    options = parser.parse_args(argv)
    case = QUICK if options.quick else FULL
    rank = rank_from_environment()
    device = pick_device("auto", rank.local_rank)
    join(rank, device, timeout_seconds=600)
    config = config_of(case)
    topology = build_topology(config.parallel, device)
    bench = Bench(device, torch.bfloat16, resolve_backend("auto", device), options.quick)
    rows: dict[str, dict[str, Any]] = {}
    for name, settings in case.variants().items():
        changed = replace(config, model=replace(config.model, **settings))
        forward, both = layer_calls(bench, changed, topology)
        rows[name] = {"forward": asdict(bench.time(forward)), "forward and backward": asdict(bench.time(both))}
        rows[name]["step tokens per second"] = step_tokens_per_second(changed, topology, case.steps)
        print(name, json.dumps(rows[name]), flush=True)
    result = {"device": device_name(device), "torch": torch.__version__, **asdict(case), "rows": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    leave()


def config_of(case: Case) -> Config:
    """A preset with micro batches of these sizes, one a step."""
    config, sequences = load_config(case.preset), case.sequences
    return replace(
        config,
        data=replace(config.data, sequence_length_tokens=case.tokens, isolate_documents=False),
        train=replace(config.train, micro_batch_sequences=sequences, global_batch_sequences=sequences),
    )


def layer_calls(
    bench: Bench, config: Config, topology: Topology
) -> tuple[Callable[[], Tensor], Callable[[], tuple[Tensor, ...]]]:
    """The forward pass of a mixer with random weights, and both passes."""
    tokens, sequences, model = config.data.sequence_length_tokens, config.train.micro_batch_sequences, config.model
    mixer = mixer_of(bench, model, topology)
    x_LBD = bench.random(tokens, sequences, model.hidden_size).requires_grad_()
    inputs, cotangent_LBD = MixerInputs(whole_sequence(None, tokens, topology.device), None), torch.ones_like(x_LBD)
    leaves = [x_LBD, *mixer.parameters()]

    def forward() -> Tensor:
        return mixer(x_LBD, inputs=inputs)[0]

    return forward, lambda: torch.autograd.grad(forward(), leaves, cotangent_LBD)


def mixer_of(bench: Bench, model: ModelConfig, topology: Topology) -> torch.nn.Module:
    """The linear attention of a layer."""
    built: Any = whole_model(replace(model, layer_pattern="L"), topology, bench.dtype, bench.backend)
    mixer: torch.nn.Module = built.layers["0"].mixer
    for name, parameter in mixer.named_parameters():
        parameter.data.copy_(bench.random(*parameter.shape, scale=model.init_std) + float("norm.weight" in name))
    return mixer


def step_tokens_per_second(config: Config, topology: Topology, steps: int) -> float:
    """Tokens of a step over the median of the seconds of all steps but the first ones."""
    chunks = build_model(config, topology)
    engine = build_engine(chunks, config, topology)
    step = build_step(chunks, engine, topology, config.parallel.zero_stage)
    batches = RandomBatches(config, topology).micro_batches(0)
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        set_learning_rate(engine, 1e-6)
        step.accumulate(batches)
        step.update()
        if topology.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return batches[0].tokens_BL.numel() / median(seconds[WARMUP_STEPS:])


if __name__ == "__main__":
    main()
