"""Activations of one micro batch on one rank: what is kept for backward, by recompute mode, and the largest work buffers.

Counted from the tensors that each autograd function saves. With N tokens of a rank (N / tensor for norms and residuals under
sequence parallelism), D hidden size, F MLP width and b bytes of a number of the weights:

    block    two norms: fp32 sum 4 N D, scales 4 N, output b N D (of all tensor parallel ranks if parallel.overlap_tensor);
             MLP: b N (2 F + F);  mixer: Mixer.saved_bytes
    mixer    recomputed: as a block without what the mixer saves
    full     recomputed: the fp32 residual, 4 N D
    head     final norm 4 N D + 4 N + b N D, and the logits b N U, which their gradient overwrites
"""

from dataclasses import dataclass

from based_megatron.config import Config
from based_megatron.model.build import DTYPES
from based_megatron.model.mixers import layer_mixers
from based_megatron.model.mixers.facts import SavedPiece
from based_megatron.parallel.sharding import VOCAB_MULTIPLE, rows_of_rank
from based_megatron.parallel.stages import Stage

RESIDUAL_BYTES = 4
"""Residuals, scales of norms and sums of the loss are fp32."""
INDEX_BYTES = 8


@dataclass(frozen=True)
class ChunkActivations:
    """Bytes of one model chunk and micro batch."""

    saved: int
    """Kept from forward to backward, the head left out."""
    rematerialised: int
    """Largest of what one layer saves again in its backward, while it is recomputed."""
    block_work: int
    """Gradients that the backward of one block holds at a time."""
    head_saved: int
    """Final norm and loss; 0 but on the last stage."""
    logits: int
    head_work: int
    """Gradients of the output projection: its input's, and its weight's, which waits for the embedding's if they are tied."""


def chunk_activations(config: Config, stage: Stage) -> ChunkActivations:
    """Bytes of a model chunk, with the kernels of a GPU."""
    model, mode = config.model, config.train.recompute
    D, F, tensor = model.hidden_size, model.ffn_hidden_size, config.parallel.tensor
    piece = micro_batch_piece(config)
    b, N = piece.number_bytes, piece.sequences * piece.tokens
    shares = config.parallel.sequence_parallel and tensor > 1
    held = N // tensor if shares else N
    """Tokens of norms and residuals on this rank."""

    norm_bytes = held * D * (RESIDUAL_BYTES + b) + held * RESIDUAL_BYTES
    others = (N - held) * D * b
    """Rows of other ranks that a column layer keeps with this rank's output of the norm."""
    overlaps = config.parallel.overlap_tensor != "off"
    mlp_bytes = 3 * N * F // tensor * b + overlaps * others
    mixers = [layer_mixers(model)[i] for i in stage.layers]
    mixed = [mixer.saved_bytes(model, piece) for mixer in mixers]
    if overlaps or config.parallel.context > 1:
        mixed = [size + others for size in mixed]
    outside_mixer = 2 * norm_bytes + mlp_bytes
    residual = held * D * RESIDUAL_BYTES
    saved = {
        "none": sum(mixed) + len(mixed) * outside_mixer,
        "mixer": len(mixed) * outside_mixer,
        "full": len(mixed) * residual,
    }[mode]
    again = {"none": 0, "mixer": max(mixed), "full": max(mixed) + outside_mixer}[mode]
    block_work = 2 * residual + held * D * b + max(max(mixed), mlp_bytes)
    head = stage.is_last
    columns = rows_of_rank(config.model.embedding_rows, tensor, VOCAB_MULTIPLE)
    return ChunkActivations(
        saved=saved,
        rematerialised=again,
        block_work=block_work,
        head_saved=(norm_bytes + overlaps * others + N * (INDEX_BYTES + 2 * RESIDUAL_BYTES)) if head else 0,
        logits=N * columns * b if head else 0,
        head_work=(N * D * b + columns * D * b) if head else 0,
    )


def micro_batch_piece(config: Config) -> SavedPiece:
    """The largest slice of a micro batch that a rank has."""
    length, parallel = config.data.sequence_length_tokens, config.parallel
    return SavedPiece(
        config.train.micro_batch_sequences,
        -(-length // parallel.context),
        DTYPES[config.train.precision].itemsize,
        parallel.tensor,
        config.data.isolate_documents,
    )


def micro_batches_in_flight(config: Config, pipeline_rank: int, micro_batches: int) -> int:
    """Forward passes of a chunk that wait for their backward at the peak, over all chunks of a rank (1F1B, or interleaved)."""
    stages, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline
    if stages == 1:
        return 1
    if chunks == 1:
        return min(micro_batches, stages - pipeline_rank)
    warm_up = 2 * (stages - pipeline_rank - 1) + (chunks - 1) * stages
    return min(micro_batches * chunks, warm_up + 1)
