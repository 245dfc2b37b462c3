"""The door to fla-core, the library of linear attention kernels (extra `baselines`): what GPUs run in place of the plain operations.

Its import takes many seconds, so nothing else imports it, and only a mixer that runs on a GPU does so here.

Legend: B sequences, T tokens, H heads, K key dim, V value head dim.
"""

import functools
import importlib.metadata
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def serves(x: Tensor, backend: str) -> bool:
    """Whether the library computes for tensors like this one: on a GPU, with kernels wanted and the library installed."""
    return backend == "triton" and x.is_cuda and x.dtype is not torch.float64 and _is_usable(x.device)


def is_refused(capability: tuple[int, int], triton_version: str) -> bool:
    """Whether the library raises an error for its decayed kernels: Triton 3.4 to 3.7.0 makes wrong gradients of them on Hopper."""
    version = tuple(int(part) for part in triton_version.split("+")[0].split(".")[:3])
    return capability[0] == 9 and (3, 4) <= version < (3, 7, 1)


def scalar_decay(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay_BTH: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """The outputs of `operations.scalar_decay`, without a state."""
    from fla.ops.simple_gla import chunk_simple_gla

    return _run(chunk_simple_gla, q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, **options)


def vector_decay(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay_BTHK: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """The outputs of `operations.vector_decay`, without a state."""
    from fla.ops.gla import chunk_gla

    return _run(chunk_gla, q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK, **options)


def delta_rule(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, beta_BTH: Tensor, log_decay_BTH: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The outputs of `operations.delta_rule`, without a state; bf16 alone."""
    q, k, beta = (x.to(v_BTHV.dtype) for x in (q_BTHK, k_BTHK, beta_BTH))
    if log_decay_BTH is None:
        from fla.ops.delta_rule import chunk_delta_rule

        return _run(chunk_delta_rule, q, k, v_BTHV, beta, **options)
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return _run(chunk_gated_delta_rule, q, k, v_BTHV, log_decay_BTH, beta, **options)


def dplr(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    log_decay_BTHK: Tensor,
    **options: Any,
) -> tuple[Tensor, None]:
    """The outputs of `operations.dplr`, without a state; log decays as RWKV-7 has them."""
    from fla.ops.rwkv7 import chunk_rwkv7

    q, k, a, b = (x.to(v_BTHV.dtype) for x in (q_BTHK, k_BTHK, a_BTHK, b_BTHK))
    return _run(chunk_rwkv7, q, log_decay_BTHK, k, v_BTHV, a, b, **options)


def _run(
    operation: Any, *inputs: Tensor, scale: float = 1.0, document_ids_BT: Tensor | None = None
) -> tuple[Tensor, None]:
    if document_ids_BT is None:
        return operation(*inputs, scale=scale)[0], None
    # All documents of all sequences, one after another in a single row.
    B, T = inputs[0].shape[:2]
    rows = (x.flatten(0, 1).unsqueeze(0) for x in inputs)
    o_1NHV = operation(*rows, scale=scale, cu_seqlens=_document_bounds(document_ids_BT))[0]
    return o_1NHV.view(B, T, *o_1NHV.shape[2:]), None


@functools.lru_cache(maxsize=1)
def _document_bounds(document_ids_BT: Tensor) -> Tensor:
    """Where documents begin in the joined rows, and the end of the last. All layers of a micro batch ask with the same tensor."""
    starts_BT = functional.pad(document_ids_BT[:, 1:] != document_ids_BT[:, :-1], (1, 0), value=True)
    (starts,) = starts_BT.flatten().nonzero(as_tuple=True)
    return functional.pad(starts, (0, 1), value=starts_BT.numel())


@functools.cache
@torch.compiler.assume_constant_result
def _is_usable(device: torch.device) -> bool:
    """Whether the library is installed and computes on this device; layers ask in every forward pass."""
    if importlib.util.find_spec("fla") is None:
        return False
    return not is_refused(torch.cuda.get_device_capability(device), importlib.metadata.version("triton"))
