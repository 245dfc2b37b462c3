"""The micro batch that the loader hands to the training step.

Legend: B sequences, S tokens of a whole sequence, L tokens of this context parallel slice.
"""

from dataclasses import dataclass

from torch import Tensor

from based_megatron.parallel.sequence.documents import Documents


@dataclass(frozen=True)
class MicroBatch:
    """One micro batch on one rank."""

    tokens_BL: Tensor
    """int64 inputs."""
    labels_BL: Tensor
    """int64 next tokens. Shifted before slicing: the last label of a slice is the first input of the next."""
    loss_mask_BL: Tensor
    """float32, 1 where the label counts in the loss."""
    documents: Documents | None
    """Starts of documents in the whole sequences; None if documents are not isolated."""
    bounds: tuple[int, ...]
    """First position of each context parallel slice, and S."""
    row: int = 0
    """Row of the global batch that its first sequence is; others follow. With carried states the same row goes on in the next step."""
    slices_BL: Tensor | None = None
    """uint8 number of the slice that each label's loss is added to, whatever the loss mask says; None if nobody asks."""
    sources: tuple[str, ...] = ()
    """Corpus that each sequence is from; empty unless the data is a mixture."""
