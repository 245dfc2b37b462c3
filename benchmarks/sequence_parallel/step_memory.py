"""Train steps of a model on one long random sequence that ranks share, and report each rank's memory and the losses.

    torchrun --nproc-per-node 4 -m benchmarks.sequence_parallel.step_memory --tokens 1048576 --steps 2 [--config tiny] [--vocab 512]

On a CPU over gloo. Memory is the growth of the process's peak (RSS) over what it had before the first step: activations, gradients,
optimizer state. Recomputes whole blocks if asked to. Prints one line of JSON.
"""

import argparse
import dataclasses
import json
import resource
import time

import torch
import torch.distributed as dist

from based_megatron.config import load_config
from based_megatron.data.batch import MicroBatch
from based_megatron.model.build import build_model
from based_megatron.parallel.environment import rank_from_environment
from based_megatron.parallel.sequence.slices import even_bounds, slice_of
from based_megatron.parallel.topology import build_topology, join, leave, pick_device
from based_megatron.train.optimizer import build_engine, set_learning_rate
from based_megatron.train.step import build_step


def main() -> None:
    """Build, step, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768, help="of the whole sequence")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--recompute", choices=["none", "mixer", "full"], default="none")
    arguments = parser.parse_args()
    rank = rank_from_environment()
    torch.set_num_threads(1)
    device = pick_device("cpu", rank.local_rank)
    join(rank, device, timeout_seconds=1800)
    config = load_config(arguments.config)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=arguments.vocab),
        parallel=dataclasses.replace(config.parallel, context=rank.world_size),
        train=dataclasses.replace(config.train, precision="fp32", recompute=arguments.recompute),
    )
    topology = build_topology(config.parallel, device, rank.node_ranks)
    chunks = build_model(config, topology)
    engine = build_engine(chunks, config, topology)
    step = build_step(chunks, engine, topology, config.parallel.zero_stage)

    bounds = even_bounds(arguments.tokens, rank.world_size)
    here = slice_of(bounds, topology.context.rank)
    tokens = torch.randint(0, arguments.vocab, (1, arguments.tokens + 1), generator=torch.Generator().manual_seed(1))
    inputs, labels = (x[:, here].contiguous() for x in (tokens[:, :-1], tokens[:, 1:]))
    batch = MicroBatch(inputs, labels, torch.ones(inputs.shape), None, bounds)
    before, began, losses = peak_bytes(), time.perf_counter(), []
    for _ in range(arguments.steps):
        set_learning_rate(engine, 1e-3)
        losses.append(float(step.accumulate([batch]).mean))
        step.update()
    grown: list[int] = [0] * rank.world_size
    dist.all_gather_object(grown, peak_bytes() - before)
    if topology.is_logger:
        report = {
            "tokens": arguments.tokens,
            "ranks": rank.world_size,
            "recompute": arguments.recompute,
            "mebibytes_per_rank": [round(x / 2**20) for x in grown],
            "losses": losses,
            "seconds_per_step": round((time.perf_counter() - began) / arguments.steps, 1),
        }
        print(json.dumps(report), flush=True)
    leave()


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
