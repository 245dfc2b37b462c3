"""Memory of one rank in parts, from the code that allocates it: weights, gradients, optimizer, activations, logits, states.

ZeRO over P data x context ranks, n parameters of the rank, each group padded to a multiple of 2 P, b bytes of a weight:

    its optimizer (parallel/deepspeed.py)    weights     gradients                              optimizer
    BF16_Optimizer, stage 1 in bf16          2 n         4 n in fp32                            (4 + 8) n / P
    DeepSpeedZeroOptimizer, stage 1 in fp32  4 n         4 n, and their partition 4 n / P       (4 + 8) n / P
    DeepSpeedZeroOptimizer, stage 2          b n         4 n / P, and a bucket on its way       (4 + 8) n / P
    DeepSpeedZeroOptimizer_Stage3            b n / P     4 n / P, and a bucket on its way       (4 + 8) n / P
                                             + what is gathered

Muon keeps one moment of matrices, so 4 instead of 8. The peak is the largest of backward's start at the head, of a block's
backward, of the embedding's gradient, and of the optimizer step. Stage 2 has no gradients when the first backward of a step begins.
"""

from dataclasses import dataclass
from math import prod

from based_megatron.config import Config
from based_megatron.config.validate import data_parallel_size
from based_megatron.model.build import DTYPES
from based_megatron.model.mixers import layer_mixers
from based_megatron.parallel.buckets import cut_into_buckets
from based_megatron.parallel.sharding import VOCAB_MULTIPLE, rows_of_rank
from based_megatron.preflight.activations import (
    ChunkActivations,
    chunk_activations,
    micro_batch_piece,
    micro_batches_in_flight,
)
from based_megatron.preflight.shapes import LocalParameter, local_parameters, stages_of_rank
from based_megatron.train.carried import carried_bytes

FP32_BYTES = 4
ADAM_MOMENTS, MUON_MOMENTS = 2, 1
LIVE_ELEMENTS = 1_000_000_000
"""Elements of gathered parameters that ZeRO-3 keeps at most (DeepSpeed's stage3_max_live_parameters)."""
WORKSPACE_BYTES = 64 * 2**20
"""Work memory of cuBLAS, and small tensors."""
CONTEXT_BYTES = 640 * 2**20
"""CUDA context and loaded kernels, outside of PyTorch's allocator."""
COMMUNICATOR_BYTES = 256 * 2**20
"""NCCL buffers of a group of several ranks, outside of PyTorch's allocator."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank, at the peak of a training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for backward, and what one layer's backward needs besides if that is where the peak is."""
    logits: int
    """With the gradients of the output projection."""
    states: int
    """Received or carried states of linear attention, windows and convolutions."""
    buffers: int
    """Copies and buckets of the reduction, gathered weights, inboxes of tensor parallel ranks, cuBLAS."""
    outside: int
    """CUDA context and NCCL, outside of PyTorch's allocator."""
    host_checkpoint: int
    """Host memory, not the device's: the copy of this rank's fp32 weights, moments and carried states that a thread writes."""

    @property
    def allocated(self) -> int:
        """What torch.cuda.max_memory_allocated reports."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.logits, self.states, self.buffers)
        return sum(parts)

    @property
    def total(self) -> int:
        """On the device."""
        return self.allocated + self.outside


@dataclass(frozen=True)
class ModelMemory:
    """Bytes that stay from step to step."""

    weights: int
    gradients: int
    optimizer: int
    partition_elements: int
    """Padded elements of this rank's share."""
    reduction_copy: int
    """Buffers of the optimizer step, when no activations are held."""
    buckets: int
    """Buffers of backward, while gradients are reduced or weights gathered."""


def worst_rank(config: Config, world_size: int) -> RankMemory:
    """Memory of the rank that needs most."""
    stages = range(config.parallel.pipeline)
    return max((rank_memory(config, world_size, stage) for stage in stages), key=lambda memory: memory.total)


def rank_memory(config: Config, world_size: int, pipeline_rank: int) -> RankMemory:
    """Memory of a rank of one pipeline stage; the config must be valid for the world size."""
    parallel = config.parallel
    data = data_parallel_size(parallel, world_size)
    model = model_memory(config, data * parallel.context, local_parameters(config, pipeline_rank))
    micro_batches = config.train.global_batch_sequences // (config.train.micro_batch_sequences * data)
    phase = _largest_phase(config, pipeline_rank, micro_batches, model)
    groups = sum(size > 1 for size in (parallel.tensor, parallel.context, parallel.pipeline, data))
    return RankMemory(
        weights=model.weights,
        gradients=phase.gradients,
        optimizer=model.optimizer,
        activations=phase.activations,
        logits=phase.logits,
        states=states_bytes(config, pipeline_rank, micro_batches),
        buffers=phase.buffers + WORKSPACE_BYTES + _inbox_bytes(config),
        outside=CONTEXT_BYTES + groups * COMMUNICATOR_BYTES,
        host_checkpoint=model.optimizer + _carried_share(config, data) if config.checkpoint.asynchronous else 0,
    )


def _inbox_bytes(config: Config) -> int:
    """Two buffers of the rows of all tensor parallel ranks (parallel/symmetric.py)."""
    parallel, piece = config.parallel, micro_batch_piece(config)
    if parallel.tensor == 1 or not parallel.sequence_parallel or parallel.overlap_tensor != "memory":
        return 0
    return 2 * piece.sequences * piece.tokens * config.model.hidden_size * piece.number_bytes


def _carried_share(config: Config, data: int) -> int:
    """Bytes of the carried states of a rank that begins sequences."""
    return -(-carried_bytes(config) // (data * config.parallel.tensor * config.parallel.pipeline))


def model_memory(config: Config, shards: int, parameters: list[LocalParameter]) -> ModelMemory:
    """What ZeRO keeps of these parameters on each of `shards` ranks."""
    stage, b = config.parallel.zero_stage, DTYPES[config.train.precision].itemsize
    is_muon = config.optimizer.name == "muon"
    groups: dict[bool, list[LocalParameter]] = {True: [], False: []}
    for parameter in parameters:
        groups[parameter.is_matrix_of_block if is_muon else parameter.decayed].append(parameter)
    if stage == 3:
        shares = {key: sum(-(-p.numel // shards) for p in group) for key, group in groups.items()}
    else:
        cuts = stage == 1 and b == 2 and shards > 1
        shares = {
            key: _padded_share(
                group, shards, config.parallel.zero_bucket_elements if cuts and not (is_muon and key) else 0
            )
            for key, group in groups.items()
        }
    elements = {key: share * shards for key, share in shares.items()}
    whole, share = sum(elements.values()), sum(shares.values())
    moments = sum(shares[key] * (MUON_MOMENTS if is_muon and key else ADAM_MOMENTS) for key in shares)
    bucket = min(config.parallel.zero_bucket_elements, whole)
    sends_fp32 = FP32_BYTES if b != FP32_BYTES else 0
    copy = buckets = 0
    if stage == 1 and b == 2:
        gradients = FP32_BYTES * whole
    elif stage == 1:
        gradients, copy = b * whole, b * config.parallel.zero_bucket_elements + FP32_BYTES * share
    else:
        gradients = FP32_BYTES * share
        buckets = b * config.parallel.zero_bucket_elements + sends_fp32 * max(bucket, max(p.numel for p in parameters))
        copy = FP32_BYTES * share
    weights = b * whole
    if stage == 3:
        weights = b * share
        buckets += b * min(whole, LIVE_ELEMENTS)
    return ModelMemory(weights, gradients, FP32_BYTES * (share + moments), share, copy, buckets)


def states_bytes(config: Config, pipeline_rank: int, micro_batches: int) -> int:
    """States that this rank receives and keeps for a recomputation, and those that it carries from step to step."""
    model, parallel, dtype = config.model, config.parallel, DTYPES[config.train.precision]
    mixers = layer_mixers(model)
    layers = [mixers[i] for stage in stages_of_rank(config, pipeline_rank) for i in stage.layers]
    sequence_bytes = sum(
        prod(form.shape) * form.dtype.itemsize // parallel.tensor
        for mixer in layers
        for form in mixer.carried_forms(model, dtype).values()
    )
    micro_batch_bytes = sequence_bytes * config.train.micro_batch_sequences
    kept = 1 if parallel.context > 1 else 0
    # Those of the step before, and those of the next.
    carried = 2 * micro_batches if config.data.carry_state else 0
    return micro_batch_bytes * (kept + carried)


@dataclass(frozen=True)
class _Phase:
    """A moment of a step, and what is held only then."""

    activations: int
    logits: int
    buffers: int
    gradients: int

    @property
    def bytes(self) -> int:
        return self.activations + self.logits + self.buffers + self.gradients


def _largest_phase(config: Config, pipeline_rank: int, micro_batches: int, model: ModelMemory) -> _Phase:
    chunks = [chunk_activations(config, stage) for stage in stages_of_rank(config, pipeline_rank)]
    in_flight = micro_batches_in_flight(config, pipeline_rank, micro_batches)
    saved = _saved_in_flight(chunks, in_flight)
    last = chunks[-1]
    columns = rows_of_rank(config.model.embedding_rows, config.parallel.tensor, VOCAB_MULTIPLE)
    embedding = columns * config.model.hidden_size * DTYPES[config.train.precision].itemsize
    holds_embedding = pipeline_rank == 0
    tied = embedding if last.logits and config.model.tie_embeddings else 0
    # DeepSpeed's stage 2 frees its gradients at the update: the first backward of a step begins without any.
    at_head = 0 if config.parallel.zero_stage == 2 and micro_batches == 1 else model.gradients
    block_work = max(c.rematerialised + c.block_work for c in chunks)
    phases = [
        _Phase(saved + last.head_saved, last.logits + last.head_work, model.buckets, at_head),
        _Phase(saved + block_work, tied, model.buckets, at_head),
        _Phase(block_work, tied, model.buckets, model.gradients),
        _Phase(0, 0, model.reduction_copy, model.gradients),
    ]
    if holds_embedding:
        # The gradient, the tied projection's, and their sum on its way into the fp32 gradient.
        summed = 2 * embedding + FP32_BYTES * columns * config.model.hidden_size
        phases.append(_Phase(0, tied, summed + model.buckets, model.gradients))
    return max(phases, key=lambda phase: phase.bytes)


def _saved_in_flight(chunks: list[ChunkActivations], in_flight: int) -> int:
    """Passes are spread over the chunks of a rank as evenly as the interleaved schedule does."""
    whole, rest = divmod(in_flight, len(chunks))
    return whole * sum(chunk.saved for chunk in chunks) + sum(chunk.saved for chunk in chunks[:rest])


def _padded_share(parameters: list[LocalParameter], shards: int, bucket_elements: int) -> int:
    """Elements that each of `shards` ranks owns of the flat tensors of a group, cut into buckets if they have a size."""
    sizes = [(parameter.name, parameter.numel) for parameter in parameters]
    buckets = cut_into_buckets(sizes, bucket_elements) if bucket_elements else [range(len(sizes))]
    return sum(2 * -(-sum(sizes[place][1] for place in places) // (2 * shards)) for places in buckets)
