"""Checks that a config can run on a number of ranks, before any of them starts to work.

What mixers know of themselves is checked in `model/check.py`.
"""

import shutil
from pathlib import Path

from based_megatron.config.pattern import parse_layer_pattern
from based_megatron.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig
from based_megatron.errors import ConfigError


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Data parallel ranks that the world size leaves. Raises ConfigError if the layout does not fit."""
    layout = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % layout:
        raise ConfigError(
            f"world size {world_size} is not a multiple of tensor {parallel.tensor} x pipeline {parallel.pipeline} x context "
            f"{parallel.context} = {layout}; change parallel.tensor, parallel.pipeline or parallel.context, or the number of ranks"
        )
    return world_size // layout


def validate(config: Config, world_size: int) -> None:
    """Raise ConfigError, in one line, for the first thing that cannot work with this many ranks."""
    _check_positive(config)
    _check_optimizer(config.optimizer)
    _check_model(config.model)
    _check_tensor_parallel(config)
    _check_pipeline(config, data_parallel_size(config.parallel, world_size))
    _check_sequence(config)
    _check_zero(config)


def _check_positive(config: Config) -> None:
    model, train, parallel, data = config.model, config.train, config.parallel, config.data
    for key, value in {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size": model.ffn_hidden_size,
        "model.num_heads": model.num_heads,
        "model.feature_dim": model.feature_dim,
        "model.conv_expand": model.conv_expand,
        "model.vocab_size": model.vocab_size,
        "model.vocab_multiple": model.vocab_multiple,
        "parallel.tensor": parallel.tensor,
        "parallel.pipeline": parallel.pipeline,
        "parallel.virtual_pipeline": parallel.virtual_pipeline,
        "parallel.context": parallel.context,
        "parallel.zero_bucket_elements": parallel.zero_bucket_elements,
        "parallel.timeout_seconds": parallel.timeout_seconds,
        "train.steps": train.steps,
        "train.global_batch_sequences": train.global_batch_sequences,
        "train.micro_batch_sequences": train.micro_batch_sequences,
        "data.sequence_length_tokens": data.sequence_length_tokens,
        "monitor.log_interval_steps": config.monitor.log_interval_steps,
    }.items():
        if value < 1:
            raise ConfigError(f"{key} is {value} but must be at least 1; change {key}")
    if bool(data.path) == bool(data.sources):
        raise ConfigError(
            f"give one of data.path and data.sources (now {data.path!r} and {len(data.sources)} sources); change data.path"
        )
    if config.validation.interval_steps and config.validation.sequences < 1:
        raise ConfigError(
            f"validation.sequences is {config.validation.sequences}; set it to at least 1, or validation.interval_steps to 0"
        )


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    muon = optimizer.muon
    for key, value, legal, wanted in (
        ("lr", optimizer.lr, optimizer.lr > 0, "above 0"),
        ("beta1", optimizer.beta1, 0 <= optimizer.beta1 < 1, "at least 0 and below 1"),
        ("beta2", optimizer.beta2, 0 <= optimizer.beta2 < 1, "at least 0 and below 1"),
        ("eps", optimizer.eps, optimizer.eps >= 0, "at least 0"),
        ("weight_decay", optimizer.weight_decay, optimizer.weight_decay >= 0, "at least 0"),
        ("clip_grad_norm", optimizer.clip_grad_norm, optimizer.clip_grad_norm >= 0, "0 (off) or above"),
        ("muon.momentum", muon.momentum, 0 <= muon.momentum < 1, "at least 0 and below 1"),
        ("muon.newton_schulz_steps", muon.newton_schulz_steps, muon.newton_schulz_steps >= 1, "at least 1"),
        ("muon.update_rms", muon.update_rms, muon.update_rms > 0, "above 0"),
    ):
        if not legal:
            raise ConfigError(f"optimizer.{key} is {value}; set optimizer.{key} to {wanted}")
    if optimizer.name == "muon" and optimizer.implementation == "apex":
        raise ConfigError(
            "optimizer.implementation apex cannot share its groups with optimizer.name muon; set optimizer.implementation to auto"
        )


def _check_model(model: ModelConfig) -> None:
    parse_layer_pattern(model.layer_pattern)
    if model.hidden_size % model.num_heads:
        raise ConfigError(
            f"model.hidden_size {model.hidden_size} is not a multiple of model.num_heads {model.num_heads}; change either"
        )
    if model.conv_expand % 2:
        raise ConfigError(
            f"model.conv_expand is {model.conv_expand} but half of it is the gate; set model.conv_expand to an even number"
        )
    if model.window_left < 0 or model.conv_kernel < 1:
        raise ConfigError(
            f"model.window_left {model.window_left} must be at least 0 and model.conv_kernel {model.conv_kernel} at least 1"
        )
    if not 0 < model.rotary_fraction <= 1:
        raise ConfigError(f"model.rotary_fraction is {model.rotary_fraction}; set it above 0 and to at most 1")


def _check_tensor_parallel(config: Config) -> None:
    model, tensor = config.model, config.parallel.tensor
    for key, value in {
        "model.num_heads": model.num_heads,
        "model.ffn_hidden_size": model.ffn_hidden_size,
    }.items():
        if value % tensor:
            raise ConfigError(f"{key} {value} is not a multiple of parallel.tensor {tensor}; change parallel.tensor")


def _check_pipeline(config: Config, data_parallel: int) -> None:
    parallel, train = config.parallel, config.train
    layers = len(parse_layer_pattern(config.model.layer_pattern))
    chunks = parallel.pipeline * parallel.virtual_pipeline
    per_step = train.micro_batch_sequences * data_parallel
    if train.global_batch_sequences % per_step:
        raise ConfigError(
            f"train.global_batch_sequences {train.global_batch_sequences} is not a multiple of train.micro_batch_sequences "
            f"{train.micro_batch_sequences} x data parallel {data_parallel} = {per_step}; change train.global_batch_sequences"
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise ConfigError(
            f"parallel.virtual_pipeline {parallel.virtual_pipeline} needs parallel.pipeline above 1; set parallel.virtual_pipeline=1"
        )
    if layers < chunks:
        raise ConfigError(
            f"{layers} layers cannot fill parallel.pipeline {parallel.pipeline} x parallel.virtual_pipeline "
            f"{parallel.virtual_pipeline} = {chunks} chunks; lower parallel.pipeline"
        )
    if layers % chunks and parallel.virtual_pipeline > 1:
        raise ConfigError(
            f"{layers} layers do not divide into parallel.pipeline {parallel.pipeline} x parallel.virtual_pipeline "
            f"{parallel.virtual_pipeline} = {chunks} equal chunks; change parallel.virtual_pipeline or model.layer_pattern"
        )
    micro_batches = train.global_batch_sequences // per_step
    if parallel.virtual_pipeline > 1 and micro_batches % parallel.pipeline:
        raise ConfigError(
            f"the interleaved schedule needs a multiple of parallel.pipeline {parallel.pipeline} micro batches, not {micro_batches} "
            f"(global batch / micro batch / data parallel); change train.global_batch_sequences"
        )


def _check_sequence(config: Config) -> None:
    length, parallel = config.data.sequence_length_tokens, config.parallel
    if parallel.context > length:
        raise ConfigError(
            f"parallel.context {parallel.context} is more than data.sequence_length_tokens {length}: a rank would have no token; "
            f"lower parallel.context"
        )
    if config.data.carry_state and (config.data.sources or not config.data.isolate_documents):
        raise ConfigError(
            f"data.carry_state needs one corpus and documents apart (now {len(config.data.sources)} data.sources, data.isolate_documents "
            f"{config.data.isolate_documents}); set data.path and data.isolate_documents=true, or data.carry_state=false"
        )
    multiple = slice_multiple(parallel)
    if length % multiple or length // multiple < parallel.context:
        raise ConfigError(
            f"data.sequence_length_tokens {length} cannot be cut into {parallel.context} slices that are multiples of parallel.tensor "
            f"{multiple}; set parallel.sequence_parallel=false or change data.sequence_length_tokens"
        )


def slice_multiple(parallel: ParallelConfig) -> int:
    """The number of tokens that every slice is a multiple of: tensor parallel ranks share a slice under sequence parallelism."""
    return parallel.tensor if parallel.sequence_parallel else 1


def _check_zero(config: Config) -> None:
    stage, pipeline = config.parallel.zero_stage, config.parallel.pipeline
    if stage == 0:
        raise ConfigError(
            "parallel.zero_stage 0 is wrong in bf16 (DeepSpeed updates once with zero gradients); set parallel.zero_stage=1, "
            "which is the same with one data parallel rank"
        )
    if stage not in (1, 2, 3):
        raise ConfigError(f"parallel.zero_stage is {stage}; set it to 1, 2 or 3")
    if stage == 3 and config.optimizer.implementation == "apex":
        raise ConfigError(
            "optimizer.implementation apex counts its steps wrongly under parallel.zero_stage 3; set it to auto, or zero_stage to 2"
        )
    if stage == 3 and config.optimizer.name == "muon":
        raise ConfigError(
            "optimizer.name muon needs whole matrices, which parallel.zero_stage 3 cuts another way; set parallel.zero_stage to 1 or 2"
        )
    if stage > 1 and pipeline > 1:
        raise ConfigError(
            f"parallel.zero_stage {stage} cannot run with parallel.pipeline {pipeline}: gradients are sharded inside each backward, "
            f"before the pipeline has summed them; set parallel.zero_stage=1 or parallel.pipeline=1"
        )


def check_run_dir(path: Path, needed_bytes: int) -> None:
    """Raise ConfigError if the run folder cannot be made or has no room for one checkpoint."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the run folder {path}: {error.strerror}; change run_dir") from error
    free = shutil.disk_usage(path).free
    if free < needed_bytes:
        raise ConfigError(
            f"{path} has {free / 2**30:.1f} GiB free but one checkpoint needs {needed_bytes / 2**30:.1f} GiB; change run_dir"
        )
