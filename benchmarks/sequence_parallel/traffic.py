"""Bytes that each rank sends for one layer in one pass, in our and other ways to share a sequence.

Legend: P ranks, L tokens of a rank's slice, G ranks of a node, N nodes. One sequence in a micro batch, one tensor parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from based_megatron.config import Config, ModelConfig, ParallelConfig
from based_megatron.config.pattern import parse_layer_pattern
from based_megatron.kernels.packing import packed_rows
from based_megatron.parallel.buckets import cut_into_buckets
from based_megatron.preflight.shapes import local_parameters

STATE_NUMBER_BYTES = 4
"""States are fp32 on the wire."""
BUCKET_ELEMENTS_OF_A_RANK = 400_000


@dataclass(frozen=True)
class LayerTraffic:
    """Sizes of a model that its exchanges depend on."""

    letters: str
    """Mixer of each layer, as in `model.layer_pattern` written out."""
    heads: int
    feature_dim: int
    head_dim: int
    window_left: int
    conv_channels: int
    conv_taps: int
    number_bytes: int = 2
    """Bytes of a number of the activations."""
    groups: tuple[tuple[tuple[str, int], ...], ...] = ()
    """Name and elements of each parameter, in the groups of the optimizer; the embedding comes first."""

    @classmethod
    def of(cls, model: ModelConfig) -> LayerTraffic:
        return cls(
            "".join(parse_layer_pattern(model.layer_pattern)),
            model.num_heads,
            model.feature_dim,
            model.hidden_size // model.num_heads,
            model.window_left,
            model.hidden_size * model.conv_expand // 2,
            model.conv_kernel,
            groups=_groups(Config(model=model)),
        )

    def zero_buckets(self, ranks: int) -> list[int]:
        """Elements of each bucket of ZeRO-1, of the size that docs/parallelism.md advises for so many ranks."""
        elements = max(ParallelConfig().zero_bucket_elements, BUCKET_ELEMENTS_OF_A_RANK * ranks)
        cut = ((sizes, places) for sizes in self.groups for places in cut_into_buckets(sizes, elements))
        return [sum(sizes[place][1] for place in places) for sizes, places in cut]

    @property
    def state_bytes(self) -> int:
        """m: packed moments with the normaliser's column."""
        return self._state_bytes(packed_rows(self.feature_dim))

    @property
    def unpacked_state_bytes(self) -> int:
        """Bytes of moments that keep both x_a x_b and x_b x_a."""
        return self._state_bytes(1 + self.feature_dim + self.feature_dim**2)

    @property
    def window_halo_bytes(self) -> int:
        """Keys and values of the window."""
        return self.window_left * self._token_bytes(2 * self.head_dim)

    @property
    def conv_halo_bytes(self) -> int:
        return (self.conv_taps - 1) * self.conv_channels * self.number_bytes

    def all_gather_bytes(self, ranks: int, state_bytes: float) -> float:
        """LASP-2 (arXiv 2502.07563), and our form for few ranks: (P - 1) m."""
        return (ranks - 1) * state_bytes

    def two_level_bytes(self, ranks: int, node_ranks: int) -> tuple[float, float]:
        """(inside nodes, between nodes): 2 (G - 1) / G m and (N - 1) / G m."""
        inside = min(ranks, node_ranks)
        nodes = -(-ranks // node_ranks)
        return 2 * (inside - 1) / inside * self.state_bytes, (nodes - 1) / inside * self.state_bytes

    def linear_all_to_all_bytes(self, tokens: int) -> float:
        """Ulysses (arXiv 2309.14509) in a linear attention layer: q, k, v in and o out, of which (P - 1) / P are sent."""
        return tokens * self._token_bytes(2 * self.feature_dim + 2 * self.head_dim)

    def window_all_to_all_bytes(self, tokens: int) -> float:
        """Ulysses in a window layer."""
        return tokens * self._token_bytes(4 * self.head_dim)

    def ring_attention_bytes(self, ranks: int, tokens: int) -> float:
        """Ring attention (arXiv 2310.01889) in a window layer: all keys and values pass by every rank."""
        return (ranks - 1) * self.slice_keys_bytes(tokens)

    def slice_keys_bytes(self, tokens: int) -> float:
        """Keys and values of a slice."""
        return tokens * self._token_bytes(2 * self.head_dim)

    def _state_bytes(self, rows: int) -> int:
        return STATE_NUMBER_BYTES * self.heads * rows * (self.head_dim + 1)

    def _token_bytes(self, numbers_of_a_head: int) -> int:
        return self.number_bytes * self.heads * numbers_of_a_head


def _groups(config: Config) -> tuple[tuple[tuple[str, int], ...], ...]:
    parameters = local_parameters(config, 0)
    return tuple(tuple((p.name, p.numel) for p in parameters if p.decayed == decayed) for decayed in (False, True))
