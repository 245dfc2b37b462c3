"""Runs of the real trainer as jobs of a real SLURM, for slurm_trial.py."""

import contextlib
import io
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from based_megatron.cli import main
from based_megatron.monitor.events import read_events
from support.machines import wait
from support.runs import TINY, prepare_corpus
from support.slurm_cluster import Cluster

STEPS = 40
RANK = "-m based_megatron train"
"""Words that the command line of a rank has."""
OPTIONS = [
    *["--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "1", "--cpus-per-task", "1", "--no-exclusive"],
    *["--time", "10", "--stop-seconds", "30", "--hang-seconds", "45"],
]  # fmt: skip
SETTINGS = [
    *["--train.steps", str(STEPS), "--checkpoint.interval-steps", "5", "--validation.interval-steps", "0"],
    *["--monitor.no-tensorboard", "--parallel.timeout-seconds", "15"],
]  # fmt: skip


@dataclass
class Run:
    """A run folder, and what its files say."""

    folder: Path

    @property
    def steps(self) -> list[dict]:
        """Every step's event, those that were done again included."""
        path = self.folder / "events.jsonl"
        return [event for event in read_events(path) if event["event"] == "step"] if path.exists() else []

    @property
    def losses(self) -> dict[int, float]:
        return {event["step"]: event["loss"] for event in self.steps}

    @property
    def log(self) -> str:
        """What the script said, in the order of its jobs."""
        files = sorted(self.folder.glob("slurm-*.log"), key=lambda path: int(path.stem.partition("-")[2]))
        return "".join(path.read_text() for path in files)

    @property
    def starts(self) -> int:
        """How often ranks were started."""
        return self.log.count("starting on ")

    @property
    def last_words(self) -> str:
        """The last line of the script, without its time and job."""
        lines = re.findall(r"^\[\S+ job \d+ restart \d+\] (.*)$", self.log, re.MULTILINE)
        return lines[-1] if lines else "nothing"

    def jobs(self) -> list[str]:
        """States of the jobs of this folder that have not ended."""
        jobs = [line.split() for line in output_of("squeue", "-h", "-o", "%j %T").splitlines()]
        return [state for name, state in jobs if f"-{self.folder.name}-" in name]


class Trial:
    """A cluster, a corpus, and the curve of a run that nothing disturbed."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.corpus = prepare_corpus(folder, documents=400)
        self._undisturbed: dict[int, float] = {}

    def undisturbed(self) -> dict[int, float]:
        """Loss of each step of a run that nothing disturbed."""
        if not self._undisturbed:
            run = self.launch("undisturbed")
            self.wait_end(run)
            self._undisturbed = run.losses
        return self._undisturbed

    def launch(self, name: str, *options: str, settings: tuple[str, ...] = (), folder: Path | None = None) -> Run:
        """Submit a run, or submit it again."""
        run = Run((folder or self.folder) / name)
        train = ["train", *TINY, "--run-dir", str(run.folder), "--data.path", str(self.corpus), *SETTINGS, *settings]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = main(["launch", "slurm", *OPTIONS, *options, "--", *train])
        assert status == 0, said.getvalue()
        return run

    def job(self, run: Run) -> str:
        """The number of the newest job of a run."""
        return max((path.stem.partition("-")[2] for path in run.folder.glob("slurm-*.log")), key=int)

    def nodes(self, run: Run) -> list[str]:
        """The nodes of the last start, that of rank 0 first."""
        return re.findall(r"starting on ([^;]*);", run.log)[-1].split()

    def wait_step(self, run: Run, step: int) -> None:
        """Until a step is done."""
        wait(lambda: any(event["step"] >= step for event in run.steps), 240)

    def wait_end(self, run: Run, seconds: float = 300) -> None:
        """Until no job of the run waits or runs."""
        seen = time.monotonic()

        def over() -> bool:
            nonlocal seen
            if run.jobs():
                seen = time.monotonic()
            # Between two jobs there may be none for a moment.
            return time.monotonic() - seen > 3

        wait(over, seconds, 0.3)

    def rank_pids(self, run: Run, rank: int) -> list[int]:
        return self.cluster.machines.pids(self.nodes(run)[rank], RANK)


def output_of(*words: str) -> str:
    """What a command writes."""
    return subprocess.run(words, capture_output=True, text=True).stdout
