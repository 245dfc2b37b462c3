"""Decoders of text: the engine over a run, a checkpoint or an export, with its tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from based_megatron.config import Config, DataConfig, ModelConfig, ParallelConfig
from based_megatron.config.validate import check_tensor_parallel
from based_megatron.convert.huggingface import hf_model
from based_megatron.convert.layout import check_finite, count_parameters
from based_megatron.errors import ConfigError
from based_megatron.inference.attention import AttentionLoop
from based_megatron.inference.device import device_of
from based_megatron.inference.flags import DecodingFlags, Precision
from based_megatron.inference.prefix import load_prefix
from based_megatron.inference.source import check_tokenizer, read_source, state_engine, tokenizer_of
from based_megatron.inference.text import TextDecoder
from based_megatron.model.build import DTYPES
from based_megatron.model.check import check_mixers
from based_megatron.model.mixers import has_states
from based_megatron.parallel.environment import RankInfo, rank_from_environment
from based_megatron.parallel.topology import Topology, build_topology, join, join_alone

GPU_SLOTS, CPU_SLOTS = 128, 8
"""Sequences that are decoded at once where nobody says how many."""
TIMEOUT_SECONDS = 600
"""A rank waits so long for the others, whose tokens are its own."""
SMALL_PARAMETERS = 20_000_000
"""A model of fewer takes one thread: on cores that others use too, two wait for each other longer than they compute."""


@dataclass(frozen=True)
class Placement:
    """Where and how a model is decoded."""

    device: str = ""
    """cpu or cuda; empty for a GPU if there is one."""
    precision: Precision = "auto"
    """Type of weights and activations: auto is bf16 on a GPU and fp32 on a CPU."""
    slots: int = 0
    """Sequences that are decoded at once; 0 for 128 on a GPU and 8 on a CPU."""
    threads: int | None = None
    """Threads of the CPU in this process from now on; 0 picks: one for a small model, whose products are too short to be shared.
    None changes nothing."""
    reproducible: bool = False
    """See `Batcher`."""
    most_requests: int = 0
    """Requests that there will be at most, where that is known: more slots would stay idle."""
    remembered_prompts: int = 0
    """Prompts, those read last, whose states are kept: a prompt that starts with one of them goes on from there."""

    def slots_on(self, device: torch.device) -> int:
        """Slots of the loop."""
        usual = GPU_SLOTS if device.type == "cuda" else CPU_SLOTS
        return self.slots or min(usual, self.most_requests or usual)


def load_decoder(
    path: Path,
    placement: Placement = Placement(),
    *,
    tokenizer: Path | None = None,
    prefix: Path | None = None,
    mixers: str = "",
) -> TextDecoder:
    """A decoder of a run (its newest valid checkpoint), a checkpoint, or an export of ours, none of whose code runs.

    tokenizer: its folder or file; that of the model where it is known. prefix: states that `Prefix.save` has written.
    mixers: modules of mixers that an export has and that are not ours, as in model.mixers.
    The ranks of a job that `based launch` has started share every layer: all make the same calls.
    Raises ConfigError and CheckpointError for what a user can fix, such as weights that are not finite.
    """
    info = rank_from_environment()
    device = device_of(placement.device, info.local_rank)
    source = read_source(path, mixers)
    text = tokenizer_of(source, tokenizer, path)
    check_tokenizer(text, source.model)
    check_finite(source.weights, path)
    if placement.threads is not None and device.type == "cpu":
        torch.set_num_threads(placement.threads or _threads_for(count_parameters(source.model)))
    precision = placement.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    dtype = DTYPES[precision]
    if not has_states(source.model):
        if info.world_size > 1:
            raise ConfigError(
                f"{path} has full attention, which decodes on one rank, not on {info.world_size}: "
                f"start it without based launch"
            )
        if prefix is not None:
            raise ConfigError(
                f"{path} has full attention (model.layer_pattern {source.model.layer_pattern!r}) and no state of constant size: "
                f"leave --prefix out"
            )
        model: Any = hf_model(source.weights, source.model)
        return TextDecoder(AttentionLoop(model.to(device, dtype), len(text)), text, placement.reproducible)
    slots = placement.slots_on(device)
    engine = state_engine(source, _joined(info, device, source.model), dtype, text)
    loop = engine.loop(slots)
    loop.prefixes.remembered = placement.remembered_prompts
    if prefix is not None:
        loop.prefixes.add(load_prefix(prefix, engine.model, engine.model.zero_states(1)))
    return TextDecoder(loop, text, placement.reproducible)


def load_by_flags(
    path: Path, flags: DecodingFlags, *, most_requests: int = 0, remembered_prompts: int = 0
) -> TextDecoder:
    """`load_decoder` as a command line asks for it. most_requests, remembered_prompts: see `Placement`."""
    placement = Placement(
        flags.device, flags.precision, flags.slots, flags.threads, flags.reproducible, most_requests, remembered_prompts
    )
    return load_decoder(path, placement, tokenizer=flags.tokenizer, prefix=flags.prefix, mixers=flags.mixers)


def _joined(info: RankInfo, device: torch.device, model: ModelConfig) -> Topology:
    """The layout of this process: alone, or one of the ranks of a job that share every layer."""
    if info.world_size == 1:
        return join_alone(device)
    parallel = ParallelConfig(tensor=info.world_size, sequence_parallel=False)
    config = Config(model=model, parallel=parallel, data=DataConfig(isolate_documents=False))
    check_tensor_parallel(config)
    check_mixers(config)
    if not dist.is_initialized():
        join(info, device, TIMEOUT_SECONDS)
    return build_topology(parallel, device)


def _threads_for(parameters: int) -> int:
    return 1 if parameters < SMALL_PARAMETERS else torch.get_num_threads()
