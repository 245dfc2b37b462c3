"""Taylor linear attention on Triton: one chunk scan each way, outputs and gradients, each an entry point.

Legend: B batch, T tokens, H heads, F feature dim, V value head dim, E = V + 1, R rows of a packed state,
X any last dimension.

Forward:  `scan_keys` (k, v)  ->  `attend` (q, k, v, states)  ->  o, 1/Z
Backward: `output_gradients` (do, o, 1/Z)  ->  `scan_queries` (q, g, gz)  ->  `query_gradients`, `key_gradients`

A scan needs no state from elsewhere. Its `moments` are what a sequence-parallel rank sends; its `states` take what comes
back: the state before the sequence, or backward the gradient to the state after it. Both ends follow from them:
the state after is the moments of the keys, and the gradient to the state before is the moments of the queries,
plus what entered from the other end if all tokens are one document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from based_megatron.kernels.layout import Operand, ids_operand, laid_out_like, operand
from based_megatron.kernels.packing import SQUARE_EPSILON, packed_rows
from based_megatron.kernels.taylor_attention import triton_gradients, triton_outputs, triton_scan

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Schedule:
    """What all steps of a call have in common. Tile sizes are in tokens or rows, all powers of two. A chunk is a multiple of its tiles."""

    square: bool = False
    """Whether weights are s^2 alone."""
    chunk_tokens: int = 128
    scan_tokens: int = 64
    output_tokens: int = 64
    gradient_tokens: int = 64
    scan_rows: int = 64
    tile_rows: int = 32
    scan_stages: int = 3
    """Chunks whose loads are under way in a scan over the keys."""
    adjoint_stages: int = 2
    """Chunks whose loads are under way in a scan over the queries, which takes more room for each."""
    state_stages: int = 2
    """Tiles of a chunk's state whose loads are under way."""
    large_state_stages: int = 3
    """Tiles whose loads are under way where a state is wide, or the start of the segment is read too."""
    programs_wanted: int = 384
    """Programs of a scan that fill a GPU: shorter segments of the sequence are scanned at once to reach it."""


def _warps(tile_tokens: int) -> int:
    """One warp group for every 64 tokens."""
    return 4 * max(1, tile_tokens // 64)


class States(NamedTuple):
    """Weighted states as operands of matrix products: of chunks since their segment began, and of segments.

    Values are in the dtype of the inputs. Normalisers are rounded parts: the first and the second, which add up to the
    normaliser; the first again; unused.
    """

    values: Tensor
    """[B, H, chunks, stored rows, V]"""
    normalisers: Tensor
    """[B, H, chunks, stored rows, 4]"""
    start_values: Tensor | None
    """[B, H, segments, stored rows, V], None where nothing enters the only segment."""
    start_normalisers: Tensor | None


def _period(feature_dim: int) -> int:
    """The feature dim as the kernels' order of rows needs it."""
    return max(8, triton.next_power_of_2(feature_dim))


def _stored_rows(feature_dim: int, schedule: Schedule) -> int:
    """Rows of a chunk's state: whole tiles."""
    return triton.cdiv(packed_rows(_period(feature_dim), schedule.square), schedule.tile_rows) * schedule.tile_rows


class _Launch:
    """Arguments that all kernels of one call have in common."""

    def __init__(self, x_BTHF: Tensor, y_BTHV: Tensor, ids_BT: Tensor | None, schedule: Schedule) -> None:
        self.B, self.T, self.H, F = x_BTHF.shape
        V = y_BTHV.shape[-1]
        self.schedule, self.device, self.dtype = schedule, x_BTHF.device, x_BTHF.dtype
        self.chunks = triton.cdiv(self.T, schedule.chunk_tokens)
        self.stored_rows = _stored_rows(F, schedule)
        self.ids = ids_operand(None if ids_BT is None else ids_BT.to(torch.int32), x_BTHF)
        self.constants = {
            "F": F,
            "PERIOD": _period(F),
            "PADDED_F": max(16, _period(F)),
            "V": V,
            "PADDED_V": max(16, triton.next_power_of_2(V)),
            "STORED_ROWS": self.stored_rows,
            "SQUARE": schedule.square,
            "CHUNK_TOKENS": schedule.chunk_tokens,
            "HAS_IDS": ids_BT is not None,
            "EVEN": self.T % schedule.chunk_tokens == 0,
            # Three products of tf32 parts: fp32 accuracy from the tensor cores.
            "PRECISION": "tf32x3" if x_BTHF.dtype == torch.float32 else "tf32",
        }
        self.state_shape = (self.B, self.H, packed_rows(F, schedule.square), V + 1)

    @property
    def row_tiles(self) -> int:
        """Tiles of rows of a state, of which a program of the scan has one."""
        return triton.cdiv(self.stored_rows, self.schedule.scan_rows)

    def new_states(self, states: int) -> tuple[Tensor, Tensor]:
        """Values and normalisers, for so many states of each head."""
        shape = (self.B, self.H, states, self.stored_rows)
        values = torch.empty(*shape, self.constants["V"], dtype=self.dtype, device=self.device)
        return values, torch.empty(*shape, 4, dtype=self.dtype, device=self.device)

    def new_moments(self, segments: int) -> tuple[Tensor, Tensor]:
        """Moments of the segments, fp32, in the order of the kernels' rows: values and normalisers."""
        shape = (self.B, self.H, segments, self.stored_rows)
        return torch.empty(*shape, self.constants["V"], device=self.device), torch.empty(*shape, device=self.device)

    def pointers(self, states: States) -> list[Tensor]:
        """The states as a kernel takes them; it does not read what is not there."""
        return [states.values if x is None else x for x in states]

    def counts(self, states: States) -> tuple[int, int, int, int, int]:
        """Tokens, heads, chunks, segments, chunks of a segment."""
        segments = 1 if states.start_values is None else states.start_values.shape[2]
        return self.T, self.H, self.chunks, segments, triton.cdiv(self.chunks, segments)

    def tiles(self, tokens: int) -> tuple[int, int]:
        """Grid of the kernels that treat all tiles at once."""
        return triton.cdiv(self.T, tokens), self.B * self.H

    def tile_options(self, tokens: int, states: States) -> dict[str, Any]:
        """Constants and launch options of these kernels."""
        large = states.start_values is not None or self.constants["PADDED_V"] > 64
        return {
            "TILE_TOKENS": tokens,
            "HAS_STARTS": states.start_values is not None,
            "STATE_STAGES": self.schedule.large_state_stages if large else self.schedule.state_stages,
            "TILE_ROWS": self.schedule.tile_rows,
            "num_warps": _warps(tokens),
            "num_stages": 2,
            **self.constants,
        }


class ChunkScan:
    """A scan over the chunks in one direction: x are the tokens' vectors, y their values."""

    def __init__(
        self, x_BTHF: Tensor, y_BTHV: Tensor, yz_BHT4: Tensor | None, ids_BT: Tensor | None, schedule: Schedule
    ) -> None:  # fmt: skip
        """Runs at once: forward without yz, where it is a one for each token; adjoint with it."""
        self._adjoint = yz_BHT4 is not None
        self._launch = launch = _Launch(x_BTHF, y_BTHV, ids_BT, schedule)
        wanted = schedule.programs_wanted // (launch.B * launch.H * launch.row_tiles)
        # The start of a segment costs its tiles a second state, so it must be worth some chunks.
        self._segment_chunks = triton.cdiv(launch.chunks, max(1, min(wanted, launch.chunks // 4)))
        self._segments = triton.cdiv(launch.chunks, self._segment_chunks)
        self._moments = launch.new_moments(self._segments)
        self._stored = launch.new_states(launch.chunks)
        triton_scan.scan_kernel[launch.row_tiles, self._segments, launch.B * launch.H](
            operand(x_BTHF), operand(y_BTHV), x_BTHF if yz_BHT4 is None else yz_BHT4, launch.ids, *self._stored, *self._moments,
            launch.T, launch.H, launch.chunks, self._segments, self._segment_chunks,
            TILE_TOKENS=schedule.scan_tokens, TILE_ROWS=schedule.scan_rows, ADJOINT=self._adjoint,
            num_warps=4, num_stages=schedule.adjoint_stages if self._adjoint else schedule.scan_stages, **launch.constants,
        )  # fmt: skip

    def moments(self) -> Tensor:
        """The state after the sequence if none enters it, [B, H, R, V + 1] fp32.

        Backward: the gradient to the state that enters, if none reaches the state after the sequence.
        """
        end_BHRE = torch.empty(self._launch.state_shape, device=self._launch.device)
        _combine(self._launch, self._moments, None, None, end_BHRE, self._segment_chunks, self._adjoint)
        return end_BHRE

    def states(self, initial_BHRE: Tensor | None) -> States:
        """The states that the kernels of outputs or gradients read, given the state (fp32) that enters."""
        if self._segments == 1 and initial_BHRE is None:
            return States(*self._stored, None, None)
        starts = self._launch.new_states(self._segments)
        _combine(self._launch, self._moments, initial_BHRE, starts, None, self._segment_chunks, self._adjoint)
        return States(*self._stored, *starts)


def _operands(*tensors_BTHX: Tensor) -> list[Operand]:
    return [operand(x) for x in tensors_BTHX]


def _combine(
    launch: _Launch, moments: tuple[Tensor, Tensor], initial_BHRE: Tensor | None,
    starts: tuple[Tensor, Tensor] | None, end_BHRE: Tensor | None, segment_chunks: int, adjoint: bool,
) -> None:  # fmt: skip
    """Writes the states before the segments to `starts`, or the one after them all to `end`."""
    stand_in = moments[0]
    names = ("F", "PERIOD", "V", "PADDED_V", "STORED_ROWS", "SQUARE", "HAS_IDS")
    tile_rows = 8
    triton_scan.combine_kernel[launch.stored_rows // tile_rows, launch.B * launch.H](
        *moments, stand_in if initial_BHRE is None else initial_BHRE.contiguous(),
        *(starts or moments), stand_in if end_BHRE is None else end_BHRE, launch.ids,
        launch.T, launch.H, stand_in.shape[2], segment_chunks * launch.schedule.chunk_tokens,
        TILE_ROWS=tile_rows, ADJOINT=adjoint, HAS_INITIAL=initial_BHRE is not None, ONLY_END=starts is None,
        **{name: launch.constants[name] for name in names},
    )  # fmt: skip


def scan_keys(k_BTHF: Tensor, v_BTHV: Tensor, ids_BT: Tensor | None, schedule: Schedule) -> ChunkScan:
    """The scan over the keys, from left to right: states."""
    return ChunkScan(k_BTHF, v_BTHV, None, ids_BT, schedule)


def scan_queries(
    q_BTHF: Tensor, g_BHTV: Tensor, gz_BHT4: Tensor, ids_BT: Tensor | None, schedule: Schedule
) -> ChunkScan:
    """The scan over the queries and the gradients of their outputs, from right to left: adjoint states."""
    return ChunkScan(q_BTHF, g_BHTV.transpose(1, 2), gz_BHT4, ids_BT, schedule)


def attend(
    q_BTHF: Tensor, k_BTHF: Tensor, v_BTHV: Tensor, ids_BT: Tensor | None, states: States, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """o_BTHV in the dtype of v and 1/Z_BHT in fp32, given the states of a scan over the keys."""
    launch = _Launch(q_BTHF, v_BTHV, ids_BT, schedule)
    o_BTHV = laid_out_like(v_BTHV)
    inverse_z_BHT = torch.empty(launch.B, launch.H, launch.T, dtype=torch.float32, device=launch.device)
    triton_outputs.outputs_kernel[launch.tiles(schedule.output_tokens)](
        *_operands(q_BTHF, k_BTHF, v_BTHV), launch.ids, *launch.pointers(states), operand(o_BTHV), inverse_z_BHT,
        *launch.counts(states), EPSILON=SQUARE_EPSILON, **launch.tile_options(schedule.output_tokens, states),
    )  # fmt: skip
    return o_BTHV, inverse_z_BHT


def smallest_normaliser(inverse_z_BHT: Tensor) -> Tensor:
    """The smallest normaliser of those whose inverses `attend` returns, a scalar."""
    return inverse_z_BHT.amax().reciprocal()


def output_gradients(do_BTHV: Tensor, o_BTHV: Tensor, inverse_z_BHT: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to the numerators, g_BHTV in the dtype of o, and to the normalisers, gz_BHT4 as in States."""
    B, T, H, V = o_BTHV.shape
    g_BHTV = torch.empty(B, H, T, V, dtype=o_BTHV.dtype, device=o_BTHV.device)
    gz_BHT4 = torch.empty(B, H, T, 4, dtype=o_BTHV.dtype, device=o_BTHV.device)
    tile = 64
    triton_gradients.output_gradients_kernel[triton.cdiv(T, tile), B * H](
        *_operands(do_BTHV, o_BTHV), inverse_z_BHT, g_BHTV, gz_BHT4, T, H,
        V=V, PADDED_V=max(16, triton.next_power_of_2(V)), TILE_TOKENS=tile, EVEN=T % tile == 0, num_warps=4,
    )  # fmt: skip
    return g_BHTV, gz_BHT4


def no_output_gradients(v_BTHV: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `output_gradients` where none comes from the outputs."""
    B, T, H, V = v_BTHV.shape
    return v_BTHV.new_zeros(B, H, T, V), v_BTHV.new_zeros(B, H, T, 4)


def query_gradients(
    q_BTHF: Tensor, k_BTHF: Tensor, v_BTHV: Tensor, g_BHTV: Tensor, gz_BHT4: Tensor, ids_BT: Tensor | None,
    states: States, schedule: Schedule,
) -> Tensor:  # fmt: skip
    """dq, given the states of a scan over the keys."""
    launch = _Launch(q_BTHF, v_BTHV, ids_BT, schedule)
    dq_BTHF = laid_out_like(q_BTHF)
    triton_gradients.query_gradients_kernel[launch.tiles(schedule.gradient_tokens)](
        *_operands(q_BTHF, k_BTHF, v_BTHV), g_BHTV, gz_BHT4, launch.ids, *launch.pointers(states), operand(dq_BTHF),
        *launch.counts(states), **launch.tile_options(schedule.gradient_tokens, states),
    )  # fmt: skip
    return dq_BTHF


def key_gradients(
    q_BTHF: Tensor, k_BTHF: Tensor, v_BTHV: Tensor, g_BHTV: Tensor, gz_BHT4: Tensor, ids_BT: Tensor | None,
    adjoints: States, schedule: Schedule,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv, given the states of a scan over the queries."""
    launch = _Launch(q_BTHF, v_BTHV, ids_BT, schedule)
    dk_BTHF, dv_BTHV = laid_out_like(k_BTHF), laid_out_like(v_BTHV)
    triton_gradients.key_gradients_kernel[launch.tiles(schedule.gradient_tokens)](
        *_operands(q_BTHF, k_BTHF, v_BTHV), g_BHTV, gz_BHT4, launch.ids, *launch.pointers(adjoints), *_operands(dk_BTHF, dv_BTHV),
        *launch.counts(adjoints), **launch.tile_options(schedule.gradient_tokens, adjoints),
    )  # fmt: skip
    return dk_BTHF, dv_BTHV


def schedule(chunk_tokens: int | None, *inputs: Tensor, square: bool = False) -> Schedule:
    """Tiles for chunks of so many tokens. Raises TypeError for inputs that the kernels do not take."""
    _check_dtypes(*inputs)
    if chunk_tokens is None:
        return Schedule(square=square)
    if chunk_tokens < 16 or chunk_tokens & (chunk_tokens - 1):
        raise ValueError(f"chunk_tokens is {chunk_tokens}: the Triton kernels take powers of two from 16 on")
    tile = min(chunk_tokens, 64)
    return Schedule(
        square=square, chunk_tokens=chunk_tokens, scan_tokens=tile, output_tokens=tile, gradient_tokens=tile
    )


def _check_dtypes(*tensors: Tensor) -> None:
    dtypes = sorted({str(x.dtype).removeprefix("torch.") for x in tensors})
    if len(dtypes) > 1 or tensors[0].dtype not in DTYPES:
        raise TypeError(
            f"q, k and v are {', '.join(dtypes)}: the Triton kernels take one of bfloat16, float16 and float32 for all; "
            "set train.backend to reference for others"
        )
