"""The page that `based preflight` prints."""

from collections.abc import Sequence

from based_megatron.preflight.gpus import GIB, Gpu
from based_megatron.preflight.layouts import MARGIN, Layout, fits
from based_megatron.preflight.memory import RankMemory
from based_megatron.preflight.time import RunTime

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "states", "buffers", "outside")
LABELS = {"outside": "CUDA, NCCL"}
DAY_SECONDS = 86_400


def memory_lines(memory: RankMemory, gpu: Gpu, gpus_per_node: int) -> list[str]:
    """Parts and sum of the fullest rank, and what its host needs."""
    lines = [f"  {LABELS.get(part, part):12} {getattr(memory, part) / GIB:8.2f} GiB" for part in PARTS]
    verdict = "fits" if fits(memory, gpu) else "DOES NOT FIT"
    limit = MARGIN * gpu.memory_bytes / GIB
    return [
        "memory of the fullest rank at the peak of a step",
        *lines,
        f"  {'sum':12} {memory.total / GIB:8.2f} GiB: {verdict} into {limit:.1f} GiB ({100 * MARGIN:.0f} % of {gpu.name})",
        f"  {'on the host':12} {memory.host_checkpoint / GIB:8.2f} GiB a rank, {gpus_per_node * memory.host_checkpoint / GIB:.1f} GiB a "
        f"node: the copy that a save writes while training goes on",
    ]


def time_lines(time: RunTime, gpus: int, kept_bytes: int) -> list[str]:
    """Rates, durations, saves, and what they assume."""
    return [
        f"time of {time.tokens / 1e9:.2f} G tokens on {gpus} GPU{'s' if gpus > 1 else ''}",
        f"  {time.tokens_per_second:,.0f} tokens/s, MFU {100 * time.mfu:.1f} %, {time.step_seconds:.3f} s a step",
        f"  {time.total_seconds / DAY_SECONDS:.2f} days, {time.gpu_hours:,.0f} GPU hours, saves and validation included",
        f"  a save: {time.save_bytes / GIB:.1f} GiB, {time.save_seconds:.0f} s, of which training waits {time.save_wait_seconds:.0f} s; "
        f"kept at most: {kept_bytes / GIB:.1f} GiB",
        "assumed",
        *(f"  - {line}" for line in time.assumptions),
    ]


def refusal_lines(refusals: Sequence[str]) -> list[str]:
    """One line each."""
    return ["refused", *(f"  - {' '.join(line.split())}" for line in refusals)] if refusals else []


def proposal_lines(layouts: Sequence[Layout]) -> list[str]:
    """Changes, memory and speed of each."""
    if not layouts:
        return ["no layout fits: use more GPUs, GPUs with more memory, a shorter sequence or a smaller model"]
    lines = ["layouts that run and fit, fastest first"]
    for layout in layouts:
        words = " ".join(f"--{key} {value}" for key, value in layout.changes.items()) or "(as given)"
        time = layout.time
        lines += [
            f"  {words}",
            f"      {layout.memory.total / GIB:.1f} GiB, {time.tokens_per_second:,.0f} tokens/s, MFU {100 * time.mfu:.1f} %, "
            f"{time.total_seconds / DAY_SECONDS:.2f} days",
        ]
        if "train.global_batch_sequences" in layout.changes:
            lines.append("      another batch for as many tokens: optimizer.lr and schedule are yours to adapt")
    return lines
