"""Taylor linear attention on Triton: states of chunks, outputs, adjoint states and gradients, each an entry point.

Legend: B batch, T sequence, H heads, F feature dim, V value head dim, R packed feature rows, P padded rows, N chunks.

Forward:  `chunk_states` (k, v, initial state)  ->  `attend` (q, k, v, states)  ->  o, 1/Z
Backward: `output_gradients` (do, o, 1/Z)  ->  `adjoint_states` (q, g, gradient of the final state)  ->  `query_gradients`, `key_gradients`
`segment_moments` is the part of either sweep that needs no earlier state; a sequence-parallel rank sends it early.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from based_megatron.kernels.layout import ids_or, laid_out_like, strides
from based_megatron.kernels.packing import packed_rows
from based_megatron.kernels.taylor_attention import triton_kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Schedule:
    """Tile sizes in tokens or rows, all powers of two. A chunk is a multiple of its tiles."""

    chunk_tokens: int = 128
    sweep_tokens: int = 64
    output_tokens: int = 64
    gradient_tokens: int = 64
    sweep_rows: int = 64
    tile_rows: int = 32
    sweep_stages: int = 2
    """Chunks whose loads are under way."""
    state_stages: int = 2
    """The same for blocks of a chunk's state."""
    programs_wanted: int = 384
    """Programs of a sweep that fill a GPU: shorter segments of the sequence are swept side by side to reach it."""


def _warps(tile_tokens: int) -> int:
    """One warp group for every 64 tokens."""
    return 4 * max(1, tile_tokens // 64)


class ChunkStates(NamedTuple):
    """Weighted states, one per chunk, as operands of matrix products."""

    values_BHNPV: Tensor
    """In the dtype of the inputs."""
    normalisers_BHNP4: Tensor
    """Rounded parts: the first and the second, which add up to the normaliser; the first again; unused."""


def _period(feature_dim: int) -> int:
    """P: the feature dim as the kernels' order of rows needs it."""
    return max(8, triton.next_power_of_2(feature_dim))


def _rows_stored(feature_dim: int, tile_rows: int) -> int:
    """Rows of a chunk's state: whole blocks."""
    return triton.cdiv(packed_rows(_period(feature_dim)), tile_rows) * tile_rows


class _Launch:
    """What all kernels of one call have in common."""

    def __init__(self, x_BTHF: Tensor, y_BTHV: Tensor, ids_BT: Tensor | None, schedule: Schedule) -> None:
        self.B, self.T, self.H, F = x_BTHF.shape
        V = y_BTHV.shape[-1]
        self.schedule, self.device = schedule, x_BTHF.device
        self.chunks = triton.cdiv(self.T, schedule.chunk_tokens)
        self.rows_stored = _rows_stored(F, schedule.tile_rows)
        self.ids, self.ids_stride = ids_or(x_BTHF, None if ids_BT is None else ids_BT.to(torch.int32))
        self.constants = {
            "feature_dim": F,
            "period": _period(F),
            "width": max(16, _period(F)),
            "value_dim": V,
            "value_width": max(16, triton.next_power_of_2(V)),
            "rows_stored": self.rows_stored,
            "chunk_tokens": schedule.chunk_tokens,
            "has_ids": ids_BT is not None,
            "even": self.T % schedule.chunk_tokens == 0,
            # Three products of tf32 parts: fp32 accuracy from the tensor cores.
            "precision": "tf32x3" if x_BTHF.dtype == torch.float32 else "tf32",
        }
        self.state_shape = (self.B, self.H, packed_rows(F), V + 1)

    @property
    def blocks(self) -> int:
        """Blocks of rows of a state."""
        return triton.cdiv(self.rows_stored, self.schedule.sweep_rows)

    def new_states(self, dtype: torch.dtype) -> ChunkStates:
        shape = (self.B, self.H, self.chunks, self.rows_stored)
        return ChunkStates(
            torch.empty(*shape, self.constants["value_dim"], dtype=dtype, device=self.device),
            torch.empty(*shape, 4, dtype=dtype, device=self.device),
        )

    def tiles(self, tokens: int) -> tuple[int, int]:
        """Grid of the kernels that treat all tiles at once."""
        return triton.cdiv(self.T, tokens), self.B * self.H

    def tile_options(self, tokens: int) -> dict[str, Any]:
        """Constants and launch options of these kernels."""
        return {
            "tile_tokens": tokens,
            "state_stages": self.schedule.state_stages,
            "block_rows": self.schedule.tile_rows,
            "num_warps": _warps(tokens),
            "num_stages": 2,
            **self.constants,
        }


class Sweep:
    """One direction over the sequence: x are the tokens' vectors, y their values."""

    def __init__(
        self, x_BTHF: Tensor, y_BTHV: Tensor, yz_BHT4: Tensor | None, ids_BT: Tensor | None, schedule: Schedule
    ) -> None:
        """Forward without yz, where it is a one for each token; adjoint with it."""
        self.x, self.y, self.yz, self.adjoint = x_BTHF, y_BTHV, yz_BHT4, yz_BHT4 is not None
        self.launch = _Launch(x_BTHF, y_BTHV, ids_BT, schedule)
        chunks, wanted = (
            self.launch.chunks,
            schedule.programs_wanted // (self.launch.B * self.launch.H * self.launch.blocks),
        )
        # Each segment costs a state in memory and a second sweep, so it must be worth some chunks.
        self.segment_chunks = triton.cdiv(chunks, max(1, min(wanted, chunks // 4)))
        self.segments = triton.cdiv(chunks, self.segment_chunks)
        """Pieces of whole chunks that are swept side by side."""

    def _run(self, starts: Tensor | None, states: ChunkStates | None, first_segment: int, segments: int) -> Tensor:
        launch, schedule = self.launch, self.launch.schedule
        B, H, R, E = launch.state_shape
        ends = torch.empty(B, H, self.segments, R, E, dtype=torch.float32, device=launch.device)
        triton_kernels.sweep[launch.blocks, segments, B * H](
            self.x, self.y, ends if self.yz is None else self.yz, launch.ids,
            ends if starts is None else starts, *((ends, ends) if states is None else states), ends,
            *strides(self.x, self.y), launch.ids_stride, launch.T, H, launch.chunks,
            self.segments, self.segment_chunks, first_segment,
            tile_tokens=schedule.sweep_tokens, block_rows=schedule.sweep_rows, adjoint=self.adjoint,
            has_start=starts is not None, writes_states=states is not None,
            num_warps=4, num_stages=schedule.sweep_stages, **launch.constants,
        )  # fmt: skip
        return ends

    def moments(self) -> Tensor:
        """The state that leaves the sequence if none enters it, [B, H, R, V + 1] fp32."""
        ends = self._run(None, None, 0, self.segments)
        return ends[:, :, 0] if self.segments == 1 else self._combined(ends, None, add_last=True)

    def states(self, initial: Tensor | None) -> ChunkStates:
        """The states before the chunks."""
        return self._states(initial)[0]

    def _states(self, initial: Tensor | None) -> tuple[ChunkStates, Tensor]:
        starts = initial
        if self.segments > 1:
            # The last segment's moments lead nowhere.
            moments = self._run(None, None, 1 if self.adjoint else 0, self.segments - 1)
            starts = self._combined(moments, initial)
        states = self.launch.new_states(self.x.dtype)
        ends = self._run(starts, states, 0, self.segments)
        return states, ends[:, :, 0 if self.adjoint else -1]

    def _combined(self, moments: Tensor, initial: Tensor | None, add_last: bool = False) -> Tensor:
        """States before the segments [B, H, segments, R, V + 1]; with `add_last`, the one after them all instead."""
        launch = self.launch
        B, H, R, E = launch.state_shape
        starts = torch.empty(B, H, R, E, device=launch.device) if add_last else torch.empty_like(moments)
        block = 256
        triton_kernels.combine[triton.cdiv(R * E, block), B * H](
            moments, moments if initial is None else initial, starts, launch.ids, launch.ids_stride, launch.T, H,
            self.segments, self.segment_chunks * launch.schedule.chunk_tokens, R * E,
            adjoint=self.adjoint, has_initial=initial is not None, has_ids=launch.constants["has_ids"],
            add_last=add_last, block_elements=block,
        )  # fmt: skip
        return starts


def sweep_keys(k_BTHF: Tensor, v_BTHV: Tensor, ids_BT: Tensor | None, schedule: Schedule) -> Sweep:
    """From left to right: sum_j packed(k_j) [v_j; 1] over the last token's document."""
    return Sweep(k_BTHF, v_BTHV, None, ids_BT, schedule)


def sweep_queries(q_BTHF: Tensor, g_BHTV: Tensor, gz_BHT4: Tensor, ids_BT: Tensor | None, schedule: Schedule) -> Sweep:
    """From right to left: sum_i weighted packed(q_i) [g_i; gz_i] over the first token's document."""
    return Sweep(q_BTHF, g_BHTV.transpose(1, 2), gz_BHT4, ids_BT, schedule)


def attend(
    q_BTHF: Tensor, k_BTHF: Tensor, v_BTHV: Tensor, ids_BT: Tensor | None, states: ChunkStates, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """o_BTHV in the dtype of v and 1/Z_BHT in fp32, given the states before the chunks."""
    launch = _Launch(q_BTHF, v_BTHV, ids_BT, schedule)
    o_BTHV = laid_out_like(v_BTHV)
    inverse_z_BHT = torch.empty(launch.B, launch.H, launch.T, dtype=torch.float32, device=launch.device)
    triton_kernels.outputs[launch.tiles(schedule.output_tokens)](
        q_BTHF, k_BTHF, v_BTHV, launch.ids, *states, o_BTHV, inverse_z_BHT,
        *strides(q_BTHF, k_BTHF, v_BTHV, o_BTHV),
        launch.ids_stride, launch.T, launch.H, launch.chunks, **launch.tile_options(schedule.output_tokens),
    )  # fmt: skip
    return o_BTHV, inverse_z_BHT


def output_gradients(do_BTHV: Tensor, o_BTHV: Tensor, inverse_z_BHT: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to the numerators, g_BHTV in the dtype of o, and to the normalisers, gz_BHT4 as in ChunkStates."""
    B, T, H, V = o_BTHV.shape
    g_BHTV = torch.empty(B, H, T, V, dtype=o_BTHV.dtype, device=o_BTHV.device)
    gz_BHT4 = torch.empty(B, H, T, 4, dtype=o_BTHV.dtype, device=o_BTHV.device)
    tile = 64
    triton_kernels.output_gradients[triton.cdiv(T, tile), B * H](
        do_BTHV, o_BTHV, inverse_z_BHT, g_BHTV, gz_BHT4, *strides(do_BTHV, o_BTHV), T, H,
        value_dim=V, value_width=max(16, triton.next_power_of_2(V)), tile_tokens=tile, even=T % tile == 0, num_warps=4,
    )  # fmt: skip
    return g_BHTV, gz_BHT4


def query_gradients(
    q_BTHF: Tensor, k_BTHF: Tensor, v_BTHV: Tensor, g_BHTV: Tensor, gz_BHT4: Tensor, ids_BT: Tensor | None,
    states: ChunkStates, schedule: Schedule,
) -> Tensor:  # fmt: skip
    """dq, given the states before the chunks."""
    launch = _Launch(q_BTHF, v_BTHV, ids_BT, schedule)
    dq_BTHF = laid_out_like(q_BTHF)
    triton_kernels.query_gradients[launch.tiles(schedule.gradient_tokens)](
        q_BTHF, k_BTHF, v_BTHV, g_BHTV, gz_BHT4, launch.ids, *states, dq_BTHF,
        *strides(q_BTHF, k_BTHF, v_BTHV), *strides(dq_BTHF),
        launch.ids_stride, launch.T, launch.H, launch.chunks, **launch.tile_options(schedule.gradient_tokens),
    )  # fmt: skip
    return dq_BTHF


def key_gradients(
    q_BTHF: Tensor, k_BTHF: Tensor, v_BTHV: Tensor, g_BHTV: Tensor, gz_BHT4: Tensor, ids_BT: Tensor | None,
    adjoints: ChunkStates, schedule: Schedule,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv, given the adjoint states after the chunks."""
    launch = _Launch(q_BTHF, v_BTHV, ids_BT, schedule)
    dk_BTHF, dv_BTHV = laid_out_like(k_BTHF), laid_out_like(v_BTHV)
    triton_kernels.key_gradients[launch.tiles(schedule.gradient_tokens)](
        q_BTHF, k_BTHF, v_BTHV, g_BHTV, gz_BHT4, launch.ids, *adjoints, dk_BTHF, dv_BTHV,
        *strides(q_BTHF, k_BTHF, v_BTHV), *strides(dk_BTHF, dv_BTHV),
        launch.ids_stride, launch.T, launch.H, launch.chunks,
        has_pairs=True, **launch.tile_options(schedule.gradient_tokens),
    )  # fmt: skip
    return dk_BTHF, dv_BTHV


def moment_gradients(
    k_BTHF: Tensor, v_BTHV: Tensor, dmoments_BHRE: Tensor, ids_BT: Tensor | None, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """dk and dv of `segment_moments`: one adjoint state for all tokens of the last document."""
    launch = _Launch(k_BTHF, v_BTHV, ids_BT, schedule)
    adjoint = _packed_operand(dmoments_BHRE, k_BTHF.shape[-1], launch.rows_stored, k_BTHF.dtype)
    dk_BTHF, dv_BTHV = laid_out_like(k_BTHF), laid_out_like(v_BTHV)
    unused, no_strides = dmoments_BHRE, (0, 0, 0)
    triton_kernels.key_gradients[launch.tiles(schedule.gradient_tokens)](
        k_BTHF, k_BTHF, v_BTHV, v_BTHV, unused, launch.ids, *adjoint, dk_BTHF, dv_BTHV,
        *no_strides, *strides(k_BTHF, v_BTHV, dk_BTHF, dv_BTHV),
        launch.ids_stride, launch.T, launch.H, launch.chunks,
        has_pairs=False, **launch.tile_options(schedule.gradient_tokens),
    )  # fmt: skip
    return dk_BTHF, dv_BTHV


def _packed_operand(state_BHRE: Tensor, feature_dim: int, rows_stored: int, dtype: torch.dtype) -> ChunkStates:
    """A state in the public order of rows as the kernels read it; the order is told in `triton_kernels`."""
    F, P = feature_dim, _period(feature_dim)
    rows = torch.arange(rows_stored, device=state_BHRE.device)
    pairs = P * (P + 1) // 2
    first, second = rows % P, (rows + rows // P - 1) % P
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    packed = torch.where(rows < P + pairs, 1 + F + low * F - low * (low - 1) // 2 + high - low, 0)
    packed = torch.where(rows < P, 1 + first, packed)
    exists = torch.where(rows < P, first < F, high < F) & (rows < P + pairs) | (rows == P + pairs)
    ordered = torch.where(exists[:, None], state_BHRE[:, :, packed * exists], 0)
    high = ordered[..., -1].to(dtype)
    low = (ordered[..., -1] - high).to(dtype)
    return ChunkStates(
        ordered[..., :-1].to(dtype).contiguous(), torch.stack([high, low, high, torch.zeros_like(low)], dim=-1)
    )


def schedule(chunk_tokens: int | None, *inputs: Tensor) -> Schedule:
    """Tiles for chunks of so many tokens. Raises TypeError for inputs that the kernels do not take."""
    _check_dtypes(*inputs)
    if chunk_tokens is None:
        return Schedule()
    if chunk_tokens < 16 or chunk_tokens & (chunk_tokens - 1):
        raise ValueError(f"chunk_tokens is {chunk_tokens}: the Triton kernels take powers of two from 16 on")
    tile = min(chunk_tokens, 64)
    return Schedule(chunk_tokens=chunk_tokens, sweep_tokens=tile, output_tokens=tile, gradient_tokens=tile)


def _check_dtypes(*tensors: Tensor) -> None:
    dtypes = sorted({str(x.dtype).removeprefix("torch.") for x in tensors})
    if len(dtypes) > 1 or tensors[0].dtype not in DTYPES:
        raise TypeError(
            f"q, k and v are {', '.join(dtypes)}: the Triton kernels take one of bfloat16, float16 and float32 for all; "
            "set train.backend to reference for others"
        )
