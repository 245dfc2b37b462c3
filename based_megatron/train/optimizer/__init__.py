"""Optimizers under ZeRO: one file each, chosen by optimizer.name.

An optimizer is a class `Optimizer` in the module of its name; that name stands in OptimizerConfig (config/schema.py) too.
"""

from based_megatron.train.optimizer.build import build_engine, build_optimizer, set_learning_rate
from based_megatron.train.optimizer.groups import parameter_groups

__all__ = ["build_engine", "build_optimizer", "parameter_groups", "set_learning_rate"]
