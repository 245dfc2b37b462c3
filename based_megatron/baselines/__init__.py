"""Other architectures as mixers, to pretrain and to compare with: `--model.mixers based_megatron.baselines` knows all of them."""

from based_megatron.baselines.deltanet import DeltaNet, GatedDeltaNet
from based_megatron.baselines.retnet import RetNet
from based_megatron.baselines.rwkv4 import RWKV4
from based_megatron.baselines.rwkv7 import RWKV7

__all__ = ["RWKV4", "RWKV7", "DeltaNet", "GatedDeltaNet", "RetNet"]
