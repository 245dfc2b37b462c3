"""Tasks of lm-eval, asked of our model class. The only file that imports lm_eval: it takes seconds, and need not be installed."""

import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks.fda.task import FDA
from lm_eval.tasks.squad_completion.task import SQUADCompletion
from lm_eval.tasks.swde.task import SWDE
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerFast

from based_megatron.errors import BasedError, ConfigError, DataError
from based_megatron.evaluation.contexts import Asked, contains, divided, window_around_answer
from based_megatron.evaluation.generated.rows import digest
from based_megatron.evaluation.models import LanguageModel
from based_megatron.evaluation.report import TaskResult
from based_megatron.evaluation.scorer import Question
from based_megatron.evaluation.tasks import CLOZE, EXTRACTION, GROUPS, RULER, Task, near_names

NEW_TOKENS = 256
"""Tokens that are generated at most where a task does not say: lm-eval's number."""
ANY_LENGTH = 2**31 - 1
"""Most tokens of a row for a model that takes any length."""
BOOTSTRAPS = 100
"""Samples for standard errors that have no formula."""
EXTRACTION_CLASSES = {"swde": SWDE, "fda": FDA, "squad_completion": SQUADCompletion}
CLOZE_VERSION = 1
FOLDERS = ("arc", "hellaswag", "lambada", "piqa", "ruler", "super_glue", "winogrande")
"""Folders of lm-eval with the tasks of our groups: all of them take ten seconds to read."""


class HarnessModel(TemplateLM):
    """Our model as lm-eval's. Data parallelism is inside: lm-eval sees one rank, and every rank sees all requests."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model, self.tokenizer = model, model.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.model.eos_id

    @property
    def max_length(self) -> int:
        """Most tokens of a row."""
        return self.model.scorer.longest_tokens or ANY_LENGTH

    @property
    def max_gen_toks(self) -> int:
        return NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        return type(self.tokenizer).__name__

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return list(self.model.encode(string))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Scores of (context, continuation): requests with one context share its state."""
        continuations: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
        for _texts, context, continuation in requests:
            of_context = continuations.setdefault(tuple(context), {})
            of_context.setdefault(tuple(continuation), len(of_context))
        questions = [Question(context, tuple(found)) for context, found in continuations.items()]
        scores = dict(zip(continuations, self.model.scorer.log_likelihoods(questions), strict=True))
        places = [(tuple(context), tuple(continuation)) for _texts, context, continuation in requests]
        found = [scores[context][continuations[context][continuation]] for context, continuation in places]
        return [(score.log_likelihood, score.is_greedy) for score in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts after an end of document: in one go with the state kept, or in windows of full attention."""
        windows = [self._windows(self.tok_encode(request.args[0])) for request in requests]
        scores = iter(self.model.scorer.log_likelihoods([window for of_text in windows for window in of_text]))
        return [sum(next(scores)[0].log_likelihood for _ in of_text) for of_text in windows]

    def _windows(self, ids: list[int]) -> list[Question]:
        rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1) if ids else ()
        pairs = map(make_disjoint_window, rolling)
        return [Question(tuple(context), (tuple(continuation),)) for context, continuation in pairs]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations; requests with one kind of end are one batch job."""
        answers: dict[int, str] = {}
        kinds: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for index, request in enumerate(requests):
            options = request.args[1]
            if options.get("do_sample") or options.get("num_beams", 1) != 1:
                raise ConfigError(f"a task wants sampling or beams ({options}): only greedy decoding is offered here")
            until = options.get("until") or []
            ends = (until,) if isinstance(until, str) else tuple(until)
            kinds.setdefault((ends, int(options.get("max_gen_toks", NEW_TOKENS))), []).append(index)
        for (ends, new_tokens), indices in kinds.items():
            found = self.model.write([requests[index].args[0] for index in indices], new_tokens, ends)
            answers |= zip(indices, found, strict=True)
        return [answers[index] for index in range(len(requests))]


@dataclass(frozen=True)
class StockTask:
    """A task of lm-eval with its rows."""

    name: str
    built: Any
    data: str
    """Where the rows come from."""
    prompt: str
    """What is done to its prompts."""

    def ask(self, model: LanguageModel, limit: int | None) -> tuple[TaskResult, list[dict[str, Any]]]:
        """The result, without costs, and the samples (collective over the ranks)."""
        found = lm_eval.simple_evaluate(
            model=HarnessModel(model),
            tasks=[self.built],
            limit=limit,
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
        )
        if found is None:  # not on the first rank of this node
            return TaskResult(self.name, "", 0, {}, "", "", ""), []
        (name,) = found["results"]
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        metrics, errors = _metrics(found["results"][name])
        if "contains" in metrics:  # a mean, but lm-eval knows no standard error of it
            share = metrics["contains"]
            errors["contains"] = math.sqrt(share * (1 - share) / max(1, len(samples) - 1))
        result = TaskResult(
            task=self.name,
            version=str(found["versions"].get(name)),
            rows=int(found["n-samples"][name]["effective"]),
            metrics=metrics,
            standard_errors=errors,
            data=self.data,
            data_hash=digest("".join(sample["doc_hash"] for sample in samples)),
            prompt_hash=digest("".join(sample["prompt_hash"] for sample in samples)),
            prompt=self.prompt,
        )
        return result, [_shown(sample) for sample in samples]


def stock_tasks(
    task: Task, tokenizer: PreTrainedTokenizerFast, *, contexts: Sequence[int], read_twice: bool
) -> list[StockTask]:
    """The tasks that a name of lm-eval stands for, once for each window of so many tokens around the answer, with their rows.

    Raises ConfigError for an unknown name or missing packages, DataError for rows that cannot be had.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    in_document = task.name in EXTRACTION + CLOZE
    cuts: Sequence[int | None] = contexts if contexts and in_document else (None,)
    found = []
    for cut in cuts:
        changes = [f"context {cut}"] if cut else []
        changes += ["read twice"] if read_twice and in_document else []
        try:
            if in_document:
                tasks = {task.name: _contains_task(task, tokenizer, cut, read_twice)}
            else:
                tasks = _loaded(task, tokenizer, contexts)
        except ImportError as error:
            raise ConfigError(f"the task {task.name} needs more packages: {_words(error)}") from error
        except BasedError:
            raise
        except Exception as error:  # lm-eval asks the first row: templates and functions of each task read its columns
            if task.data is None and not isinstance(error, OSError | datasets.exceptions.DatasetsError):
                raise
            cause = error.__cause__ or error
            raise DataError(
                f"the task {task.name} cannot be had ({type(cause).__name__}: {_words(cause)}): put its rows, with the columns that they "
                f"have on the hub, into --data FOLDER/{task.name}"
            ) from error
        for name, built in tasks.items():
            origin = str(task.data or f"hub: {built.DATASET_PATH}") if built.DATASET_PATH else "made by lm-eval"
            found.append(StockTask(name, built, origin, ", ".join(changes)))
    return found


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _metrics(results: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics and their standard errors; lm-eval's keys are `acc,none` and `acc_stderr,none`."""
    values = {key.partition(",")[0]: value for key, value in results.items() if "," in key}
    numbers = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
    errors = {key.removesuffix("_stderr"): value for key, value in numbers.items() if key.endswith("_stderr")}
    # RULER gives -1 for lengths that were not asked for.
    metrics = {key: value for key, value in numbers.items() if not key.endswith("_stderr") and value != -1}
    return metrics, errors


def _shown(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {key: sample[key] for key in ("doc_id", "target", "resps", "filtered_resps", "prompt_hash") if key in sample}


def _loaded(task: Task, tokenizer: PreTrainedTokenizerFast, contexts: Sequence[int]) -> dict[str, Any]:
    """Tasks of lm-eval by their names: one, or those of one of its groups."""
    overrides: dict[str, Any] = {"task": task.name}
    if task.data is not None:
        overrides |= {"dataset_name": None, **_local(task.data)}
        if task.data.is_dir() and not any(task.data.glob("train*")):
            overrides["training_split"] = None  # examples for few-shot prompts, which these are not
    lengths: Sequence[int] = ()
    if task.name in RULER:
        from lm_eval.tasks.ruler.common_utils import DEFAULT_SEQ_LENGTHS, aggregate_metrics

        lengths = contexts or DEFAULT_SEQ_LENGTHS
        overrides["metric_list"] = [
            {"metric": str(length), "aggregation": aggregate_metrics, "higher_is_better": True} for length in lengths
        ]
    known = any(task.name in group for group in GROUPS.values())
    paths: list[str | Path] = [Path(lm_eval.__file__).parent / "tasks" / name for name in FOLDERS]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        metadata = {"tokenizer": folder, "max_seq_lengths": list(lengths)} if lengths else None
        manager = TaskManager(include_path=paths if known else None, include_defaults=not known, metadata=metadata)
        if task.name not in manager.task_index:
            near = near_names(task.name, manager.all_tasks)
            meant = f": did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"lm-eval has no task {task.name!r}{meant}")
        # Only the members of a group take other settings.
        return dict(manager.load([{"group": "chosen", "task": [overrides]}])["tasks"])


def _local(data: Path) -> dict[str, Any]:
    """Settings of a task whose rows lie in a folder with a file for each split, or in one file for all splits."""
    if data.is_dir():
        return {"dataset_path": str(data)}
    files = {split: str(data) for split in ("train", "validation", "test")}
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}


def _contains_task(
    task: Task, tokenizer: PreTrainedTokenizerFast, cut: int | None, read_twice: bool
) -> ConfigurableTask:
    """swde and the others that are scored by `contains`: prompts of lm-eval, or changed as asked for."""
    cloze = task.name in CLOZE
    base: Any = SWDE if cloze else EXTRACTION_CLASSES[task.name]

    class Contains(base):
        """A task with its own rows and prompts; lm-eval's class would always go to the hub."""

        VERSION = CLOZE_VERSION if cloze else base.VERSION
        DATASET_PATH = f"hazyresearch/{task.name}" if cloze else base.DATASET_PATH
        DATASET_NAME = None if cloze else base.DATASET_NAME

        def download(self, dataset_kwargs: Any = None, **kwargs: Any) -> None:
            if task.data is None:
                super().download(dataset_kwargs, **kwargs)
            else:
                local = _local(task.data)
                self.dataset = datasets.load_dataset(local["dataset_path"], **local.get("dataset_kwargs", {}))

        def doc_to_text(self, doc: Mapping[str, Any]) -> str:
            if not (cloze or cut or read_twice):
                return str(super().doc_to_text(doc))
            asked = _cloze(doc) if cloze else divided(doc["text"], doc["value"], doc.get("key") or "")
            asked = asked if cut is None else window_around_answer(asked, cut, tokenizer)
            return asked.read_twice() if read_twice else asked.text

        def doc_to_target(self, doc: Mapping[str, Any]) -> str:
            return _answers(doc)[0] if cloze else str(super().doc_to_target(doc))

        def process_results(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
            if not cloze:
                return dict(super().process_results(doc, results))
            return {"contains": int(any(contains(results[0], answer) for answer in _answers(doc)))}

    built = Contains()
    built.config.task = task.name
    return built


def _cloze(doc: Mapping[str, Any]) -> Asked:
    """A passage that ends before its answer: some rows have the question at the end of the context too."""
    context, question = str(doc["context"]).strip(), str(doc["question"]).strip()
    while question and context.lower().endswith(question.lower()):
        context = context[: -len(question)].strip()
    return Asked(context.strip(".") + ".", " " + question, _answers(doc)[0])


def _answers(doc: Mapping[str, Any]) -> list[str]:
    return [str(answer).strip() for answer in doc["answers"]] or ["unanswerable"]
