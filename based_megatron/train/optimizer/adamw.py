"""AdamW: ours, torch's plain and fused ones, and NVIDIA apex's."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from based_megatron.config import OptimizerConfig
from based_megatron.errors import ConfigError
from based_megatron.kernels.adamw import AdamW, adamw
from based_megatron.kernels.backend import resolve_backend
from based_megatron.parallel.partitions import Judged, PartitionedOptimizer
from based_megatron.parallel.topology import Topology
from based_megatron.parallel.transfer import HostCopy
from based_megatron.train.optimizer.groups import parameter_groups

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer(PartitionedOptimizer):
    """AdamW with two moments an element and one step count; skipped steps are not in it."""

    name = "adamw"

    @classmethod
    def build(cls, module: nn.Module, config: OptimizerConfig, topology: Topology) -> "Optimizer":
        """Over the parameters of this rank. Raises ConfigError if apex is asked for and missing."""
        groups = parameter_groups(module, config)
        if config.implementation != "auto":
            return cls(_client(groups, config))
        return OnePass(OnePassClient(groups, resolve_backend("auto", topology.device), **adam_settings(config)))

    def state(self, master: Tensor) -> dict[str, Tensor]:
        """The moments of a partition."""
        return adam_moments(self.client, master)

    def scalars(self) -> dict[str, int]:
        """The number of steps, for bias correction."""
        return {"step": adam_steps(self.client, [partition.master for partition in self.partitions])}

    def load_scalars(self, values: Mapping[str, int]) -> None:
        """Set the number of steps."""
        set_adam_steps(self.client, [partition.master for partition in self.partitions], values["step"])


class OnePassClient(torch.optim.AdamW):
    """AdamW in one pass over each flat tensor; the number of its steps is on the host."""

    def __init__(self, groups: list[dict[str, Any]], backend: str, **settings: Any) -> None:
        """backend: of the kernel."""
        super().__init__(groups, foreach=False, **settings)
        self._backend = backend

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all tensors that have a gradient, which is as it should be."""
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is not None:
                    self.launch(group, master, master.grad)
                    self.count(master)

    def launch(self, group: dict[str, Any], master: Tensor, gradient: Tensor, **options: Any) -> None:
        """Queue the next update of a tensor on the device. options: of the kernel."""
        moments = adam_moments(self, master)
        beta1, beta2 = group["betas"]
        step = int(self.state[master]["step"]) + 1
        numbers = AdamW(group["lr"], step, beta1, beta2, group["eps"], group["weight_decay"])
        adamw(numbers, master, gradient, *moments.values(), backend=self._backend, **options)

    def count(self, master: Tensor) -> None:
        """Count a step of a tensor, whose update was good."""
        self.state[master]["step"] += 1


class OnePass(Optimizer):
    """AdamW whose update also scales and clips the gradient, leaves a bad step out, and rounds the weights."""

    client: OnePassClient

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor], weights: Sequence[Tensor], judged: Judged) -> bool:
        # Copied before the update is queued, the verdict is on the host while the update runs.
        verdict, masters = HostCopy(judged.is_good), [partition.master for partition in self.partitions]
        for group, master, gradient, weight in zip(self.param_groups, masters, gradients, weights, strict=True):
            self.client.launch(group, master, gradient, weight_N=weight, scale=judged.scale, is_good=judged.is_good)
        applied = bool(verdict.wait())
        for master in masters if applied else ():
            self.client.count(master)
        return applied


def adam_settings(config: OptimizerConfig) -> dict[str, Any]:
    """Arguments that every AdamW takes."""
    return dict(lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def is_fused(implementation: str, device: torch.device) -> bool:
    """Whether torch's fused AdamW is wanted; auto takes it on a GPU."""
    return implementation == "fused" or (implementation == "auto" and device.type == "cuda")


def adam_moments(client: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """The moments of a partition, made as the first step would make them."""
    state = client.state[master]
    for kind in MOMENTS:
        if kind not in state:
            state[kind] = torch.zeros_like(master.detach())
    if "step" not in state and _counts_by_tensor(client):
        on_device = client.defaults["fused"] or client.defaults["capturable"]
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device if on_device else "cpu")
    return {kind: state[kind] for kind in MOMENTS}


def adam_steps(client: torch.optim.Optimizer, masters: list[Tensor]) -> int:
    """Steps that all of these partitions have taken."""
    if not _counts_by_tensor(client):
        return int(client.param_groups[0].get("step", 0))
    steps = {int(client.state[master].get("step", 0)) for master in masters}
    assert len(steps) == 1, f"partitions took different numbers of Adam steps: {sorted(steps)}"
    return steps.pop()


def set_adam_steps(client: torch.optim.Optimizer, masters: list[Tensor], steps: int) -> None:
    """Set the step counts of these partitions."""
    if not _counts_by_tensor(client):
        for group in client.param_groups:
            group["step"] = steps
        return
    for master in masters:
        adam_moments(client, master)
        client.state[master]["step"].fill_(steps)


def _counts_by_tensor(client: torch.optim.Optimizer) -> bool:
    """Torch keeps a step tensor for each parameter, apex one number for each group."""
    return isinstance(client, (torch.optim.Adam, torch.optim.AdamW))


def _client(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    if config.implementation != "apex":
        return torch.optim.AdamW(groups, fused=config.implementation == "fused", **adam_settings(config))
    try:
        from apex.optimizers import FusedAdam  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            f"optimizer.implementation is apex but NVIDIA apex cannot be imported ({error}); set it to auto"
        ) from error
    return FusedAdam(groups, adam_w_mode=True, **adam_settings(config))
