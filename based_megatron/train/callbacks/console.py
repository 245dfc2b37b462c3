"""What a person sees: a table of the run, then one live line on a terminal, or plain lines in a log file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from based_megatron.config.validate import data_parallel_size
from based_megatron.monitor.flops import parameter_count, training_flops_per_token
from based_megatron.monitor.throughput import Throughput
from based_megatron.train.callbacks.base import StepReport
from based_megatron.train.callbacks.metrics import MetricsLogger, perplexity

if TYPE_CHECKING:
    from based_megatron.train.trainer import Trainer


class ConsoleLogger(MetricsLogger):
    """Prints on the logging rank. `console` is where to; standard output unless given."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def start(self, trainer: Trainer) -> None:
        self._console.print(run_table(trainer))
        if self._console.is_terminal:
            self._progress = Progress(
                BarColumn(bar_width=20), TextColumn("{task.description}", markup=False), console=self._console
            )
            self._task = self._progress.add_task("waiting for the first step", total=trainer.config.train.steps)
            self._progress.update(self._task, completed=trainer.step)
            self._progress.start()

    def post_step(self, trainer: Trainer, report: StepReport) -> None:
        super().post_step(trainer, report)
        if self._progress is not None:
            self._progress.update(self._task, completed=report.step)

    def log(self, trainer: Trainer, report: StepReport, throughput: Throughput | None) -> None:
        line = status_line(report, trainer.config.train.steps, throughput)
        if self._progress is not None:
            self._progress.update(self._task, description=line)
        else:
            self._print(line)

    def on_validation(self, trainer: Trainer, loss: float) -> None:
        if trainer.topology.is_logger:
            self._print(f"step {trainer.step} validation loss {loss:.4f} ppl {perplexity(loss):.2f}")

    def on_event(self, trainer: Trainer, name: str, fields: dict) -> None:
        if trainer.topology.is_logger:
            shown = " ".join(f"{key}={_short(value)}" for key, value in fields.items())
            self._print(f"step {trainer.step} {name} {shown}")

    def on_end(self, trainer: Trainer) -> None:
        self._stop_progress()
        if trainer.topology.is_logger:
            self._print(f"ended at step {trainer.step} after {human(trainer.tokens_seen)} tokens; {trainer.run_dir}")

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self._stop_progress()

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _stop_progress(self) -> None:
        """Give the terminal its cursor back."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def run_table(trainer: Trainer) -> Table:
    """What runs, where and how big, before the first step."""
    config = trainer.config
    model, parallel, train = config.model, config.parallel, config.train
    length = config.data.sequence_length_tokens
    world_size = trainer.topology.world_size
    batch_tokens = train.global_batch_sequences * length
    rows = {
        "model": f"{human(parameter_count(model))} parameters, {model.layer_pattern!r}, width {model.hidden_size}",
        "ranks": f"{world_size} = tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} "
        f"x data {data_parallel_size(parallel, world_size)}, ZeRO {parallel.zero_stage}",
        "batch": f"{train.global_batch_sequences} sequences x {length} = {human(batch_tokens)} tokens, "
        f"micro batch {train.micro_batch_sequences}",
        "run": f"{train.steps} steps = {human(train.steps * batch_tokens)} tokens, from step {trainer.step}",
        "cost": f"{human(training_flops_per_token(model, length))} FLOPs a token",
        "device": f"{trainer.device.type}, {train.precision}",
        "folder": str(trainer.run_dir),
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def status_line(report: StepReport, total_steps: int, throughput: Throughput | None) -> str:
    """One line about a step: where it is, how it learns, how fast it goes."""
    parts = [
        f"step {report.step}/{total_steps}",
        f"loss {report.loss:.4f}",
        f"ppl {perplexity(report.loss):.2f}",
        f"lr {report.lr:.2e}",
        f"grad {report.grad_norm:.3f}",
    ]
    if report.skipped:
        parts.append("SKIPPED")
    if throughput:
        parts.append(f"{human(throughput.tokens_per_second)} tok/s")
        if throughput.mfu is not None:
            parts.append(f"MFU {throughput.mfu:.1%}")
        parts.append(f"data {throughput.data_seconds / throughput.step_seconds:.1%}")
        parts.append(f"ETA {duration((total_steps - report.step) * throughput.step_seconds)}")
    return " | ".join(parts)


def human(number: float) -> str:
    """Three digits and a unit: 362620928 is 363M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:  # else 999,999 would be 1e+03k
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """The two largest units: 3h12m, 5m07s, 42s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def _short(value: object) -> str:
    """Text on one line, numbers with a few digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return repr(value) if isinstance(value, str) else str(value)
