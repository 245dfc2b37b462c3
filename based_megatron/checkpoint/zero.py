"""What a DeepSpeed ZeRO engine holds on this rank, as fragments, and back.

DeepSpeed keeps fp32 master weights and Adam moments in flat partitions:

    optimizer                      stages                  master partitions                  place of a parameter
    DeepSpeedZeroOptimizer         1 and 2                 single_partition_of_fp32_groups    _hp_mapping
    BF16_Optimizer                 1 in bf16, fp32 sums    fp32_groups_flat_partition         _hp_mapping
    DeepSpeedZeroOptimizer_Stage3  3                       fp32_partitioned_groups_flat       grad_position

Every parameter of the engine's module carries `shard_spec`, and `tied_copy = True` where it repeats another stage's.
Checked against deepspeed 0.19.8: the names above are not a public interface.
"""

from typing import Any

import torch
from torch import Tensor

from based_megatron.checkpoint.fragments import Fragment
from based_megatron.parallel.sharding import ShardSpec

MOMENTS = ("exp_avg", "exp_avg_sq")


def zero_fragments(engine: Any) -> list[Fragment]:
    """Views of this rank's master weights and Adam moments, for saving and for loading in place.

    Moments that do not exist yet (before the first step) are created as zeros.
    """
    masters = _masters(engine)
    states = [_state(engine, master) for master in masters]
    fragments = []
    for parameter in engine.module.parameters():
        place = _stage3_place(engine, parameter) if hasattr(parameter, "ds_id") else _place(parameter)
        if place is None:
            continue
        group, offset, start, numel = place
        spec: ShardSpec = parameter.shard_spec
        flat = {"model": masters[group].detach(), **{kind: states[group][kind] for kind in MOMENTS}}
        replica = getattr(parameter, "tied_copy", False) or (spec.partition_dim is None and spec.rank > 0)
        fragments.append(
            Fragment(
                spec=spec,
                start=start,
                numel=numel,
                tensors={kind: tensor.narrow(0, offset, numel) for kind, tensor in flat.items()},
                owned=not replica,
            )
        )
    return fragments


def adam_step(engine: Any) -> int:
    """Adam's own count of steps; steps that were skipped for a bad gradient are not in it."""
    if not _is_torch_adam(engine):
        return int(_client(engine).param_groups[0].get("step", 0))
    steps = {int(_state(engine, master)["step"]) for master in _masters(engine)}
    assert len(steps) == 1, f"partitions took different numbers of Adam steps: {sorted(steps)}"
    return steps.pop()


def after_load(engine: Any, adam_step: int) -> None:
    """Set Adam's step count and copy the loaded master weights to the model's, on every rank (collective)."""
    if _is_torch_adam(engine):
        for master in _masters(engine):
            _state(engine, master)["step"].fill_(adam_step)
    else:
        for group in _client(engine).param_groups:
            group["step"] = adam_step
    if engine.zero_optimization_stage() == 3:
        _masters_to_partitions(engine.optimizer)
    else:
        engine.optimizer.update_lp_params()


def _client(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that was given to DeepSpeed."""
    return engine.optimizer.optimizer


def _is_torch_adam(engine: Any) -> bool:
    """Torch keeps a step tensor for each parameter, apex one number for each group."""
    return isinstance(_client(engine), (torch.optim.Adam, torch.optim.AdamW))


def _masters(engine: Any) -> list[Tensor]:
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(engine.optimizer, name):
            return getattr(engine.optimizer, name)
    raise TypeError(f"{type(engine.optimizer).__name__} is not a ZeRO optimizer: use zero_stage 1, 2 or 3")


def _state(engine: Any, master: Tensor) -> dict[str, Tensor]:
    """Adam's state of one flat partition, created as its first step would if there is none."""
    client = _client(engine)
    state = client.state[master]
    for kind in MOMENTS:
        if kind not in state:
            state[kind] = torch.zeros_like(master.detach())
    if "step" not in state and _is_torch_adam(engine):
        on_device = client.defaults["fused"] or client.defaults["capturable"]
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device if on_device else "cpu")
    return state


def _place(parameter: Any) -> tuple[int, int, int, int] | None:
    """(group, offset in its partition, start in the parameter, numel) under stages 1 and 2; None if held elsewhere."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    assert tuple(parameter.shape) == parameter.shard_spec.local_shape, parameter.shard_spec
    lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
    return mapping.param_group_index, hp.start, lp.start, lp.numel


def _stage3_place(engine: Any, parameter: Any) -> tuple[int, int, int, int] | None:
    """The same under stage 3, where every parameter is cut into equal partitions, the last ones padded."""
    assert tuple(parameter.ds_shape) == parameter.shard_spec.local_shape, parameter.shard_spec
    optimizer = engine.optimizer
    group, offset, partition_numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = partition_numel * optimizer._get_param_partition_rank(parameter)
    numel = min(partition_numel, parameter.ds_numel - start)
    return (group, offset, start, numel) if numel > 0 else None


@torch.no_grad()
def _masters_to_partitions(optimizer: Any) -> None:
    """Release gathered weights and copy masters to partitions; the next forward gathers them again."""
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
