"""Weights & Biases: `monitor.trackers wandb`. Offline with WANDB_MODE=offline; keys and servers are its own settings."""

from collections.abc import Mapping
from typing import Any

from based_megatron.config import to_dict
from based_megatron.monitor.sinks.base import RunFacts, Sink


class WandbSink(Sink):
    """One run of the project `monitor.project`, which a resumed run goes on with."""

    def start(self, run: RunFacts) -> None:
        import wandb

        self._run = wandb.init(
            project=run.config.monitor.project,
            name=run.run_name,
            id=run.run_id,
            resume="allow",
            dir=str(run.run_dir),
            config=to_dict(run.config),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def event(self, step: int, name: str, fields: Mapping[str, Any]) -> None:
        if name == "validation":
            self._run.log({f"validation/{key}": value for key, value in fields.items()}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        self._run.finish()
