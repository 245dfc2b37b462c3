"""The token shift of RWKV: inputs of projections that are mixed, channel by channel, with those of the token before.

Legend: B sequences, T tokens, D hidden size, M mixes.
"""

import torch
from torch import Tensor


def tokens_before(x_BTD: Tensor, *, last_BD: Tensor | None = None, document_ids_BT: Tensor | None = None) -> Tensor:
    """The input one token earlier: `last` in front of the sequence, and zeros where there is none of the same document."""
    first_B1D = torch.zeros_like(x_BTD[:, :1]) if last_BD is None else last_BD[:, None]
    before_BTD = torch.cat([first_B1D, x_BTD[:, :-1]], dim=1)
    if document_ids_BT is None:
        return before_BTD
    goes_on = torch.ones_like(document_ids_BT, dtype=torch.bool)
    goes_on[:, 1:] = document_ids_BT[:, 1:] == document_ids_BT[:, :-1]
    return before_BTD * goes_on[..., None]


def shifted(x: Tensor, before: Tensor, mix_MD: Tensor) -> tuple[Tensor, ...]:
    """x + (before - x) mix for each of the M mixes; x and before are [.., D]."""
    mix = mix_MD.view(len(mix_MD), *[1] * (x.ndim - 1), -1)
    return torch.addcmul(x, before - x, mix).unbind()
