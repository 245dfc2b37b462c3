"""DeepSpeed engines on a toy model, for two gloo ranks. Runs in worker processes.

The loss is elementwise in the parameters, sum of 1 - cos(x p), so that every element has its own gradient whatever the tensor
parallel layout, and padding (zeros) has none.
"""

import json
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ckpt_fragments import SHAPES, specs
from torch import Tensor, nn

from based_megatron.parallel.sharding import ShardSpec
from support.pool import fork_context, free_port


@dataclass(frozen=True)
class Layout:
    """The way in which two ranks share the work: tensor=2, data=2, or neither (both ranks do the same alone)."""

    stage: int = 1
    precision: str = "fp32"
    tensor: int = 1
    data: int = 1


class Toy(nn.Module):
    """Parameters with shard specs, and a loss for each input scalar."""

    def __init__(self, specs: list[ShardSpec], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        full = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for i, spec in enumerate(specs):
            parameter: Any = nn.Parameter(spec.cut(full[spec.name]))
            parameter.shard_spec = spec
            parameter.tensor_model_parallel = spec.partition_dim is not None
            self.register_parameter(f"p{i}", parameter)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [n] -> mean loss over them."""
        parts = [(1 - (p.float() * x).cos()).sum() for p in self._parameters.values() for x in inputs]
        return torch.stack(parts).sum() / len(inputs)


class Groups:
    """The `mpu` argument of DeepSpeed, for these ranks."""

    def __init__(self, model: dist.ProcessGroup, data: dist.ProcessGroup) -> None:
        self.model, self.data = model, data
        self.get_model_parallel_group = self.get_tensor_model_parallel_group = lambda: model
        self.get_data_parallel_group = lambda: data
        self.get_model_parallel_rank = self.get_tensor_model_parallel_rank = lambda: dist.get_rank(model)
        self.get_model_parallel_world_size = self.get_tensor_model_parallel_world_size = lambda: dist.get_world_size(
            model
        )
        self.get_pipeline_model_parallel_world_size = lambda: 1
        self.get_data_parallel_rank = lambda: dist.get_rank(data)
        self.get_data_parallel_world_size = lambda: dist.get_world_size(data)


def make_alone() -> dist.ProcessGroup:
    """The group of this rank only (collective)."""
    return [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]


def make_engine(
    layout: Layout, alone: dist.ProcessGroup, seed: int, names: list[str] | None = None, copy: str = ""
) -> Any:
    """An engine of the toy model; `names` limits the parameters, as a pipeline stage would, `copy` is tied to another stage's."""
    import deepspeed
    import deepspeed.ops
    import deepspeed.runtime.bf16_optimizer

    from based_megatron.parallel.deepspeed import zero_engine
    from based_megatron.parallel.linear import shard_spec
    from based_megatron.train.optimizer.adamw import Optimizer

    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    world = dist.group.WORLD
    groups = Groups(world if layout.tensor == 2 else alone, world if layout.data == 2 else alone)
    rank = dist.get_rank(groups.model)
    mine = [spec for spec in specs(rank, layout.tensor) if names is None or spec.name in names]
    model = Toy(mine, seed)
    for parameter in model.parameters():
        parameter.tied_copy = shard_spec(parameter).name == copy  # type: ignore[attr-defined]
    plain = [p for p in model.parameters() if p.ndim == 1]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=0.05, betas=(0.9, 0.95)
    )
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": layout.stage,
            "overlap_comm": False,
            "reduce_bucket_size": 1000,
            "allgather_bucket_size": 1000,
            "sub_group_size": 40,
            "stage3_param_persistence_threshold": 10,
        },
    }
    if layout.precision == "bf16":
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    engine = deepspeed.initialize(model=model, optimizer=optimizer, mpu=groups, config=config)[0]
    return zero_engine(engine, Optimizer(optimizer))


def train(engine: Any, first_step: int, steps: int) -> list[float]:
    """Optimizer steps; the two inputs of a step are shared over the data parallel ranks. Returns this rank's losses."""
    losses = []
    for step in range(first_step, first_step + steps):
        inputs = torch.rand(2, generator=torch.Generator().manual_seed(step))
        data = engine._engine.mpu.data
        inputs = inputs[dist.get_rank(data) :: dist.get_world_size(data)]
        loss = engine(inputs)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def run_cases(cases: Sequence[tuple[str, Callable[..., None], tuple]], folder: Path) -> dict[str, str]:
    """Run cases (name, function, arguments) one after another on two ranks; what went wrong by name, empty if nothing."""
    fork_context()  # sets what the server that forks has imported
    arguments = (2, free_port(), cases, folder)
    torch.multiprocessing.start_processes(_worker, args=arguments, nprocs=2, start_method="forkserver")
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return {name: "".join(dict.fromkeys(rank.get(name, "did not run") for rank in found)) for name, _, _ in cases}


def _worker(
    rank: int, world: int, port: int, cases: Sequence[tuple[str, Callable[..., None], tuple]], out: Path
) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", address, timedelta(seconds=60), world_size=world, rank=rank)
    results = {}
    for name, case, arguments in cases:
        try:
            case(*arguments)
            results[name] = ""
        except BaseException:
            results[name] = f"rank {rank}: {traceback.format_exc()}"
        (out / f"rank{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
