"""The oracle of training: a single process with plain autograd, AdamW and clipping, without DeepSpeed and schedules."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from based_megatron.data.slices import MOST_SLICES
from based_megatron.model.build import build_model
from based_megatron.parallel.linear import shard_spec
from based_megatron.parallel.sequence.documents import Documents
from based_megatron.parallel.sequence.plan import whole_sequence
from based_megatron.parallel.topology import build_topology
from based_megatron.train.optimizer import parameter_groups
from support.layouts import global_batch, slice_numbers, small_config
from support.pool import rank_device


def write_oracle(
    path: Path, packed: bool, steps: int, clip: float, lr: float, model_settings: dict[str, Any] | None = None
) -> None:
    """Losses, gradient norms, the first step's clipped gradients by name, and its losses by slice. Runs on a pool of one rank."""
    config = small_config(model=model_settings)
    topology = build_topology(config.parallel, rank_device(0))
    model = build_model(config, topology)[0]
    optimizer = torch.optim.AdamW(parameter_groups(model, config.optimizer), lr=lr, betas=(0.9, 0.95))
    losses, norms, gradients = [], [], {}
    for number in range(steps):
        batch = {key: value.to(topology.device) for key, value in global_batch(number, packed).items()}
        documents = Documents.from_ids(batch["ids"]) if packed else None
        plan = whole_sequence(documents, batch["tokens"].shape[1], topology.device)
        loss_BS = model(batch["tokens"], plan, batch["labels"])
        if not number:
            slices = slice_sums(loss_BS.detach(), slice_numbers(0).to(topology.device))
        loss = (loss_BS * batch["mask"]).sum() / batch["mask"].sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        losses.append(float(loss))
        gradients = gradients or {shard_spec(p).name: p.grad.detach().cpu().clone() for p in model.parameters()}
        optimizer.step()
    torch.save({"losses": losses, "norms": norms, "gradients": gradients, "slices": slices}, path)


def slice_sums(loss_BS: Tensor, slices_BS: Tensor) -> list[list[float]]:
    """[loss, tokens] of each slice, one by one."""
    chosen = [loss_BS[slices_BS == number].double() for number in range(MOST_SLICES)]
    return [[float(losses.sum()), len(losses)] for losses in chosen]


def load_oracle(path: Path) -> dict[str, Any]:
    """Read the file that write_oracle saved."""
    return torch.load(path)
