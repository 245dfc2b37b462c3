"""Time forward and backward of a model whose sequence is shared by all ranks, and of ranks that have sequences of their own.

    torchrun --nproc-per-node 2 -m benchmarks.sequence_parallel.step_time OUTPUT.json [--config based-1b] [--tokens 4096 16384]

Both have as many tokens on each rank, so that the difference is what crossing slices costs: states, halos, and waiting. Gradients are
not reduced over ranks. Prints a table in Markdown and writes the medians.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from based_megatron.config import load_config
from based_megatron.model.based_model import BasedModel
from based_megatron.model.build import build_model
from based_megatron.parallel.environment import rank_from_environment
from based_megatron.parallel.sequence.plan import SequencePlan, whole_sequence
from based_megatron.parallel.sequence.slices import even_bounds
from based_megatron.parallel.topology import Topology, build_topology, join, leave, pick_device


def main() -> None:
    """All lengths, both ways, in one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--config", default="based-1b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="on each rank")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    rank = rank_from_environment()
    device = pick_device("auto", rank.local_rank)
    join(rank, device, timeout_seconds=120)
    config = load_config(arguments.config)
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, context=rank.world_size))
    topology = build_topology(config.parallel, device, rank.node_ranks)
    (model,) = build_model(config, topology)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows = []
    for tokens in arguments.tokens:
        ways = {
            "apart": whole_sequence(None, tokens, device),
            "shared": SequencePlan(
                topology.sequence, even_bounds(tokens * rank.world_size, rank.world_size), None, device
            ),
        }
        row = {
            "tokens_per_rank": tokens,
            **{way: step_ms(model, plan, topology, arguments.repeats) for way, plan in ways.items()},
        }
        rows.append(row)
        if topology.is_logger:
            print(
                f"| {tokens} | {row['apart']:.1f} | {row['shared']:.1f} | {row['shared'] / row['apart']:.3f} |",
                flush=True,
            )
    if topology.is_logger:
        facts = {"device": name, "ranks": rank.world_size, "config": arguments.config, "torch": torch.__version__}
        arguments.output.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    leave()


def step_ms(model: BasedModel, plan: SequencePlan, topology: Topology, repeats: int) -> float:
    """Median milliseconds of forward and backward, of the slowest rank, after warm-up."""
    vocab = model.config.model.vocab_size
    tokens = torch.randint(0, vocab, (1, plan.length + 1), device=topology.device)
    times = []
    for _ in range(repeats + 3):
        model.zero_grad(set_to_none=True)
        dist.barrier()
        _finish(topology)
        began = time.perf_counter()
        fresh = dataclasses.replace(plan, kept={})
        model(tokens[:, :-1].contiguous(), fresh, tokens[:, 1:].contiguous()).mean().backward()
        _finish(topology)
        slowest = torch.tensor([1e3 * (time.perf_counter() - began)], device=topology.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        times.append(float(slowest))
    return statistics.median(times[3:])


def _finish(topology: Topology) -> None:
    if topology.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
