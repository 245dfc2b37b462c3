"""Everything that a start is refused for before its ranks join: needs no GPU and writes nothing."""

from pathlib import Path

import psutil
import torch

from based_megatron.checkpoint.manifest import MANIFEST
from based_megatron.checkpoint.store import FOLDER, list_checkpoints
from based_megatron.config import CheckpointConfig, Config
from based_megatron.config.validate import check_run_dir, data_parallel_size, validate, validated_sequences
from based_megatron.data.manifest import check_tokenizer
from based_megatron.data.sources import Sources
from based_megatron.errors import ConfigError
from based_megatron.model.build import DTYPES
from based_megatron.model.check import check_mixers
from based_megatron.model.mixers import layer_mixers
from based_megatron.monitor.flops import parameter_count
from based_megatron.monitor.sinks.build import check_trackers
from based_megatron.run_folder.check import check_contents
from based_megatron.train.carried import carried_bytes

CHECKPOINT_BYTES_PER_PARAMETER = 12  # fp32 weights and two moments
FP8_CAPABILITY = (9, 0)  # Hopper
LARGEST_DEVICE_BYTES = 2**40
"""No accelerator has more memory: what needs more is refused even where the device is not known."""


def accept(config: Config, world_size: int, rank: int | None = None) -> Sources:
    """The corpora of a run that can start with so many ranks. Raises BasedError, in one line, for one that cannot.

    rank: of this process, which looks at its share of the shards; None looks at all of them.
    """
    validate(config, world_size)
    check_mixers(config)
    check_trackers(config.monitor)
    check_memory(config, world_size, LARGEST_DEVICE_BYTES)
    sources = corpora(config, (0, 1) if rank is None else (rank, world_size))
    _check_load(config.checkpoint, Path(config.run_dir))
    checkpoint_bytes = CHECKPOINT_BYTES_PER_PARAMETER * parameter_count(config.model) + carried_bytes(config)
    check_run_dir(Path(config.run_dir), checkpoint_bytes)
    check_contents(Path(config.run_dir), config.train.stop_file)
    return sources


def corpora(config: Config, share: tuple[int, int] = (0, 1)) -> Sources:
    """The prepared data of a run. Raises BasedError if it is not there, or does not fit the model or the validation.

    share: (number, of how many) of the parts of the shards that this process looks at.
    """
    sources = Sources(config.data, config.train.global_batch_sequences, share)
    sources.check_enough(config.train.steps * config.train.global_batch_sequences)
    for manifest in sources.manifests:
        check_tokenizer(manifest, config.model.vocab_size)
    if config.validation.interval_steps:
        sources.validation_sequences(validated_sequences(config))
    return sources


def check_precision(config: Config, device: torch.device) -> None:
    """Raise ConfigError for fp8 on a GPU that has no such products. A CPU emulates them."""
    if config.train.precision != "fp8" or device.type != "cuda":
        return
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise ConfigError(
            f"train.precision fp8 needs an NVIDIA GPU of the Hopper generation or later, not {torch.cuda.get_device_name(device)}; set "
            f"train.precision=bf16"
        )


def check_memory(config: Config, world_size: int, memory_bytes: int) -> None:
    """Raise ConfigError if the least that a rank can do with is more than its device has."""
    needed = least_bytes(config, world_size)
    if needed > memory_bytes:
        raise ConfigError(
            f"a rank needs at least {needed / 2**30:,.0f} GiB, of {memory_bytes / 2**30:,.0f} GiB of memory; lower model.hidden_size, "
            f"train.micro_batch_sequences, data.sequence_length_tokens or parallel.zero_bucket_elements, or raise parallel.tensor"
        )


def least_bytes(config: Config, world_size: int) -> int:
    """A lower bound of a rank's memory: its weights, its part of the optimizer's state, a bucket, and the residuals of its blocks."""
    parallel, train = config.parallel, config.train
    copies = data_parallel_size(parallel, world_size) * parallel.context
    parameters = parameter_count(config.model) // (parallel.tensor * parallel.pipeline)
    weight_bytes = DTYPES[train.precision].itemsize
    weights = parameters * weight_bytes // (copies if parallel.zero_stage == 3 else 1)
    state_bytes = (0 if train.precision == "fp32" else 4) + (8 if config.optimizer.name == "adamw" else 4)
    optimizer = parameters * state_bytes // copies
    bucket = parallel.zero_bucket_elements * weight_bytes
    tokens = train.micro_batch_sequences * config.data.sequence_length_tokens // (parallel.context * parallel.tensor)
    blocks = -(-len(layer_mixers(config.model)) // parallel.pipeline)
    residuals = 4 * tokens * config.model.hidden_size * blocks
    return weights + optimizer + bucket + residuals


def memory_bytes(device: torch.device) -> int:
    """Memory of a device; that of the whole machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def _check_load(settings: CheckpointConfig, run_dir: Path) -> None:
    if not settings.load or (settings.resume and list_checkpoints(run_dir / FOLDER)):
        return
    path = Path(settings.load)
    if not ((path / MANIFEST).is_file() or list_checkpoints(path / FOLDER) or list_checkpoints(path)):
        raise ConfigError(f"there is no checkpoint in {path}: change checkpoint.load to a run folder or a checkpoint")
