"""A small model under any layout, and its gradients and losses gathered back to unsharded tensors."""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from based_megatron.config import Config, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from based_megatron.data.batch import MicroBatch
from based_megatron.data.slices import MOST_SLICES, NO_SLICE
from based_megatron.model.build import build_model
from based_megatron.parallel.linear import shard_spec
from based_megatron.parallel.megatron import parallel_state
from based_megatron.parallel.sequence.documents import Documents
from based_megatron.parallel.sequence.slices import even_bounds, slice_of
from based_megatron.parallel.topology import Topology, build_topology
from based_megatron.train.optimizer import build_engine, set_learning_rate
from based_megatron.train.step import Step, build_step
from support.pool import rank_device

SEQUENCE_TOKENS, GLOBAL_BATCH, VOCAB = 32, 8, 91


def small_config(
    parallel: ParallelConfig | None = None, *, model: dict[str, Any] | None = None, **train: Any
) -> Config:
    """Every mixer, an odd vocabulary (padded under tensor parallelism) and a window longer than a context slice.

    model: other settings of the model, beside its size.
    """
    return Config(
        model=ModelConfig(
            hidden_size=32,
            ffn_hidden_size=48,
            num_heads=4,
            feature_dim=8,
            window_left=11,
            vocab_size=VOCAB,
            vocab_multiple=1,
            init_std=0.2,
            **{"layer_pattern": "cLSA", **(model or {})},
        ),
        data=DataConfig(path="unused", sequence_length_tokens=SEQUENCE_TOKENS),
        parallel=dataclasses.replace(parallel or ParallelConfig(), zero_bucket_elements=10_000),
        optimizer=OptimizerConfig(clip_grad_norm=train.pop("clip_grad_norm", 0.0)),
        # The reference takes fp64, as most of these tests do, on any device.
        train=TrainConfig(
            global_batch_sequences=GLOBAL_BATCH,
            **{"micro_batch_sequences": 2, "backend": "reference", "precision": "fp32", **train},
        ),
    )


def global_batch(step: int, packed: bool) -> dict[str, Tensor]:
    """Tokens, labels, an uneven mask and random documents of one optimizer step; the same on every rank."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, VOCAB, (GLOBAL_BATCH, SEQUENCE_TOKENS + 1), generator=generator)
    mask = (torch.rand(GLOBAL_BATCH, SEQUENCE_TOKENS, generator=generator) < 0.7).float()
    mask[: GLOBAL_BATCH // 2, SEQUENCE_TOKENS // 2 :] = 0
    starts = torch.rand(GLOBAL_BATCH, SEQUENCE_TOKENS, generator=generator) < 0.1
    starts[1] = False
    starts[2, SEQUENCE_TOKENS // 2] = True
    starts[:, 0] = False
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "mask": mask}
    return {**batch, "ids": starts.cumsum(1).int()} if packed else batch


def slice_numbers(step: int) -> Tensor:
    """uint8 [B, S] random slices, some positions in none; what has no loss for training may be in one."""
    generator = torch.Generator().manual_seed(200 + step)
    numbers = torch.randint(0, 7, (GLOBAL_BATCH, SEQUENCE_TOKENS), generator=generator)
    return numbers.masked_fill(numbers == 6, NO_SLICE).masked_fill(numbers == 5, MOST_SLICES - 1).to(torch.uint8)


def local_micro_batches(
    batch: dict[str, Tensor], topology: Topology, micro_batch: int, bounds: tuple[int, ...] = ()
) -> list[MicroBatch]:
    """The micro batches that the loader would give this rank, in even slices if no bounds are given."""
    per_rank = GLOBAL_BATCH // topology.data.size
    rows = slice(topology.data.rank * per_rank, (topology.data.rank + 1) * per_rank)
    bounds = bounds or even_bounds(SEQUENCE_TOKENS, topology.context.size)
    columns = slice_of(bounds, topology.context.rank)
    parts = [batch[key][rows, columns].contiguous().split(micro_batch) for key in ("tokens", "labels", "mask")]
    slices = batch["slices"][rows, columns].split(micro_batch) if "slices" in batch else [None] * len(parts[0])
    ids = batch["ids"][rows].split(micro_batch) if "ids" in batch else [None] * len(parts[0])
    documents = [None if part is None else Documents.from_ids(part) for part in ids]
    first_rows = range(rows.start, rows.stop, micro_batch)
    return [
        MicroBatch(*part, bounds, row, of_slices)
        for row, of_slices, part in zip(first_rows, slices, zip(*parts, documents, strict=True), strict=True)
    ]


@dataclasses.dataclass
class Run:
    """One built layout."""

    topology: Topology
    step: Step
    engine: Any
    config: Config
    bounds: tuple[int, ...] = ()
    """First positions of the context slices, and S; slices are even if it is empty."""

    def train_step(self, number: int, packed: bool, lr: float = 3e-3) -> tuple[float, float]:
        """(mean loss, gradient norm) of one optimizer step."""
        set_learning_rate(self.engine, lr)
        batches = local_micro_batches(
            global_batch(number, packed), self.topology, self.config.train.micro_batch_sequences, self.bounds
        )
        loss = self.step.accumulate(batches)
        return float(loss.mean), float(self.step.update().grad_norm)

    def held_out(self, number: int, packed: bool) -> tuple[float, list[list[float]]]:
        """(mean loss, [loss, tokens] of each slice) of a validation on the data of a step."""
        batch = global_batch(number, packed) | {"slices": slice_numbers(number)}
        micro_batch = self.config.train.micro_batch_sequences
        found = self.step.evaluate(local_micro_batches(batch, self.topology, micro_batch, self.bounds))
        assert found.slices is not None
        return float(found.mean), found.slices.tolist()


_newest: list[tuple[ParallelConfig, Topology]] = []


def topology_of(parallel: ParallelConfig | None = None) -> Topology:
    """Groups of a layout over the joined ranks, on the device of the tests; the newest ones if they are of that layout.

    NCCL keeps memory of the GPU for each group, of which a layout has dozens, and Megatron never frees them.
    """
    parallel = parallel or ParallelConfig()
    in_use = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
    if not (_newest and _newest[0][0] == parallel and _newest[0][1].tensor.group is in_use):
        _newest[:] = [(parallel, build_topology(parallel, rank_device(dist.get_rank())))]
    return _newest[0][1]


def build_run(config: Config, bounds: tuple[int, ...] = (), node_ranks: int = 0) -> Run:
    """Build a layout over the joined ranks."""
    topology = build_topology(config.parallel, rank_device(dist.get_rank()), node_ranks)
    chunks = build_model(config, topology)
    engine = build_engine(chunks, config, topology)
    return Run(topology, build_step(chunks, engine, topology, config.parallel.zero_stage), engine, config, bounds)


def gather_unsharded(pieces: dict[str, tuple[Any, Tensor]]) -> dict[str, Tensor]:
    """Unsharded tensors on rank 0 from each rank's {name: (ShardSpec, local tensor)}; an empty dict on others."""
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, pieces)
    full: dict[str, Tensor] = {}
    for rank_pieces in everything if dist.get_rank() == 0 else []:
        for name, (spec, local) in rank_pieces.items():
            target = full.setdefault(name, torch.full(spec.shape, float("nan"), dtype=local.dtype))
            for region in spec.regions():
                region.of_global(target).copy_(region.of_local(local))
    return full


def parameters_of(run: Run) -> dict[str, tuple[Any, Tensor]]:
    """Local parameters by global name."""
    run.engine.settle()
    return {
        shard_spec(p).name: (shard_spec(p), p.detach().clone()) for chunk in run.step.chunks for p in chunk.parameters()
    }
