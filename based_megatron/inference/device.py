"""The device that a command asks for."""

import torch

from based_megatron.errors import ConfigError


def device_of(requested: str, local_rank: int = 0) -> torch.device:
    """The device of a process: that of --device, or a GPU if there is one. Raises ConfigError if it is not there."""
    wanted = requested or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"--device is {wanted!r}, which is no device: set it to cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device is {wanted!r}, but models run on cpu and cuda only: set it to one of them")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"there is no GPU for --device {wanted}: set --device cpu")
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"there is no GPU {index} for --device {wanted} on local rank {local_rank}: torch sees {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
