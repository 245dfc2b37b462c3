"""Sizes of what the Triton backend keeps for its backward, without Triton.

Chunks, tiles and segments are those of `triton_attention.Schedule`'s defaults, which a test compares.
"""

from based_megatron.kernels.packing import packed_rows

CHUNK_TOKENS, TILE_ROWS, SCAN_ROWS, PROGRAMS_WANTED = 128, 32, 64, 384
NORMALISER_PARTS = 4
MINIMUM_PERIOD = 8
CHUNKS_OF_A_SEGMENT = 4
"""At least so many: the start of a segment costs its tiles a second state."""


def saved_state_numbers(heads: int, tokens: int, feature_dim: int, head_dim: int, square: bool = False) -> int:
    """Numbers, of the inputs' dtype, in the states of all chunks and segments.

    heads: those of all sequences together.
    """
    period = max(MINIMUM_PERIOD, 1 << (feature_dim - 1).bit_length())
    rows = -(-packed_rows(period, square) // TILE_ROWS) * TILE_ROWS
    chunks = -(-tokens // CHUNK_TOKENS)
    wanted = PROGRAMS_WANTED // (heads * -(-rows // SCAN_ROWS))
    segment_chunks = -(-chunks // max(1, min(wanted, chunks // CHUNKS_OF_A_SEGMENT)))
    segments = -(-chunks // segment_chunks)
    return heads * (chunks + (segments if segments > 1 else 0)) * rows * (head_dim + NORMALISER_PARTS)
