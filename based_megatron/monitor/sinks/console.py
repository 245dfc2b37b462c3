"""What a person sees: a table of the run, then one live line on a terminal, or plain lines in a log file."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from based_megatron.config import Config
from based_megatron.config.pattern import parse_fp8_layers, parse_layer_pattern
from based_megatron.config.validate import data_parallel_size
from based_megatron.monitor.flops import parameter_count, training_flops_per_token
from based_megatron.monitor.sinks.base import RunFacts, Sink, perplexity
from based_megatron.monitor.words import duration, human

BAR_WIDTH = 20


class ConsoleSink(Sink):
    """Prints. `console` is where to; standard output unless given."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._run_dir = Path()
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def start(self, run: RunFacts) -> None:
        self._run_dir, self._steps = run.run_dir, run.config.train.steps
        self._console.print(run_table(run))
        if self._console.is_terminal:
            self._progress = Progress(
                BarColumn(BAR_WIDTH), TextColumn("{task.description}", markup=False), console=self._console
            )
            self._task = self._progress.add_task("waiting for the first step", total=self._steps)
            self._progress.update(self._task, completed=run.step)
            self._progress.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        before = BAR_WIDTH + 1 if self._progress is not None else len(time_of_day()) + 1
        line = status_line(step, self._steps, values, self._console.width - before)
        if self._progress is not None:
            self._progress.update(self._task, description=line, completed=step)
        else:
            self._print(line)

    def event(self, step: int, name: str, fields: Mapping[str, Any]) -> None:
        if name in ("start", "resume") or (name == "error" and not fields.get("rank")):
            return  # The table says it, or the command line's last words.
        if name == "error":
            self._print(
                f"step {step} rank {fields['rank']} on {fields['host']} failed first: {fields['type']}: {fields['message']}"
            )
        elif name == "validation":
            loss = fields["loss"]
            self._print(f"step {step} validation loss {loss:.4f} ppl {perplexity(loss):.2f}")
        elif name == "recall":
            self._print(f"step {step} recall {recall_line(fields)}")
        elif name == "end":
            self._stop_progress()
            skipped = f", of which {count} were skipped" if (count := fields.get("skipped_steps")) else ""
            self._print(f"ended at step {step}{skipped}, after {human(fields['tokens_seen'])} tokens; {self._run_dir}")
        else:
            # The table has the run folder.
            fields = {
                key: value.removeprefix(f"{self._run_dir}/") if isinstance(value, str) else value
                for key, value in fields.items()
            }
            shown = " ".join(f"{key}={_short(value)}" for key, value in fields.items())
            self._print(f"step {step} {name} {shown}")

    def close(self) -> None:
        self._stop_progress()

    def _print(self, line: str) -> None:
        self._console.print(f"{time_of_day()} {line}", soft_wrap=True, markup=False, highlight=False)

    def _stop_progress(self) -> None:
        """Give the terminal its cursor back."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def run_table(run: RunFacts) -> Table:
    """What runs, where and how big, before the first step."""
    config = run.config
    model, parallel, train = config.model, config.parallel, config.train
    length = config.data.sequence_length_tokens
    batch_tokens = train.global_batch_sequences * length
    rows = {
        "model": f"{human(parameter_count(model))} parameters, {model.layer_pattern!r}, width {model.hidden_size}",
        "ranks": f"{run.world_size} = tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} "
        f"x data {data_parallel_size(parallel, run.world_size)}, ZeRO {parallel.zero_stage}",
        "batch": f"{train.global_batch_sequences} sequences x {length} = {human(batch_tokens)} tokens, "
        f"micro batch {train.micro_batch_sequences}",
        "data": f"{human(run.training_tokens)} tokens, of which an epoch reads {run.tokens_read / run.training_tokens:.2%}",
        "reads": "\n".join(run.sources),
        "run": f"{train.steps} steps = {human(train.steps * batch_tokens)} tokens, from step {run.step}",
        "cost": f"{human(training_flops_per_token(model, length))} FLOPs a token",
        "device": f"{run.device.type}, {_precision(config)}",
        "folder": str(run.run_dir),
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _precision(config: Config) -> str:
    """The precision, with the layers of fp8."""
    if config.train.precision != "fp8":
        return config.train.precision
    layers = len(parse_layer_pattern(config.model.layer_pattern))
    picked = parse_fp8_layers(config.train.fp8_layers, layers)
    return f"bf16, products of layers {picked[0]} to {picked[-1]} (of 0 to {layers - 1}) in fp8"


def status_line(step: int, total_steps: int, values: Mapping[str, float], width: int) -> str:
    """One line about a step: where it is, how it learns, how fast it goes. What does not fit into the width is left out, the
    least needed first."""
    parts = {
        "step": f"step {step}/{total_steps}",
        "loss": f"loss {values['train/loss']:.4f}",
        "grad": f"grad {values['train/grad_norm']:.3g}",
        "skipped": "SKIPPED" if values["train/skipped"] else "",
    }
    if "throughput/tokens_per_second" in values:
        parts["speed"] = f"{human(values['throughput/tokens_per_second'])} tok/s"
        if "throughput/mfu" in values:
            parts["mfu"] = f"MFU {values['throughput/mfu']:.0%}"
        parts["goodput"] = f"good {values['throughput/goodput']:.0%}"
        parts["eta"] = f"ETA {duration(values['time/eta_seconds'])}"
    parts |= {"lr": f"lr {values['train/lr']:.2e}", "ppl": f"ppl {values['train/perplexity']:.2f}"}
    for least_needed in ("ppl", "lr", "mfu", "goodput", "grad"):
        if len(" ".join(filter(None, parts.values()))) > width:
            parts.pop(least_needed, None)
    return " ".join(filter(None, parts.values()))


def recall_line(fields: Mapping[str, Any]) -> str:
    """What a validation says of recall, in a line: losses of probes follow what a guess of their ids would have."""
    if fields["ar_ppl"] is None:
        parts = ["no AR hits"]
    else:
        parts = [
            f"ppl {fields['ar_ppl']:.2f} on AR hits ({fields['ar_share']:.1%} of tokens), {fields['other_ppl']:.2f} on others"
        ]
    of_task: dict[str, list[str]] = {}
    for name, loss in fields["probes"].items():
        if loss is not None:
            of_task.setdefault(f"{name.partition('/')[0]} (chance {fields['chance'][name]:.2f})", []).append(
                f"{loss:.2f}"
            )
    parts += [f"{task} {' '.join(losses)}" for task, losses in of_task.items()]
    return "; ".join(parts)


def time_of_day() -> str:
    """The local time, as lines of a log begin."""
    return time.strftime("%H:%M:%S")


def _short(value: object) -> str:
    """Text on one line, numbers with a few digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return repr(value) if isinstance(value, str) else str(value)
