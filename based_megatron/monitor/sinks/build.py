"""The sinks that a config asks for."""

from based_megatron.monitor.sinks.base import RunFacts, Sink
from based_megatron.monitor.sinks.console import ConsoleSink
from based_megatron.monitor.sinks.events import EventsSink
from based_megatron.monitor.sinks.tensorboard import TensorBoardSink


def start_sinks(run: RunFacts) -> list[Sink]:
    """The sinks of a run, ready to be written to: the console and events.jsonl, and what `monitor` turns on."""
    sinks: list[Sink] = [ConsoleSink(), EventsSink()]
    if run.config.monitor.tensorboard:
        sinks.append(TensorBoardSink())
    for sink in sinks:
        sink.start(run)
    return sinks
