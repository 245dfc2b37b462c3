"""What was measured, that predictions of time start from. Each row names its source; nothing else of preflight has numbers of speed."""

from dataclasses import dataclass

LOOP = "whole steps of `based train` on H100 80GB SXM, torch 2.11, medians of steps 6 to 16"


@dataclass(frozen=True)
class Rate:
    """Tokens per second of whole training steps on one GPU, at 2048 tokens a sequence."""

    config: str
    parameters: int
    micro_batch: int
    accumulation: int
    tokens_per_second: float
    mfu: float
    source: str


RATES = (
    Rate("based-360m", 362_620_928, 16, 1, 195_100, 0.434, LOOP),
    Rate("based-1b", 1_349_453_056, 8, 4, 60_600, 0.50, LOOP),
)
GPU = "H100"
"""The GPU of the rates; others are taken to reach the same share of their peak."""

TENSOR_SECONDS_PER_ELEMENT = 0.103 / (36 * 16_384 * 1792 * 0.5)
"""Exposed seconds for each layer, token, channel and (t - 1) / t of t tensor parallel ranks: based-1b, 8 x 2048, TP 2 took 249 ms,
of which 146 are those of the arithmetic."""
PIPELINE_SHARE = 82 / 89
"""What messages leave of a pipeline's time beyond its bubble: based-1b, PP 2, 1F1B, 4 x 8."""
CONTEXT_SHARE = 0.94
"""Share of the time of ranks that share nothing: based-1b, CP 2, 16,384 tokens a rank."""
HOST_SECONDS_OF_A_LAYER, HOST_SECONDS_OF_A_SLICED_LAYER = 0.096 / 36, 0.152 / 36
"""Forward and backward of a micro batch take no less, however few its tokens: the host launches kernels. based-1b, 2048 tokens a rank,
alone and with sequences shared by two ranks (benchmarks/results/h100-two-ranks.json)."""
ZERO_SHARES = {1: 1.0, 2: 100_400 / 107_500, 3: 84_400 / 107_500}
"""Tokens per second of ZeRO stages, relative to stage 1: based-1b on two GPUs."""
HIDDEN_SHARE = 0.9
"""Share of a pass that can hide what ZeRO sends: assumed, not measured."""
RECOMPUTE_SHARES = {"none": 1.0, "mixer": 6 / 7, "full": 3 / 4}
"""By arithmetic, not measured: a forward of all (full) or of about half (mixer) of a block is done again."""

NODE_BYTES_PER_SECOND = 400e9
"""Bus bandwidth of a large all-reduce inside a node (NVLink)."""
NETWORK_BYTES_PER_SECOND = 280e9
"""Rate of a node with eight 400 Gb/s adapters, at 70 % of their sum: assumed, not measured."""

SAVE_BYTES_PER_SECOND = 16.2e9 / 13.4
"""One rank that writes a save in the background to a local disk: based-1b (benchmarks/results/h100-saves.json). A save that training
waits for took 20.4 s."""
FILE_SYSTEM_BYTES_PER_SECOND = 10e9
"""Rate of all ranks together on a shared file system: assumed, not measured."""
