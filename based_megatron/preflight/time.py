"""Time of a step and of the whole run: arithmetic at the measured share of the peak, then what each form of parallelism adds."""

import math
from dataclasses import dataclass

from based_megatron.config import Config
from based_megatron.config.validate import data_parallel_size, validated_sequences
from based_megatron.model.mixers import layer_mixers
from based_megatron.monitor.flops import parameter_count, training_flops_per_token
from based_megatron.parallel.buckets import EMBEDDING
from based_megatron.preflight import measured
from based_megatron.preflight.gpus import Gpu
from based_megatron.preflight.shapes import local_parameters
from based_megatron.train.carried import carried_bytes

NUMBERS_OF_A_SAVE = 3
FP32_BYTES, WEIGHT_BYTES = 4, 2
FORWARD_SHARE = 1 / 3
"""A token of validation takes a forward pass, a third of one of training."""


@dataclass(frozen=True)
class RunTime:
    """Seconds, rates and sizes of a run."""

    tokens: int
    """Seconds of the whole run."""
    step_seconds: float
    tokens_per_second: float
    """Over all GPUs, inside steps."""
    mfu: float
    total_seconds: float
    """With saves and validation."""
    gpu_hours: float
    save_bytes: int
    save_seconds: float
    """From the start of a save until it has its name."""
    save_wait_seconds: float
    """The part of it that training waits for, where another follows: all of it, or what is left when the next save is due."""
    assumptions: tuple[str, ...]


def run_time(config: Config, nodes: int, gpus_per_node: int, gpu: Gpu) -> RunTime:
    """Predict a run; the config must be valid for so many GPUs."""
    train, parallel, ranks = config.train, config.parallel, nodes * gpus_per_node
    length = config.data.sequence_length_tokens
    step_tokens = train.global_batch_sequences * length
    base = _nearest_rate(parameter_count(config.model))
    flops = training_flops_per_token(config.model, length)
    seconds = _step_seconds(config, nodes, gpus_per_node, gpu, base.mfu, flops)
    save_bytes = NUMBERS_OF_A_SAVE * FP32_BYTES * parameter_count(config.model) + carried_bytes(config)
    speed = min(
        ranks * measured.SAVE_BYTES_PER_SECOND,
        max(measured.SAVE_BYTES_PER_SECOND, measured.FILE_SYSTEM_BYTES_PER_SECOND),
    )
    save_seconds = save_bytes / speed
    interval, validation = steps_between_saves(config, seconds), config.validation
    saves = int(train.steps // interval)
    save_wait_seconds = save_seconds
    if config.checkpoint.asynchronous:
        save_wait_seconds = max(0.0, save_seconds - interval * seconds)
    validations = train.steps // validation.interval_steps if validation.interval_steps else 0
    validation_seconds = seconds * FORWARD_SHARE * validated_sequences(config) / train.global_batch_sequences
    total = train.steps * seconds + saves * save_wait_seconds + save_seconds + validations * validation_seconds
    rate = step_tokens / seconds
    assumptions = [
        f"{100 * base.mfu:.0f} % of the peak on one {gpu.name}, as {base.config} on {measured.GPU} "
        f"(micro batch {base.micro_batch} x {base.accumulation}: {measured.LOOP})"
    ]
    if measured.GPU.lower() != gpu.name:
        assumptions.append(f"{gpu.name} reaches the share of its peak that {measured.GPU} reaches: not measured")
    if parallel.tensor > 2 or parallel.pipeline > 2 or parallel.context > 2 or ranks > 2:
        assumptions.append("more than two GPUs: modelled from measurements on one and two, not measured")
    if nodes > 1:
        assumptions.append(
            f"network: {measured.NETWORK_BYTES_PER_SECOND / 1e9:.0f} GB/s a node for large sums: not measured"
        )
    if train.recompute != "none":
        assumptions.append(f"recompute {train.recompute}: by counted arithmetic, not measured")
    assumptions.append(f"saves at {speed / 1e9:.1f} GB/s over all ranks; no restarts, no waiting in the queue")
    return RunTime(
        tokens=train.steps * step_tokens,
        step_seconds=seconds,
        tokens_per_second=rate,
        mfu=rate * flops / (ranks * gpu.peak_flops),
        total_seconds=total,
        gpu_hours=total * ranks / 3600,
        save_bytes=save_bytes,
        save_seconds=save_seconds,
        save_wait_seconds=save_wait_seconds,
        assumptions=tuple(assumptions),
    )


def steps_between_saves(config: Config, step_seconds: float) -> float:
    """Steps from one save to the next, by steps or by time; infinite if there is only the one at the end."""
    settings = config.checkpoint
    by_steps = settings.interval_steps or math.inf
    return min(by_steps, max(1.0, settings.interval_seconds / step_seconds) if settings.interval_seconds else math.inf)


def _nearest_rate(parameters: int) -> measured.Rate:
    return min(measured.RATES, key=lambda rate: max(rate.parameters / parameters, parameters / rate.parameters))


def _step_seconds(config: Config, nodes: int, gpus_per_node: int, gpu: Gpu, mfu: float, flops: float) -> float:
    train, parallel, ranks = config.train, config.parallel, nodes * gpus_per_node
    data = data_parallel_size(parallel, ranks)
    micro_batches = train.global_batch_sequences // (train.micro_batch_sequences * data)
    tokens = train.micro_batch_sequences * config.data.sequence_length_tokens // parallel.context
    model = parallel.tensor * parallel.pipeline
    micro_batch = tokens * flops / model / (mfu * gpu.peak_flops) / measured.RECOMPUTE_SHARES[train.recompute]
    layers = -(-len(layer_mixers(config.model)) // parallel.pipeline)
    split = (parallel.tensor - 1) / parallel.tensor
    micro_batch += measured.TENSOR_SECONDS_PER_ELEMENT * layers * tokens * config.model.hidden_size * split
    shared = parallel.tensor > 1 or parallel.context > 1
    host = measured.HOST_SECONDS_OF_A_SLICED_LAYER if shared else measured.HOST_SECONDS_OF_A_LAYER
    micro_batch = max(micro_batch, layers * host)
    if parallel.context > 1:
        micro_batch /= measured.CONTEXT_SHARE
    if parallel.pipeline > 1:
        micro_batch /= measured.PIPELINE_SHARE
    bubble = (parallel.pipeline - 1) / parallel.virtual_pipeline
    micro_batch /= measured.ZERO_SHARES[parallel.zero_stage]
    reduction = _reduction_seconds(config, data * parallel.context, gpus_per_node, nodes, micro_batch)
    return (micro_batches + bubble) * micro_batch + reduction


def _reduction_seconds(
    config: Config, shards: int, gpus_per_node: int, nodes: int, micro_batch_seconds: float
) -> float:
    """What is exposed of the reduction of fp32 gradients during the last backward, and of the gathering of weights during the next forward.

    Nothing hides the embedding's part, whose gradient is complete last and which is read first.
    """
    if shards == 1:
        return 0.0
    stages = [local_parameters(config, stage) for stage in range(config.parallel.pipeline)]
    parameters = max(stages, key=lambda parameters: sum(p.numel for p in parameters))
    elements = sum(p.numel for p in parameters)
    embedding = sum(p.numel for p in parameters if p.name == EMBEDDING)
    # The tensor parallel groups of a node reduce their own parts over the same adapters.
    together = min(config.parallel.tensor, gpus_per_node)
    rate = measured.NODE_BYTES_PER_SECOND if nodes == 1 else measured.NETWORK_BYTES_PER_SECOND / together
    hidden_share = measured.HIDDEN_SHARE if config.parallel.overlap_zero else 0.0

    def exposed_seconds(number_bytes: int, pass_seconds: float) -> float:
        second = number_bytes * (shards - 1) / shards / rate
        return embedding * second + max(0.0, (elements - embedding) * second - hidden_share * pass_seconds)

    forward = FORWARD_SHARE * micro_batch_seconds
    return exposed_seconds(FP32_BYTES, micro_batch_seconds - forward) + exposed_seconds(WEIGHT_BYTES, forward)
