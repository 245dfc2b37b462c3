"""What the loader hands to the training step."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """One micro batch on one rank.

    B sequences, S tokens of a whole sequence, L tokens of this context parallel slice.
    """

    tokens_BL: Tensor
    """int64 inputs."""
    labels_BL: Tensor
    """int64 next tokens. Shifted before slicing: the last label of a slice is the first input of the next."""
    loss_mask_BL: Tensor
    """float32, 1 where the label counts in the loss."""
    document_ids_BS: Tensor | None
    """int32 ids of the documents of the whole sequence, non-decreasing from 0; None if documents are not isolated."""


def slice_bounds(length: int, rank: int, size: int) -> tuple[int, int]:
    """First and past-the-last position of a rank's contiguous part.

    The first ranks are one longer where `size` does not divide `length`.
    """
    share, longer = divmod(length, size)
    start = rank * share + min(rank, longer)
    return start, start + share + (rank < longer)
