"""Muon (Jordan et al. 2024): momentum whose matrices are made orthogonal, for the weights of linear layers inside blocks.

    M = momentum M + (1 - momentum) G          G: gradient, reduced and clipped
    U = momentum M + (1 - momentum) G          with nesterov, else U = M
    W = W - lr (weight_decay W + update_rms sqrt(max(rows, columns)) orthogonal(U))

orthogonal(U) has the singular vectors of U and singular values near 1, from Newton-Schulz iterations. The elements of an
orthogonal matrix have root mean square 1 / sqrt(max(rows, columns)): the scale (Liu et al. 2025) gives an update that of AdamW's.
Each part of a fused projection (query, key and value; value and gate) is a matrix of its own. AdamW updates all other
parameters: embedding, output projection, norms, biases and taps of convolutions.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from based_megatron.config import OptimizerConfig
from based_megatron.parallel.linear import shard_spec
from based_megatron.parallel.partitions import Partition, PartitionedOptimizer
from based_megatron.parallel.sharding import ShardSpec
from based_megatron.parallel.topology import Topology
from based_megatron.train.optimizer.adamw import adam_moments, adam_settings, adam_steps, is_fused, set_adam_steps
from based_megatron.train.optimizer.groups import decayed_names
from based_megatron.train.optimizer.matrices import DealtMatrices

MOMENTUM = "momentum"
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x^3 and x^5: they bring singular values near 1 fastest, not to 1."""


class Optimizer(PartitionedOptimizer):
    """Muon with one momentum an element of its matrices, and AdamW's state for the rest."""

    name = "muon"
    client: "_Client"

    def __init__(self, client: "_Client", decayed: frozenset[str], topology: Topology) -> None:
        super().__init__(client)
        self._decayed, self._topology = decayed, topology

    @classmethod
    def build(cls, module: nn.Module, config: OptimizerConfig, topology: Topology) -> "Optimizer":
        """Over the parameters of this rank, in a group of matrices and, after it, one of all others, on every stage."""
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for parameter in module.parameters():
            (matrices if is_matrix(shard_spec(parameter)) else others).append(parameter)
        groups = [{"params": matrices, "matrices": True}, {"params": others, "matrices": False}]
        client = _Client(groups, config, is_fused(config.implementation, topology.device))
        return cls(client, decayed_names(module, config.weight_decay_mode), topology)

    def may_cut(self, group: dict[str, Any]) -> bool:
        """Not the matrices, which are dealt to all ranks together."""
        return not group["matrices"]

    def place(self, partitions: Sequence[Partition]) -> None:
        """As in the base class; the ranks of a stage also exchange where the pieces of their matrices lie."""
        super().place(partitions)
        for group, partition in zip(self.param_groups, partitions, strict=True):
            kept = [piece for piece in partition.pieces if piece.spec.name in self._decayed]
            group["decayed"] = [piece.of(partition.master.detach()) for piece in kept]
            if group["matrices"]:
                group["dealt"] = DealtMatrices(partition.pieces, self._topology.stage.group)

    def state(self, master: Tensor) -> dict[str, Tensor]:
        """The momentum of the partition of matrices, the moments of the other ones."""
        of_matrices = master is self.partitions[0].master
        return {MOMENTUM: self.client.momentum(master)} if of_matrices else adam_moments(self.client, master)

    def scalars(self) -> dict[str, int]:
        """AdamW's number of steps."""
        return {"step": adam_steps(self.client, self._masters_of_adamw)}

    def load_scalars(self, values: Mapping[str, int]) -> None:
        """Set AdamW's number of steps."""
        set_adam_steps(self.client, self._masters_of_adamw, values["step"])

    @property
    def _masters_of_adamw(self) -> list[Tensor]:
        return [partition.master for partition in self.partitions[1:]]


class _Client(torch.optim.AdamW):
    """Torch's AdamW, whose group of matrices is updated by Muon. ZeRO may step one group at a time."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig, fused: bool) -> None:
        # Both groups hold parameters that are decayed, the second one others too: decay goes piece by piece.
        super().__init__(groups, weight_decay=0.0, fused=fused, **adam_settings(config))
        self._decay, self._muon = config.weight_decay, config.muon

    def momentum(self, master: Tensor) -> Tensor:
        """The average of gradients, made as zeros if there is none yet."""
        state = self.state[master]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(master.detach())
        return state[MOMENTUM]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the partitions of the groups as they are now."""
        groups = self.param_groups
        for group in groups:
            if group["decayed"]:
                torch._foreach_mul_(group["decayed"], 1 - group["lr"] * self._decay)
            if group["matrices"]:
                self._update_matrices(group)
        self.param_groups = [group for group in groups if not group["matrices"]]
        super().step()
        self.param_groups = groups

    def _update_matrices(self, group: dict[str, Any]) -> None:
        (master,) = group["params"]
        average, weight = self.momentum(master), self._muon.momentum
        average.lerp_(master.grad, 1 - weight)
        update = master.grad.lerp(average, weight) if self._muon.nesterov else average
        # Newton-Schulz iterations need no more than bf16, and neither does what is sent.
        update = update.to(torch.bfloat16 if master.device.type == "cuda" else update.dtype)
        master.add_(group["dealt"].change(update, self._orthogonal), alpha=-group["lr"])

    def _orthogonal(self, matrix: Tensor, spec: ShardSpec) -> Tensor:
        """Each fused part made orthogonal and scaled."""
        dim = spec.partition_dim or 0
        parts = matrix.split(spec.parts or (matrix.shape[dim],), dim)
        scales = [self._muon.update_rms * math.sqrt(max(part.shape)) for part in parts]
        changed = [newton_schulz(part, self._muon.newton_schulz_steps) for part in parts]
        return torch.cat([part * scale for part, scale in zip(changed, scales, strict=True)], dim)


def is_matrix(spec: ShardSpec) -> bool:
    """Whether this parameter is the weight of a linear layer inside a block."""
    return len(spec.shape) == 2 and spec.name.startswith("layers.") and spec.name.endswith(".weight")


def newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """A matrix with the singular vectors of `matrix` and singular values near 1 (about 0.7 to 1.2 after 5 steps), same dtype.

    One step is X = a X + (b A + c A A) X with A = X X^T, from the matrix divided by its Frobenius norm.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
