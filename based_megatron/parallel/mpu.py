"""Megatron's groups under the names that DeepSpeed asks for."""

from dataclasses import dataclass

import torch.distributed as dist

from based_megatron.parallel.topology import Topology


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
