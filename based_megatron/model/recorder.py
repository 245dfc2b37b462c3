"""What a model records of itself while it trains, without knowing who listens."""

from typing import Literal, Protocol

from torch import Tensor


class Recorder(Protocol):
    """Takes scalars on the device, and does not read them (monitor/hub.py)."""

    @property
    def wanted(self) -> bool:
        """True in a step that will be logged: what costs time is recorded in such steps only."""

    def record(
        self,
        name: str,
        value: Tensor | float,
        reduce: Literal["mean", "rms", "sum", "norm", "max", "min", "last"] = "mean",
        *,
        group: Literal["world", "layer", "data_context"] = "world",
        count: Tensor | float = 1.0,
    ) -> None:
        """Add a value to those of all micro batches, steps and ranks since the last log point."""


class Silent:
    """A recorder that nobody listens to: of evaluations, and of models outside of training."""

    wanted = False

    def record(self, name: str, value: Tensor | float, *args: object, **kwargs: object) -> None:
        """Do nothing."""


SILENT = Silent()
