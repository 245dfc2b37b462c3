"""Other architectures as mixers, to pretrain and to compare with: `--model.mixers based_megatron.baselines` knows all of them."""

from based_megatron.baselines.deltanet import DeltaNet, GatedDeltaNet
from based_megatron.baselines.gla import GatedLinearAttention
from based_megatron.baselines.h3 import H3
from based_megatron.baselines.hyena import Hyena
from based_megatron.baselines.mamba import Mamba
from based_megatron.baselines.mamba2 import Mamba2
from based_megatron.baselines.retnet import RetNet
from based_megatron.baselines.rwkv4 import RWKV4
from based_megatron.baselines.rwkv7 import RWKV7

__all__ = [
    "H3",
    "RWKV4",
    "RWKV7",
    "DeltaNet",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "Hyena",
    "Mamba",
    "Mamba2",
    "RetNet",
]
