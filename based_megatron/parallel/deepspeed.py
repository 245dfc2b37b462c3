"""The one door to DeepSpeed: its settings, its groups, and the flat partitions in which ZeRO keeps weights and gradients.

DeepSpeed reduces over data x context ranks, clips by the global norm, steps and gathers: `ZeroEngine.step` is the boundary of
an optimizer step. Forward and backward stay outside of it for ZeRO-1. It keeps fp32 masters in flat partitions:

    its optimizer                  stages                  master partitions                  place of a parameter
    DeepSpeedZeroOptimizer         1 and 2                 single_partition_of_fp32_groups    _hp_mapping
    BF16_Optimizer                 1 in bf16, fp32 sums    fp32_groups_flat_partition         _hp_mapping; its step is ours (flat_step.py)
    DeepSpeedZeroOptimizer_Stage3  3                       fp32_partitioned_groups_flat       grad_position

Checked against deepspeed 0.19.8: these names are not a public interface. Nothing else of ours knows them.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from based_megatron.config import OptimizerConfig, ParallelConfig
from based_megatron.parallel.flat_step import FlatGroup, FlatStep
from based_megatron.parallel.gradient_sums import GradientSum, gradient, keep_sum
from based_megatron.parallel.host import environment, log_level, replaced, without_warnings
from based_megatron.parallel.linear import is_tied_copy, shard_spec
from based_megatron.parallel.megatron import megatron_runs
from based_megatron.parallel.partitions import Partition, PartitionedOptimizer, Piece
from based_megatron.parallel.topology import Topology

Place = tuple[int, int, int, int]
"""(partition, offset in it, start in the parameter, elements) of a parameter's range."""


def build_zero_engine(
    module: nn.Module, optimizer: PartitionedOptimizer, topology: Topology, settings: dict[str, Any]
) -> "ZeroEngine":
    """An engine over the model chunks of this rank. All ranks call it."""
    for parameter in module.parameters():
        # It is left out of the gradient norm.
        parameter.ds_pipe_replicated = is_tied_copy(parameter)  # type: ignore[attr-defined]
    with deepspeed_runs(topology.device), _initializes(topology.device):
        import deepspeed

        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer.client,
            mpu=DeepSpeedGroups(topology),
            dist_init_required=False,
            config=settings,
        )
    return zero_engine(engine, optimizer)


class ZeroEngine:
    """A module whose gradients, optimizer and, in stage 3, weights are sharded by ZeRO."""

    def __init__(self, engine: Any, optimizer: PartitionedOptimizer) -> None:
        """engine: what deepspeed.initialize returned for the client of `optimizer`."""
        self._engine, self.optimizer = engine, optimizer
        self.module: nn.Module = engine.module
        self.stage: int = engine.zero_optimization_stage()
        self._device: torch.device = engine.device
        self._pieces: list[tuple[Any, Piece]] = []
        self._norm: Tensor | None = None
        """Norm of the gradient of the last step; None if DeepSpeed found it not finite before it made one."""
        optimizer.place(self._partitions())

    def __call__(self, *inputs: Any) -> Any:
        """Forward, for ZeRO-2 and 3: stage 3 gathers weights here."""
        with deepspeed_runs(self._device), megatron_runs():
            return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Backward, for ZeRO-2 and 3: gradients are reduced as they are made."""
        with deepspeed_runs(self._device), megatron_runs():
            self._engine.backward(loss)

    def scale_gradients(self, scale: Tensor) -> None:
        """Multiply the gradients that ZeRO-1 has summed up, after the last backward of a step. It averages them over ranks."""
        grads = [grad for parameter in self.module.parameters() if (grad := gradient(parameter)) is not None]
        torch._foreach_mul_(grads, scale.to(grads[0].dtype))

    def step(
        self,
        on_gradients: Callable[[], None] | None = None,
        judge: Callable[[Tensor], Tensor | None] = lambda norm: None,
        on_skip: Callable[[], None] | None = None,
    ) -> bool:
        """Reduce, call `on_gradients`, clip, update; leaves the weights alone if a gradient is not finite or `judge` says so.

        judge: from the norm of the gradient, on the device, whether to skip the step; None or a bool on the device.
        on_skip: called if the step is skipped, while `gradients` are still there.
        Returns whether it has updated. DeepSpeed reads the norm on the host to know it: nobody waits once more.
        """
        zero = self._engine.optimizer
        clip_and_update = zero.step
        self._norm = None

        def step() -> None:
            if on_gradients is not None:
                on_gradients()
            clip_and_update()

        with deepspeed_runs(self._device), replaced(zero, step=step), self._judged(judge), self._told_of_skip(on_skip):
            self._engine.step()
        return self._engine.was_step_applied()

    @contextmanager
    def _judged(self, judge: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Surroundings in which DeepSpeed takes a norm that is judged bad for an infinite one, and skips the step."""
        # The last function that the norm goes through, where the optimizer's file looks it up.
        file = sys.modules[type(self._engine.optimizer).__module__]
        find_norm = file.combine_grad_norm_groups

        def judged(*args: Any, **kwargs: Any) -> Tensor:
            found = find_norm(*args, **kwargs)
            # A norm that is not finite comes as -1 from some of these functions.
            self._norm = norm = torch.where(found >= 0, found, torch.inf)
            verdict = judge(norm)
            return norm if verdict is None else torch.where(verdict, torch.inf, norm)

        with replaced(file, combine_grad_norm_groups=judged):
            yield

    @contextmanager
    def _told_of_skip(self, on_skip: Callable[[], None] | None) -> Iterator[None]:
        """Surroundings in which `on_skip` is called before DeepSpeed drops the gradients of a step that it skips."""
        zero = self._engine.optimizer
        name = "_overflow_clean_up" if self.stage == 3 else "zero_grad"
        drop, told = getattr(zero, name), on_skip is None

        def dropping(*args: Any, **kwargs: Any) -> Any:
            nonlocal told
            if zero.overflow and not told:
                told = True
                on_skip()  # type: ignore[misc]
            return drop(*args, **kwargs)

        with replaced(zero, **{name: dropping}):
            yield

    def weights(self) -> Iterator[tuple[Piece, Tensor]]:
        """The fp32 master weights of each piece of this rank's partitions, flat."""
        for partition in self.optimizer.partitions:
            for piece in partition.pieces:
                yield piece, piece.of(partition.master.detach())

    def gradients(self) -> Iterator[tuple[Piece, Tensor]]:
        """The reduced gradient of each piece of this rank's partitions, flat, before clipping; in `on_gradients` only."""
        for parameter, piece in self._pieces:
            if self.stage == 3:
                flat = self._engine.optimizer.get_local_fp32_grad_for_param(parameter)
                yield piece, flat.view(-1)[: piece.numel]
                continue
            flat = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
            yield piece, flat[: piece.numel]

    def get_global_grad_norm(self) -> Any:
        """Norm of the whole gradient of the last step, before clipping: a number or a tensor, infinite if it was not finite."""
        return self._engine.get_global_grad_norm() if self._norm is None else self._norm

    @torch.no_grad()
    def masters_to_weights(self) -> None:
        """Copy changed masters to the weights of the model, on every rank (collective)."""
        zero = self._engine.optimizer
        if self.stage < 3:
            zero.update_lp_params()
            return
        # Gathered weights are released; the next forward gathers them again.
        zero._partition_all_parameters()
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)

    def _partitions(self) -> list[Partition]:
        masters = self._masters()
        pieces: list[list[Piece]] = [[] for _ in masters]
        for parameter in self.module.parameters():
            place = self._stage3_place(parameter) if self.stage == 3 else _place(parameter)
            if place is None:
                continue
            partition, offset, start, numel = place
            spec = shard_spec(parameter)
            copied = is_tied_copy(parameter) or (spec.partition_dim is None and spec.rank > 0)
            piece = Piece(spec, start, numel, offset, owned=not copied)
            pieces[partition].append(piece)
            self._pieces.append((parameter, piece))
        return [Partition(master, tuple(found)) for master, found in zip(masters, pieces, strict=True)]

    def _masters(self) -> list[Tensor]:
        zero = self._engine.optimizer
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(zero, name):
                return getattr(zero, name)
        raise TypeError(f"{type(zero).__name__} is not a ZeRO optimizer: use zero_stage 1, 2 or 3")

    def _stage3_place(self, parameter: Any) -> Place | None:
        """The place of a parameter under stage 3, which cuts each into equal ranges and pads the last ones."""
        assert tuple(parameter.ds_shape) == shard_spec(parameter).local_shape, shard_spec(parameter)
        zero = self._engine.optimizer
        partition, offset, range_numel = zero.grad_position[zero.get_param_id(parameter)]
        start = range_numel * zero._get_param_partition_rank(parameter)
        numel = min(range_numel, parameter.ds_numel - start)
        return (partition, offset, start, numel) if numel > 0 else None


class FlatEngine(ZeroEngine):
    """ZeRO-1 in bf16. Of DeepSpeed's BF16_Optimizer it takes the flat buffers; the step over them is ours."""

    def __init__(self, engine: Any, optimizer: PartitionedOptimizer) -> None:
        super().__init__(engine, optimizer)
        zero = engine.optimizer
        for hook in zero._grad_acc_hooks:
            hook.remove()
        groups: list[FlatGroup] = []
        sums: list[GradientSum] = []
        for number, master in enumerate(zero.fp32_groups_flat_partition):
            weights, gradients = zero.bf16_groups_flat[number], zero.fp32_groups_gradients_flat[number]
            first = dist.get_rank(zero.dp_process_group) * master.numel()
            groups.append(FlatGroup(weights, gradients, first, master.numel()))
            sums += map(keep_sum, zero.bf16_groups[number], zero.fp32_groups_gradients[number])
        ranks = zero.dp_process_group, zero.mpu.get_model_parallel_group()
        self._step = FlatStep(groups, sums, optimizer, zero.clip_grad, *ranks)

    def scale_gradients(self, scale: Tensor) -> None:
        """As in the base class; nothing is multiplied before the update."""
        self._step.finish_sums(scale)

    def step(self, *hooks: Any) -> bool:
        """As in the base class. The host waits once, while the update runs."""
        return self._step(*hooks)

    def gradients(self) -> Iterator[tuple[Piece, Tensor]]:
        """As in the base class, from the reduction until the next step begins."""
        return self._step.gradients()

    def get_global_grad_norm(self) -> Tensor:
        """As in the base class, on the device."""
        return self._step.norm


def zero_engine(engine: Any, optimizer: PartitionedOptimizer) -> ZeroEngine:
    """The engine over what deepspeed.initialize returned for the client of `optimizer`."""
    cls = FlatEngine if hasattr(engine.optimizer, "fp32_groups_gradients_flat") else ZeroEngine
    return cls(engine, optimizer)


def _place(parameter: Any) -> Place | None:
    """The place of a parameter under stages 1 and 2; None if another rank holds all of it."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    assert tuple(parameter.shape) == shard_spec(parameter).local_shape, shard_spec(parameter)
    lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
    return mapping.param_group_index, hp.start, lp.start, lp.numel


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
        # immediate_grad_update: gradients are added to fp32 buffers as they are made, by hooks that FlatEngine replaces.
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


@contextmanager
def deepspeed_runs(device: torch.device) -> Iterator[None]:
    """Surroundings for DeepSpeed's code, for as long as the block lasts.

    It asks the environment for its rank even where the ranks are joined already. Neither its warnings nor its log lines below
    errors are wanted.
    """
    ranks = dict(RANK=dist.get_rank(), WORLD_SIZE=dist.get_world_size(), LOCAL_RANK=device.index or 0)
    variables = {name: str(value) for name, value in ranks.items()}
    with environment(**variables), without_warnings("deepspeed"), log_level("DeepSpeed", logging.ERROR):
        yield


@contextmanager
def _initializes(device: torch.device) -> Iterator[None]:
    """Surroundings for deepspeed.initialize."""
    on_cpu = device.type == "cpu"
    with ExitStack() as changes:
        if on_cpu:
            changes.enter_context(environment(DS_ACCELERATOR="cpu"))
        import deepspeed.ops
        from deepspeed.runtime import bf16_optimizer

        changes.enter_context(replaced(bf16_optimizer, see_memory_usage=lambda *args, **kwargs: None))
        if on_cpu:
            # Otherwise it compiles a shared memory all-reduce for inference, for minutes, and fails without a compiler.
            changes.enter_context(replaced(deepspeed.ops, __compatible_ops__={}))
        yield


@dataclass(frozen=True)
class DeepSpeedGroups:
    """The `mpu` argument of deepspeed.initialize.

    Data parallel means data x context here: both hold the same parameters, and ZeRO shards over both. The methods of
    Ulysses sequence parallelism must not exist, or DeepSpeed sums where it should average.
    """

    topology: Topology

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.topology.model.group

    def get_model_parallel_world_size(self) -> int:
        return self.topology.model.size

    def get_model_parallel_rank(self) -> int:
        return self.topology.model.rank

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self.topology.tensor.group

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.topology.tensor.size

    def get_tensor_model_parallel_rank(self) -> int:
        return self.topology.tensor.rank

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_process_group_ranks(self.topology.tensor.group)[0]

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self.topology.pipeline.group

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.topology.pipeline.size

    def get_pipeline_model_parallel_rank(self) -> int:
        return self.topology.pipeline.rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.topology.data_context.group

    def get_data_parallel_world_size(self) -> int:
        return self.topology.data_context.size

    def get_data_parallel_rank(self) -> int:
        return self.topology.data_context.rank

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.topology.data_context.group)
