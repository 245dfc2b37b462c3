"""The tasks of `based eval`: groups of them, where their data lies, and what is refused before anything is loaded."""

import difflib
import glob
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from based_megatron.errors import ConfigError

GENERATED = ("metadata", "packages_html", "phonebook")
EXTRACTION = ("swde", "fda", "squad_completion")
CLOZE = ("based_drop", "based_triviaqa", "based_nq_512", "based_nq_1024", "based_nq_2048")
"""Question sets rewritten by the authors of JRT (arXiv 2407.05483), so that the answer comes last. lm-eval has none of them."""
RULER = tuple(f"niah_{kind}_{number}" for kind in ("single", "multikey") for number in (1, 2, 3))
MADE_BY_LM_EVAL = frozenset(RULER)
"""Tasks whose rows lm-eval makes: they have no data folder. Those with essays as haystack download them."""
GROUPS = {
    "generated": GENERATED,
    "recall": EXTRACTION + CLOZE,
    "commonsense": ("lambada_openai", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande"),
    "super-glue": ("boolq", "cb", "copa", "multirc", "record", "sglue_rte", "wic", "wsc"),
    "ruler": RULER,
}
EXTRA = "pip install 'based-megatron[eval]'"


@dataclass(frozen=True)
class Task:
    """A task, and where its rows come from."""

    name: str
    kind: Literal["generated", "local", "stock"]
    """local: rows of text and value in a folder of the user. stock: a task of lm-eval, or one that is run by it."""
    data: Path | None = None
    """Local file or folder of rows; None if they are generated or downloaded."""


def chosen_tasks(names: Sequence[str], data: Path | None, offline: bool) -> list[Task]:
    """The tasks of these names and groups, each once, in order.

    data: folder with a file TASK.jsonl or a folder TASK for each task that has its rows there.
    Raises ConfigError for a task that has no rows offline, for one that needs lm-eval where that is not installed, and for a name that
    is nothing.
    """
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data {data} is no folder")
    flat = [task for name in names for task in GROUPS.get(name, (name,))]
    if not flat:
        raise ConfigError(f"no task is chosen: set --tasks to some of {', '.join(GROUPS)}, or to names of tasks")
    return [_task(name, data, offline) for name in dict.fromkeys(flat)]


def _task(name: str, data: Path | None, offline: bool) -> Task:
    places = [] if data is None else [data / f"{name}.jsonl", data / name]
    found = next((place for place in places if place.exists()), None)
    if name in GENERATED:
        return Task(name, "generated", found)
    known = any(name in group for group in GROUPS.values())
    if found is not None and not known:
        return Task(name, "local", found)
    stock = lm_eval_folder()
    near = [] if known or (stock and has_task_file(stock, name)) else near_names(name, _our_names())
    if near:
        raise ConfigError(f"there is no task {name!r}: did you mean {' or '.join(near)}?")
    if stock is None:
        raise ConfigError(
            f"the task {name} needs lm-eval, which is not installed: {EXTRA}; {', '.join(GENERATED)} need it not"
        )
    if offline and found is None and name not in MADE_BY_LM_EVAL:
        tried = " and ".join(map(str, places)) if places else "no folder, because --data is not set"
        raise ConfigError(f"the task {name} has no rows here, and --offline forbids to download them: tried {tried}")
    return Task(name, "stock", found)


def lm_eval_folder() -> Path | None:
    """The folder of lm-eval, which is not imported for it: that takes seconds. None if it is not installed."""
    spec = importlib.util.find_spec("lm_eval")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def has_task_file(folder: Path, name: str) -> bool:
    """Whether lm-eval has a file of this name, as most of its tasks do; its list of all tasks takes ten seconds to read."""
    return any((folder / "tasks").rglob(f"{glob.escape(name)}.y*ml"))


def near_names(name: str, names: Sequence[str]) -> list[str]:
    """The names that somebody may have meant."""
    return difflib.get_close_matches(name, names, n=3, cutoff=0.8)


def _our_names() -> list[str]:
    return [*GROUPS, *(name for group in GROUPS.values() for name in group)]
