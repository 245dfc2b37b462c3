"""One run of `based eval`: load the model on every rank, ask the tasks one after the other, write what was found."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from based_megatron import __version__
from based_megatron.bench.report import device_name, version_of
from based_megatron.checkpoint.ranks import Ranks
from based_megatron.config import ModelConfig, ParallelConfig
from based_megatron.errors import ConfigError
from based_megatron.evaluation.cli import EvalConfig
from based_megatron.evaluation.generated.rows import Row, digest, to_json_lines
from based_megatron.evaluation.generated.tasks import cut_rows, generated_rows, rows_of_file, score_rows
from based_megatron.evaluation.models import LanguageModel, language_model
from based_megatron.evaluation.ranks import joined
from based_megatron.evaluation.report import Report, TaskResult, summary, write
from based_megatron.evaluation.scorer import StateScorer
from based_megatron.evaluation.tasks import CLOZE, EXTRACTION, Task
from based_megatron.inference.device import device_of
from based_megatron.inference.source import Source, read_source, tokenizer_of
from based_megatron.model.mixers import has_states, layer_mixers
from based_megatron.model.mixers.attention import SlidingWindowAttention
from based_megatron.parallel.environment import rank_from_environment
from based_megatron.parallel.topology import build_topology

Samples = Sequence[Mapping[str, Any]]
Outcome = tuple[TaskResult, Samples]
"""A result, and the answers to its rows."""
Ask = Callable[[LanguageModel], Outcome]
"""A task with its rows, which can be asked of a model (collective over the ranks)."""


def run(config: EvalConfig, contexts: Sequence[int], tasks: Sequence[Task], command: str) -> Report:
    """Evaluate (collective over the ranks of this job); rank 0 writes and prints. Returns the report.

    All rows are read, made or downloaded before the model is on its device. command: what was typed, for the report.
    """
    _check_prompts(config, tasks)
    info = rank_from_environment()
    device = device_of(config.device, info.local_rank)
    source = read_source(config.model, config.mixers)
    _check_lengths(source, contexts, config.read_twice)
    tokenizer = tokenizer_of(source, config.tokenizer, config.model)
    with joined(info, device) as ranks:
        asks = prepared(config, contexts, tasks, source.model, tokenizer, ranks)
        topology = build_topology(ParallelConfig(), device)
        model = language_model(source, tokenizer, topology, config.precision, config.batch, ranks)
        return evaluate(asks, model, config.output, _facts(config, model, device, command))


def prepared(
    config: EvalConfig,
    contexts: Sequence[int],
    tasks: Sequence[Task],
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    ranks: Ranks,
) -> list[Ask]:
    """The tasks with their rows (collective over the ranks)."""
    asks: list[Ask] = []
    for task in tasks:
        if task.kind == "stock":
            from based_megatron.evaluation.harness import stock_tasks

            found = stock_tasks(task, tokenizer, contexts=contexts, read_twice=config.read_twice)
            asks += [functools.partial(stock.ask, limit=config.limit or None) for stock in found]
        else:
            asks.append(_asked_rows(config, contexts, task, model, tokenizer, ranks))
    return asks


def _asked_rows(
    config: EvalConfig,
    contexts: Sequence[int],
    task: Task,
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    ranks: Ranks,
) -> Ask:
    """A task that is not lm-eval's. All ranks take the rows of rank 0, whose files may differ from theirs; it writes them."""
    limit = config.limit or None

    def make() -> list[Row]:
        if task.data is None:
            return generated_rows(task.name, tokenizer, contexts, limit)
        rows = rows_of_file(task.data, tokenizer, limit)
        return cut_rows(rows, contexts, tokenizer) if contexts else rows

    rows = ranks.on_first(make)
    text = to_json_lines(rows)
    if ranks.rank == 0:
        file = config.output / "data" / task.name / "validation.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return lambda language: score_rows(
        task.name,
        rows,
        language,
        window=model.window_left if SlidingWindowAttention in layer_mixers(model) else None,
        read_twice=config.read_twice,
        data="generated here" if task.data is None else str(task.data),
        data_hash=digest(text),
    )


def evaluate(asks: Sequence[Ask], model: LanguageModel, output: Path, facts: Mapping[str, str]) -> Report:
    """Ask all tasks. What has been measured is written after each, whatever ends the run."""
    results: list[TaskResult] = []
    report, is_writer = Report(facts, results), model.scorer.ranks.rank == 0
    for ask in asks:
        result, samples = _with_costs(model, ask)
        results.append(result)
        if is_writer:
            print(summary(result), flush=True)
            _write_samples(output / "answers", result, samples)
            written = write(report, output)
    if is_writer:
        print(*written, sep="\n", flush=True)
    return report


def _with_costs(model: LanguageModel, ask: Ask) -> Outcome:
    """An outcome with the tokens that all ranks computed for it, and the seconds."""
    scorer = model.scorer
    computed, alone, seconds = scorer.computed_tokens, scorer.alone_tokens, scorer.seconds
    result, samples = ask(model)
    costs = dataclasses.replace(
        result,
        computed_tokens=sum(scorer.ranks.together(lambda: scorer.computed_tokens - computed)),
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


def _check_lengths(source: Source, contexts: Sequence[int], read_twice: bool) -> None:
    longest = max(contexts, default=0) * (2 if read_twice else 1)
    most = None if has_states(source.model) else source.sequence_length_tokens
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


def _facts(config: EvalConfig, model: LanguageModel, device: torch.device, command: str) -> dict[str, str]:
    facts = {
        "model": f"{config.model}: {model.model.layer_pattern}, hidden size {model.model.hidden_size}",
        "based": __version__,
        "lm-eval": version_of("lm-eval"),
        "device": device_name(device),
        "ranks": str(model.scorer.ranks.size),
        "precision": config.precision,
        "path": "decoding states, contexts read once"
        if isinstance(model.scorer, StateScorer)
        else "full attention, whole rows",
        "command": command,
    }
    return {name: value for name, value in facts.items() if value}
