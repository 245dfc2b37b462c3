"""Numbers of a server for Prometheus, in its text format."""

from collections.abc import Iterator, Mapping
from typing import Any

from based_megatron.serving.worker import Worker


def metrics(worker: Worker) -> str:
    """All numbers, as /metrics gives them."""
    batcher, counts = worker.decoder.batcher, worker.counts
    speed = batcher.speed
    lines = [
        *_metric("based_slots", "gauge", "Texts that are decoded at once.", worker.decoder.loop.slots),
        *_metric("based_running", "gauge", "Prompts that have a slot.", worker.running),
        *_metric("based_waiting", "gauge", "Prompts that wait for a slot.", worker.waiting),
        *_metric("based_prompts_total", "counter", "Prompts that were accepted.", counts.requests),
        *_labelled("based_finished_total", "Prompts by why their text ended.", "reason", counts.finished),
        *_labelled("based_refused_total", "HTTP requests that were refused, by status.", "status", counts.refused),
        *_metric("based_prompt_tokens_total", "counter", "Tokens of prompts.", speed.prompt_tokens),
        *_metric("based_read_seconds_total", "counter", "Time of reading prompts.", speed.read_seconds),
        *_metric("based_tokens_total", "counter", "Tokens generated.", speed.first_tokens + speed.decoded_tokens),
        *_metric("based_decode_seconds_total", "counter", "Time of decoding.", speed.decode_seconds),
    ]
    return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, help_text: str, value: float) -> Iterator[str]:
    yield from (f"# HELP {name} {help_text}", f"# TYPE {name} {kind}", f"{name} {value}")


def _labelled(name: str, help_text: str, label: str, values: Mapping[Any, int]) -> Iterator[str]:
    yield from (f"# HELP {name} {help_text}", f"# TYPE {name} counter")
    for key, value in sorted(values.items()):
        yield f'{name}{{{label}="{key}"}} {value}'
