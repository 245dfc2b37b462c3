"""Other architectures as mixers, to pretrain and to compare with: `--model.mixers based_megatron.baselines` knows all of them."""

from based_megatron.baselines.deltanet import DeltaNet, GatedDeltaNet
from based_megatron.baselines.gla import GatedLinearAttention
from based_megatron.baselines.mamba import Mamba
from based_megatron.baselines.mamba2 import Mamba2
from based_megatron.baselines.retnet import RetNet

__all__ = ["DeltaNet", "GatedDeltaNet", "GatedLinearAttention", "Mamba", "Mamba2", "RetNet"]
