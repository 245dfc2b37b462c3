"""Whether ranks that should hold the same weights do: silent corruption by a faulty device, memory or link."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from based_megatron.errors import TrainingError
from based_megatron.parallel.replicas import differing_ranks
from based_megatron.train.callbacks.base import Callback

if TYPE_CHECKING:
    from based_megatron.train.trainer import Trainer


class Replicas(Callback):
    """Compares the weights of all replicas at an interval, and ends the run if one differs.

    Before the update, when a step has used them: the update gathers them anew from the partitions of all ranks.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        """hosts: of each rank."""
        self._hosts = hosts

    def on_gradients(self, trainer: Trainer) -> None:
        step, config = trainer.step + 1, trainer.config
        if step % config.guards.replica_check_interval_steps:
            return
        parameters = [parameter for chunk in trainer.step_runner.chunks for parameter in chunk.parameters()]
        found = differing_ranks(parameters, trainer.topology, config.model.tie_embeddings)
        if not found:
            return
        hosts = [self._hosts[rank] for rank in found]
        named = [f"{rank} ({host})" for rank, host in zip(found, hosts, strict=True)]
        trainer.record("replica_mismatch", step=step, ranks=found, hosts=hosts)
        raise TrainingError(
            f"the weights of {'rank' if len(found) == 1 else 'ranks'} {', '.join(named)} are not those of their replicas in step {step}: "
            f"a faulty device, memory or link. The last checkpoint may have been made with them; leave the host out, and start again"
        )
