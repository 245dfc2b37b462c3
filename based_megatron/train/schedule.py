"""The learning rate of a step."""

import math

from based_megatron.config import OptimizerConfig, ScheduleConfig


def learning_rate(step: int, optimizer: OptimizerConfig, schedule: ScheduleConfig, total_steps: int) -> float:
    """Rate of the step after `step` finished ones: linear warmup, then a cosine whose clock starts after it, then min_lr.

    The released runs' schedule (timm's cosine with a warmup prefix).
    """
    if step < schedule.warmup_steps:
        return schedule.warmup_lr + (optimizer.lr - schedule.warmup_lr) * step / schedule.warmup_steps
    decay_steps = schedule.decay_steps or max(1, total_steps - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / decay_steps)
    return schedule.min_lr + 0.5 * (optimizer.lr - schedule.min_lr) * (1 + math.cos(math.pi * progress))
