"""Checks that a config can run on a number of ranks, before any of them starts to work.

What mixers know of themselves is checked in `model/check.py`.
"""

import os
import shutil
from pathlib import Path

from based_megatron.config.changes import check_allowed
from based_megatron.config.limits import check_limits
from based_megatron.config.pattern import parse_fp8_layers, parse_layer_pattern
from based_megatron.config.schema import Config, GuardsConfig, ModelConfig, ParallelConfig
from based_megatron.config.weights import weights_of
from based_megatron.errors import ConfigError
from based_megatron.run_folder.files import FILES, FOLDERS, LOG_PREFIX


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
    check_limits(config)
    check_allowed(Config, config.checkpoint.allow_changed)
    _check_files(config)
    _check_validation(config)
    _check_guards(config.guards)
    _check_optimizer(config)
    _check_model(config.model)
    _check_precision(config)
    check_tensor_parallel(config)
    _check_pipeline(config, data_parallel_size(config.parallel, world_size))
    _check_sequence(config)
    _check_zero(config)
    _check_prefix(config)


def _check_files(config: Config) -> None:
    data, stop_file = config.data, config.train.stop_file
    if bool(data.path) == bool(data.sources):
        raise ConfigError(
            f"give one of data.path and data.sources (now {data.path!r} and {len(data.sources)} sources); change data.path"
        )
    weights_of(data)
    plain = stop_file.isprintable() and stop_file not in ("", ".", "..") and "/" not in stop_file
    if not plain or stop_file in (*FILES, *FOLDERS) or stop_file.startswith(LOG_PREFIX):
        raise ConfigError(
            f"train.stop_file is {stop_file!r:.80}, but must be a plain file name that the run itself does not use (it is removed at a "
            f"stop); change train.stop_file"
        )


def _check_validation(config: Config) -> None:
    if config.validation.interval_steps and config.validation.sequences < 1:
        raise ConfigError(
            f"validation.sequences is {config.validation.sequences}; set it to at least 1, or validation.interval_steps to 0"
        )


def _check_guards(guards: GuardsConfig) -> None:
    if guards.warmup_steps > guards.window_steps:
        raise ConfigError(
            f"guards.warmup_steps {guards.warmup_steps} is more than guards.window_steps {guards.window_steps} holds; lower "
            f"guards.warmup_steps"
        )


def _check_optimizer(config: Config) -> None:
    optimizer, schedule = config.optimizer, config.schedule
    for key, value in {"warmup_lr": schedule.warmup_lr, "min_lr": schedule.min_lr}.items():
        if value > optimizer.lr:
            raise ConfigError(
                f"schedule.{key} {value} is above the peak, optimizer.lr {optimizer.lr}; lower schedule.{key}"
            )
    if optimizer.lr * optimizer.weight_decay >= 1:
        raise ConfigError(
            f"optimizer.lr {optimizer.lr} x optimizer.weight_decay {optimizer.weight_decay} is 1 or more: a step would take more than "
            f"all of a weight away; lower optimizer.weight_decay"
        )
    if optimizer.name == "muon" and optimizer.implementation == "apex":
        raise ConfigError(
            "optimizer.implementation apex cannot share its groups with optimizer.name muon; set optimizer.implementation to auto"
        )


def _check_model(model: ModelConfig) -> None:
    parse_layer_pattern(model.layer_pattern)
    if model.feature_map == "rebased" and model.feature_dim < 2:
        raise ConfigError(
            f"model.feature_dim {model.feature_dim} with model.feature_map rebased: the norm of a single number is 0; raise "
            f"model.feature_dim"
        )
    if model.hidden_size % model.num_heads:
        raise ConfigError(
            f"model.hidden_size {model.hidden_size} is not a multiple of model.num_heads {model.num_heads}; change either"
        )


def _check_precision(config: Config) -> None:
    if config.train.precision != "fp8":
        return
    parse_fp8_layers(config.train.fp8_layers, len(parse_layer_pattern(config.model.layer_pattern)))
    if config.parallel.tensor > 1:
        raise ConfigError(
            f"train.precision fp8 cannot run with parallel.tensor {config.parallel.tensor}: only whole linear layers run in fp8; set "
            f"train.precision=bf16 or parallel.tensor=1"
        )


def check_tensor_parallel(config: Config) -> None:
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


def _check_prefix(config: Config) -> None:
    prefix, length, rows = config.model.prefix_tokens, config.data.sequence_length_tokens, config.model.embedding_rows
    if not prefix:
        return
    if prefix >= length:
        raise ConfigError(
            f"model.prefix_tokens {prefix} leaves no token to predict of data.sequence_length_tokens {length}; lower model.prefix_tokens"
        )
    for key, value, wanted in (
        ("parallel.context", config.parallel.context, 1),
        ("data.carry_state", config.data.carry_state, False),
    ):
        if value != wanted:
            raise ConfigError(
                f"model.prefix_tokens {prefix} shows every token a whole prefix, which {key} {str(value).lower()} cannot do; set "
                f"{key}={str(wanted).lower()} or model.prefix_tokens=0"
            )
    token = config.train.prefix_mask_token
    if config.train.prefix_mask_fraction and (token >= rows or (token == 0 and rows == config.model.vocab_size)):
        raise ConfigError(
            f"train.prefix_mask_token {token} is no row to mask with: the embedding has {rows} rows, of which {config.model.vocab_size} "
            f"are tokens; set train.prefix_mask_token, raise model.vocab_size or set train.prefix_mask_fraction=0"
        )


def validated_sequences(config: Config) -> int:
    """Most held-out sequences of one validation: `validation.sequences`, or as many as `validation.max_tokens` allows."""
    return min(config.validation.sequences, max(1, config.validation.max_tokens // config.data.sequence_length_tokens))


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
    if stage > 3:
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
    """Raise ConfigError if the run folder cannot be made or written, or has no room for one checkpoint. Writes nothing."""
    try:
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free
    except OSError as error:
        raise ConfigError(f"cannot make the run folder {path!s:.200}: {error.strerror}; change run_dir") from error
    if not there.is_dir():
        raise ConfigError(f"cannot make the run folder {path}: {there} is a file; change run_dir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write to the run folder {path}: no permission for {there}; change run_dir")
    if free < needed_bytes:
        raise ConfigError(
            f"{path} has {free / 2**30:.1f} GiB free but one checkpoint needs {needed_bytes / 2**30:.1f} GiB; change run_dir"
        )
