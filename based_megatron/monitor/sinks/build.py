"""The sinks that a config asks for."""

import importlib.util

from based_megatron.config import MonitorConfig
from based_megatron.errors import ConfigError
from based_megatron.monitor.sinks.base import RunFacts, Sink
from based_megatron.monitor.sinks.console import ConsoleSink
from based_megatron.monitor.sinks.events import EventsSink
from based_megatron.monitor.sinks.mlflow import MlflowSink
from based_megatron.monitor.sinks.tensorboard import TensorBoardSink
from based_megatron.monitor.sinks.wandb import WandbSink


def check_trackers(config: MonitorConfig) -> None:
    """Raises ConfigError for a tracker whose library is not installed."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"monitor.trackers has {name}, which is not installed: pip install 'based-megatron[trackers]', or leave it out"
            )


def start_sinks(run: RunFacts) -> list[Sink]:
    """The sinks of a run, ready to be written to: the console and events.jsonl, and what `monitor` turns on."""
    sinks: list[Sink] = [ConsoleSink(), EventsSink()]
    if run.config.monitor.tensorboard:
        sinks.append(TensorBoardSink())
    trackers = {"wandb": WandbSink, "mlflow": MlflowSink}
    sinks += [trackers[name]() for name in run.config.monitor.trackers]
    for sink in sinks:
        sink.start(run)
    return sinks
