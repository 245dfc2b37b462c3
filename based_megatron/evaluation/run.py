"""One run of `based eval`: load the model on every rank, ask the tasks one after the other, write what was found."""

import dataclasses
import functools
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from based_megatron import __version__
from based_megatron.config import ParallelConfig
from based_megatron.errors import ConfigError
from based_megatron.evaluation.cli import EvalConfig
from based_megatron.evaluation.generated.rows import Row, digest, to_json_lines
from based_megatron.evaluation.generated.tasks import cut_rows, generated_rows, rows_of_file, score_rows
from based_megatron.evaluation.models import LanguageModel, language_model, read_source, tokenizer_of
from based_megatron.evaluation.ranks import DataRanks, device_of, joined
from based_megatron.evaluation.report import Report, TaskResult, summary, write
from based_megatron.evaluation.scorer import StateScorer
from based_megatron.evaluation.tasks import CLOZE, EXTRACTION, Task
from based_megatron.parallel.environment import rank_from_environment
from based_megatron.parallel.topology import build_topology

Samples = Sequence[Mapping[str, Any]]
Outcome = tuple[TaskResult, Samples]
"""A result, and the answers to its rows."""


def run(config: EvalConfig, contexts: Sequence[int], tasks: Sequence[Task], command: str) -> Report:
    """Evaluate (collective over the ranks of this job); rank 0 writes and prints. Returns the report.

    command: what was typed, for the report.
    """
    _check_prompts(config, tasks)
    info = rank_from_environment()
    device = device_of(config.device, info.local_rank)
    source = read_source(config.model, config.mixers)
    tokenizer = tokenizer_of(source, config.tokenizer, config.model)
    with joined(info, device) as ranks:
        topology = build_topology(ParallelConfig(), device)
        model = language_model(source, tokenizer, topology, config.precision, config.batch, ranks)
        _check_lengths(model, contexts, config.read_twice)
        return evaluate(config, contexts, tasks, model, ranks, _facts(config, model, ranks, device, command))


def evaluate(
    config: EvalConfig,
    contexts: Sequence[int],
    tasks: Sequence[Task],
    model: LanguageModel,
    ranks: DataRanks,
    facts: Mapping[str, str],
) -> Report:
    """Ask all tasks. What has been measured is written after each, whatever ends the run."""
    results: list[TaskResult] = []
    report = Report(facts, results)
    for ask in (ask for task in tasks for ask in _asks(config, contexts, task, model)):
        result, samples = _with_costs(model, ranks, ask)
        results.append(result)
        if ranks.rank == 0:
            print(summary(result), flush=True)
            _write_samples(config.output / "answers", result, samples)
            written = write(report, config.output)
    if ranks.rank == 0:
        print(*written, sep="\n", flush=True)
    return report


def _asks(
    config: EvalConfig, contexts: Sequence[int], task: Task, model: LanguageModel
) -> Iterator[Callable[[], Outcome]]:
    """Calls that each give one result."""
    if task.kind != "stock":
        yield lambda: _ask_rows(config, contexts, task, model)
        return
    from based_megatron.evaluation.harness import cuts, run_stock

    options: dict[str, Any] = {"limit": config.limit or None, "contexts": contexts, "read_twice": config.read_twice}
    for cut in cuts(task, contexts):
        yield functools.partial(run_stock, task, model, cut=cut, **options)


def _ask_rows(config: EvalConfig, contexts: Sequence[int], task: Task, model: LanguageModel) -> Outcome:
    """The result of a task that is not lm-eval's; its rows are written before they are asked."""
    rows, origin = _rows(config, contexts, task, model)
    text = to_json_lines(rows)
    if model.scorer.ranks.rank == 0:
        file = config.output / "data" / task.name / "validation.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    window = model.model.window_left if "S" in model.model.layer_pattern else None
    origins = {"data": origin, "data_hash": digest(text)}
    return score_rows(task.name, rows, model, window=window, read_twice=config.read_twice, **origins)


def _rows(config: EvalConfig, contexts: Sequence[int], task: Task, model: LanguageModel) -> tuple[list[Row], str]:
    """Rows of a task that is not lm-eval's, and where they come from. All ranks take those of rank 0, whose files may differ."""
    limit = config.limit or None

    def make() -> list[Row]:
        if task.data is None:
            return generated_rows(task.name, model.tokenizer, contexts, limit)
        rows = rows_of_file(task.data, model.tokenizer, limit)
        return cut_rows(rows, contexts, model.tokenizer) if contexts else rows

    ranks = model.scorer.ranks
    rows = ranks.gather(make() if ranks.rank == 0 else [])[0]
    return rows, "generated here" if task.data is None else str(task.data)


def _with_costs(model: LanguageModel, ranks: DataRanks, ask: Callable[[], Outcome]) -> Outcome:
    """An outcome with the tokens that all ranks computed for it, and the seconds."""
    scorer = model.scorer
    computed, alone, seconds = scorer.computed_tokens, scorer.alone_tokens, scorer.seconds
    result, samples = ask()
    costs = dataclasses.replace(
        result,
        computed_tokens=sum(ranks.gather(scorer.computed_tokens - computed)),
        alone_tokens=scorer.alone_tokens - alone,
        seconds=scorer.seconds - seconds,
    )
    return costs, samples


def _check_prompts(config: EvalConfig, tasks: Sequence[Task]) -> None:
    changed = [task for task in tasks if task.kind != "stock" or task.name in EXTRACTION + CLOZE]
    if config.read_twice and not changed:
        raise ConfigError(
            "--read-twice changes tasks whose answer is sought in a document, such as --tasks recall; none is chosen"
        )


def _check_lengths(model: LanguageModel, contexts: Sequence[int], read_twice: bool) -> None:
    longest, most = max(contexts, default=0) * (2 if read_twice else 1), model.scorer.longest_tokens
    if most is not None and longest > most:
        raise ConfigError(
            f"--context {max(contexts)}{' with --read-twice' if read_twice else ''} is longer than the {most} positions that this model's "
            f"full attention was trained with: set smaller ones"
        )


def _write_samples(folder: Path, result: TaskResult, samples: Samples) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = " ".join(filter(None, [result.task, result.prompt])).replace(", ", " ").replace(" ", "-")
    lines = (json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
    (folder / f"{name}.jsonl").write_text("".join(lines))


def _facts(
    config: EvalConfig, model: LanguageModel, ranks: DataRanks, device: torch.device, command: str
) -> dict[str, str]:
    facts = {
        "model": f"{config.model}: {model.model.layer_pattern}, hidden size {model.model.hidden_size}",
        "based": __version__,
        "lm-eval": _version("lm-eval"),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "ranks": str(ranks.size),
        "precision": config.precision,
        "path": "decoding states, contexts read once"
        if isinstance(model.scorer, StateScorer)
        else "full attention, whole rows",
        "command": command,
    }
    return {name: value for name, value in facts.items() if value}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
