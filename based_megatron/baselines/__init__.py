"""Other architectures as mixers, to pretrain and to compare with: `--model.mixers based_megatron.baselines` knows all of them."""

from based_megatron.baselines.deltanet import DeltaNet, GatedDeltaNet
from based_megatron.baselines.retnet import RetNet

__all__ = ["DeltaNet", "GatedDeltaNet", "RetNet"]
