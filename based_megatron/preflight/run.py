"""What `based preflight` does once its options are read."""

from collections.abc import Sequence

from based_megatron.config import Config
from based_megatron.launchers.script import SlurmOptions, render_sbatch
from based_megatron.preflight.checks import data_refusals, disk_refusals, kept_bytes, layout_refusals
from based_megatron.preflight.cli import PreflightOptions
from based_megatron.preflight.gpus import gpu_named
from based_megatron.preflight.layouts import fits, propose
from based_megatron.preflight.memory import worst_rank
from based_megatron.preflight.report import memory_lines, proposal_lines, refusal_lines, time_lines
from based_megatron.preflight.time import run_time


def preflight(options: PreflightOptions, config: Config, command: Sequence[str]) -> bool:
    """Print what there is to say; returns whether `command` can start on these nodes."""
    nodes, gpus, gpu = options.nodes, options.gpus_per_node, gpu_named(options.gpu)
    ranks = nodes * gpus
    refusals, lines, has_room = layout_refusals(config, ranks), [], False
    if not refusals:
        memory, time = worst_rank(config, ranks), run_time(config, nodes, gpus, gpu)
        has_room = fits(memory, gpu)
        lines = memory_lines(memory, gpu, gpus) + time_lines(time, ranks, kept_bytes(config, time.save_bytes))
        refusals += disk_refusals(config, time.save_bytes)
    refusals += data_refusals(config, options.read_shards)
    lines = refusal_lines(refusals) + lines
    if not has_room:
        lines += proposal_lines(propose(config, nodes, gpus, gpu))
    print("\n".join(lines))
    runs = has_room and not refusals
    if runs and options.sbatch:
        print(render_sbatch(SlurmOptions(nodes=nodes, gpus_per_node=gpus), command, config), end="")
    return runs
