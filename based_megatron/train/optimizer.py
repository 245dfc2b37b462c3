"""AdamW under DeepSpeed ZeRO.

DeepSpeed reduces over data x context ranks, clips by the global norm, steps and gathers: `engine.step()` is the boundary of
an optimizer step. Forward and backward stay outside of it for ZeRO-1 (train/step.py).
"""

import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from based_megatron.config import Config, OptimizerConfig, ParallelConfig
from based_megatron.errors import ConfigError
from based_megatron.model.based_model import BasedModel
from based_megatron.model.mixers import Mixer
from based_megatron.parallel.linear import shard_spec
from based_megatron.parallel.mpu import DeepSpeedGroups
from based_megatron.parallel.topology import Topology


def build_engine(chunks: list[BasedModel], config: Config, topology: Topology) -> Any:
    """A DeepSpeed engine over the model chunks of this rank. All ranks call it."""
    deepspeed = _import_deepspeed(topology.device)
    module = chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks)
    groups = parameter_groups(module, config.optimizer)
    _check_equal_groups(groups, topology)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=_adamw(groups, config.optimizer, topology.device),
        mpu=DeepSpeedGroups(topology),
        dist_init_required=False,
        config=deepspeed_settings(config.parallel, config.optimizer, bf16=config.train.precision == "bf16"),
    )
    return engine


def parameter_groups(module: nn.Module, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameters with and without weight decay; empty groups are left out.

    default: no decay on norms, biases and the embedding. reference: as released, where norms are decayed. Mixers decide on
    their own parameters.
    """
    of_mixers = _decays_of_mixers(module)
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in module.parameters():
        name = shard_spec(parameter).name
        decays = of_mixers[name] if name in of_mixers else _decays(name, optimizer.weight_decay_mode)
        (decayed if decays else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _decays_of_mixers(module: nn.Module) -> dict[str, bool]:
    mixers = [mixer for mixer in module.modules() if isinstance(mixer, Mixer)]
    return {shard_spec(p).name: mixer.decays(name) for mixer in mixers for name, p in mixer.named_parameters()}


def _decays(name: str, mode: str) -> bool:
    if name == "embedding.weight":
        return False
    return mode == "reference" or not name.endswith("norm.weight")


def deepspeed_settings(parallel: ParallelConfig, optimizer: OptimizerConfig, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's config. Accumulation is ours: its step count is always one "micro batch" to DeepSpeed."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optimizer.clip_grad_norm,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        # Otherwise bf16 gradients are summed over ranks in bf16.
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": parallel.zero_stage,
            # Refused by DeepSpeed for stage 1 with unmanaged accumulation.
            "overlap_comm": False,
            "reduce_bucket_size": parallel.zero_bucket_elements,
            "allgather_bucket_size": parallel.zero_bucket_elements,
            "stage3_prefetch_bucket_size": parallel.zero_bucket_elements,
        },
    }
    if bf16:
        # immediate_grad_update adds each micro batch's gradient into an fp32 buffer as it is made.
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def gradient(parameter: Tensor) -> Tensor | None:
    """Where ZeRO-1 keeps the summed gradient: an fp32 buffer for bf16 parameters, `.grad` for fp32 ones."""
    high_precision = getattr(parameter, "_hp_grad", None)
    return parameter.grad if high_precision is None else high_precision


def set_learning_rate(engine: Any, lr: float) -> None:
    """Set the rate of the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def _adamw(groups: list[dict[str, Any]], optimizer: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    settings: dict[str, Any] = dict(lr=optimizer.lr, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.eps)
    implementation = optimizer.implementation
    if implementation == "auto":
        implementation = "fused" if device.type == "cuda" else "torch"
    if implementation != "apex":
        return torch.optim.AdamW(groups, fused=implementation == "fused", **settings)
    try:
        from apex.optimizers import FusedAdam  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            f"optimizer.implementation is apex but NVIDIA apex cannot be imported ({error}); set it to auto"
        ) from error
    return FusedAdam(groups, adam_w_mode=True, **settings)


def _check_equal_groups(groups: list[dict[str, Any]], topology: Topology) -> None:
    # DeepSpeed reduces the norm of each group over all stages: a stage with fewer groups would leave the others waiting.
    counts = torch.tensor([len(groups), -len(groups)], device=topology.device)
    dist.all_reduce(counts, op=dist.ReduceOp.MIN, group=topology.model.group)
    if int(counts[0]) != -int(counts[1]):
        raise ConfigError(
            f"pipeline stages have from {int(counts[0])} to {-int(counts[1])} weight decay groups, because some hold neither biases nor "
            f"embeddings; set optimizer.weight_decay_mode=default or lower parallel.pipeline"
        )


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import bf16_optimizer

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None
    if device.type == "cpu":
        # Otherwise initialisation compiles a shared memory all-reduce for inference, for minutes, and fails without a compiler.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
