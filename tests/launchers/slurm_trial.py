"""The batch script and the trainer on a real SLURM of four nodes, disturbed in every way we know.

    python tests/launchers/slurm_trial.py [SCENARIO ...]

Each scenario disturbs a run of two ranks on two nodes and says what became of it. The table goes into docs/launching.md. Name
scenarios to run these only. Needs root, and what support/slurm_cluster.py names; takes about a minute for each scenario.
"""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from based_megatron.cli import main
from based_megatron.monitor.events import read_events
from support.machines import wait
from support.runs import TINY, prepare_corpus
from support.slurm_cluster import Cluster, why_no_slurm

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
        jobs = [line.split() for line in _output("squeue", "-h", "-o", "%j %T").splitlines()]
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


SCENARIOS: dict[str, Callable[[Trial, str], tuple[Run, float]]] = {}
"""Each disturbs a run of the given name; returns it once it has ended, and when it was disturbed."""


def scenario(title: str) -> Callable:
    def add(function: Callable[[Trial, str], tuple[Run, float]]) -> Callable:
        SCENARIOS[title] = function
        return function

    return add


def disturbed(
    trial: Trial, name: str, disturb: Callable[[Run], object], step: int = 13, *options: str
) -> tuple[Run, float]:
    """A run that is disturbed after a step, and its end."""
    run = trial.launch(name, *options)
    trial.wait_step(run, step)
    disturb(run)
    when = time.time()
    trial.wait_end(run)
    return run, when


def resubmitted(trial: Trial, name: str, run: Run) -> tuple[Run, float]:
    """A run that has ended, submitted again to its end; when it was submitted."""
    when = time.time()
    trial.launch(name)
    trial.wait_end(run)
    return run, when


def cut_off(trial: Trial, name: str, in_save: bool) -> tuple[Run, float]:
    """A run whose second node loses its network, and has it back after the end."""
    run = trial.launch(name)
    trial.wait_step(run, 13)
    node = trial.nodes(run)[1]
    if in_save:
        wait(lambda: any(run.folder.glob("checkpoints/*.tmp")), 60, 0.002)
    trial.cluster.machines.cut(node)
    when = time.time()
    trial.wait_end(run)
    trial.cluster.machines.heal(node)
    _all_idle(trial)
    return run, when


@scenario("nothing")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    trial.undisturbed()
    return Run(trial.folder / "undisturbed"), time.time()


@scenario("time limit is near")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    """The signal that SLURM sends by itself."""
    return disturbed(trial, name, lambda run: _output("scancel", "--batch", "--signal=USR1", trial.job(run)))


@scenario("time limit is near while ranks start")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    run = trial.launch(name)
    wait(lambda: run.starts > 0, 120)
    time.sleep(1.5)
    _output("scancel", "--batch", "--signal=USR1", trial.job(run))
    when = time.time()
    trial.wait_end(run)
    return run, when


@scenario("scancel, then submitted again")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    run, _when = disturbed(trial, name, lambda run: _output("scancel", trial.job(run)))
    assert run.starts == 1, "a cancelled job came back"
    return resubmitted(trial, name, run)


@scenario("scontrol requeue")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    return disturbed(trial, name, lambda run: _output("scontrol", "requeue", trial.job(run)))


@scenario("preemption")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    urgent = ["sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    return disturbed(trial, name, lambda run: _output(*urgent))


@scenario("a node loses power in a step")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    with _restored(trial) as lost:
        return disturbed(trial, name, lambda run: trial.cluster.machines.kill(lost(trial.nodes(run)[1])))


@scenario("a node loses power in a save")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    def disturb(run: Run) -> None:
        node = lost(trial.nodes(run)[1])
        wait(lambda: any(run.folder.glob("checkpoints/*.tmp")), 60, 0.002)
        trial.cluster.machines.kill(node)

    with _restored(trial) as lost:
        return disturbed(trial, name, disturb)


@scenario("the node of rank 0 loses power")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    """The batch script runs there too."""
    with _restored(trial) as lost:
        return disturbed(trial, name, lambda run: trial.cluster.machines.kill(lost(trial.nodes(run)[0])))


@scenario("a node is cut off the network in a step")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    """Its rank goes on, and sees the file system."""
    return cut_off(trial, name, in_save=False)


@scenario("a node is cut off the network in a save")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    return cut_off(trial, name, in_save=True)


@scenario("a rank is killed")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    return disturbed(trial, name, lambda run: [os.kill(pid, signal.SIGKILL) for pid in trial.rank_pids(run, 1)[-1:]])


@scenario("a rank is stopped (SIGSTOP)")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    stopped: list[str] = []

    def disturb(run: Run) -> None:
        stopped.append(trial.nodes(run)[1])
        os.kill(trial.rank_pids(run, 1)[-1], signal.SIGSTOP)

    run, when = disturbed(trial, name, disturb)
    excluded = [line.split()[:2] for line in (run.folder / "excluded_nodes").read_text().splitlines()]
    assert excluded == [[stopped[0], "stopped"]] and stopped[0] not in trial.nodes(run), excluded
    return run, when


@scenario("srun is killed")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    def disturb(run: Run) -> None:
        for pid in trial.cluster.machines.pids(trial.nodes(run)[0], "srun --kill-on-bad-exit"):
            os.kill(pid, signal.SIGKILL)

    return disturbed(trial, name, disturb)


def kill_script(trial: Trial, run: Run) -> None:
    """Kill the batch script of the job that runs."""
    for pid in trial.cluster.machines.pids(trial.nodes(run)[0], "slurm_script"):
        os.kill(pid, signal.SIGKILL)


@scenario("the batch script is killed")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    """Its successor goes on."""
    run, when = disturbed(trial, name, lambda run: kill_script(trial, run))
    assert "was killed" in run.log and len(list(run.folder.glob("slurm-*.log"))) == 2, run.log
    return run, when


@scenario("the batch script is killed, then its successor is cancelled")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    """The one in the place of the one that was killed: none is left."""
    run = trial.launch(name)
    trial.wait_step(run, 13)
    kill_script(trial, run)
    when = time.time()
    wait(lambda: run.starts == 2, 60)
    _output("scancel", trial.job(run))
    trial.wait_end(run)
    assert run.starts == 2 and len(run.losses) < STEPS, "a cancelled job came back"
    return run, when


@scenario("the batch script is killed without a successor, then submitted again")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    run, _when = disturbed(trial, name, lambda run: kill_script(trial, run), 13, "--no-successor")
    left = [pid for node in trial.nodes(run) for pid in trial.cluster.machines.pids(node, str(run.folder))]
    assert run.starts == 1 and not left, f"ranks outlive the script: {left}"
    return resubmitted(trial, name, run)


@scenario("the batch script is killed at every start")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    """Before there is a checkpoint."""
    run, when = trial.launch(name), time.time()
    for start in (1, 2, 3):
        wait(lambda start=start: run.starts == start, 120)
        kill_script(trial, run)
    trial.wait_end(run)
    return run, when


@scenario("slurmctld restarts")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    def disturb(run: Run) -> None:
        trial.cluster.kill_controller()
        time.sleep(2)
        trial.cluster.start_controller()
        wait(trial.cluster.answers, 60)

    return disturbed(trial, name, disturb)


@scenario("ranks that crash at every start")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    run, when = trial.launch(name, "--wrap", "false"), time.time()
    trial.wait_end(run)
    return run, when


@scenario("settings that the ranks refuse")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    """Submitted after another job, whose data is not looked at yet."""
    job = _output("sbatch", "--parsable", "--output=/dev/null", "--wrap=true").strip()
    run, when = trial.launch(name, "--after", job, settings=("--checkpoint.load", "/nowhere")), time.time()
    trial.wait_end(run)
    return run, when


@scenario("a full disk")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    disk = trial.folder / "disk"

    def disturb(run: Run) -> None:
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while filler.write(b"0" * 4096):
                pass

    run = trial.launch(name, folder=disk)
    trial.wait_step(run, 13)
    disturb(run)
    when = time.time()
    trial.wait_end(run)
    return run, when


@scenario("two jobs of one folder, by a link")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    run = trial.launch(name)
    (trial.folder / f"link-{name}").symlink_to(run.folder)
    trial.launch(f"link-{name}")
    trial.wait_step(run, 1)
    states = run.jobs()
    assert sorted(states) == ["PENDING", "PENDING", "RUNNING"], f"a job, its successor and the second one, not {states}"
    when = time.time()
    trial.wait_end(run)
    return run, when


@scenario("two jobs of one folder, by another name")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    """Around `based launch`: the lock of the folder refuses the ranks of the second."""
    run, when = trial.launch(name), time.time()
    _output("sbatch", "--job-name=other", "--dependency=", str(run.folder / "pretrain.sbatch"))
    wait(lambda: not _output("squeue", "-h", "--name=other"), 240)
    trial.wait_end(run)
    refused = [log for log in run.folder.glob("slurm-*.log") if "is in use by job" in log.read_text()]
    assert len(refused) == 1 and "giving up" in refused[0].read_text(), run.log
    refused[0].rename(run.folder / "refused.log")
    return run, when


def slow_network(trial: Trial, name: str, node: str) -> tuple[Run, float]:
    """A run that measures its nodes first, of which one has a slow network."""
    trial.cluster.machines.slow(node)
    run, when = trial.launch(name, "--check", "--spare-nodes", "1"), time.time()
    try:
        trial.wait_end(run, 1200)
        excluded = [line.split()[0] for line in (run.folder / "excluded_nodes").read_text().splitlines()]
        assert excluded == [node] and node not in trial.nodes(run), excluded
    finally:
        trial.cluster.machines.kill(node)
        trial.cluster.start(node)
        _all_idle(trial)
    return run, when


@scenario("a node with a slow network, and --check")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    return slow_network(trial, name, "node3")


@scenario("a stop file while the job waits")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    blocker = _output(
        "sbatch", "--parsable", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 60"
    ).strip()
    time.sleep(3)
    run, when = trial.launch(name), time.time()
    assert run.jobs() == ["PENDING"]
    (run.folder / "stop").touch()
    _output("scancel", blocker)
    trial.wait_end(run)
    assert run.starts == 0
    return run, when


@scenario("a stop file while the ranks start, then submitted again")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    run = trial.launch(name)
    wait(lambda: run.starts > 0, 120)
    (run.folder / "stop").touch()
    trial.wait_end(run)
    assert len(run.losses) <= 1 and not (run.folder / "stop").exists(), run.losses
    return resubmitted(trial, name, run)


@scenario("the node of rank 0 has a slow network, and --check")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    """All others talk to it in the check, which is then made by way of the second node."""
    return slow_network(trial, name, "node1")


@contextlib.contextmanager
def _restored(trial: Trial) -> Iterator[Callable[[str], str]]:
    """Switches the nodes on again that the scenario says it loses."""
    nodes: list[str] = []

    def lost(node: str) -> str:
        nodes.append(node)
        return node

    yield lost
    for node in nodes:
        trial.cluster.start(node)
    _all_idle(trial)


def _all_idle(trial: Trial) -> None:
    wait(trial.cluster.is_idle, 120)


def _output(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True).stdout


def row(trial: Trial, title: str, run: Run, when: float) -> list[str]:
    """Cells: what was done, how the run ended, its starts, seconds to the next step, steps done again, equality of the curve."""
    later = [event["time"] for event in run.steps if event["time"] > when]
    # Steps of the disturbed start may still have ended: the next one is of a start that begins with lower or later steps.
    gaps = [later[i] for i in range(len(later)) if i == 0 or later[i] - later[i - 1] > 3]
    next_step = "-" if run.starts < 2 or not gaps else f"{gaps[-1] - when:.0f}"
    again = len(run.steps) - len(run.losses)
    whole = run.losses == trial.undisturbed()
    equal = "bit for bit" if whole else "-" if len(run.losses) < STEPS else "NO"
    return [title, run.last_words, str(run.starts), next_step, str(again), equal]


@contextlib.contextmanager
def trial_cluster(folder: Path) -> Iterator[Trial]:
    """A cluster of four nodes, with a small disk at folder/disk."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", str(disk)], check=True)
    try:
        with Cluster(folder / "slurm", nodes=4) as cluster:
            yield Trial(cluster, folder)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def run_all(titles: list[str]) -> int:
    folder = Path(tempfile.mkdtemp(prefix="slurm-trial-"))
    folder.chmod(0o755)
    print(f"run folders are in {folder}", flush=True)
    print(
        "| disturbance | how it ended | starts | s to the next step | steps again | loss curve |",
        "|---|---|---|---|---|---|",
        sep="\n",
    )
    failed = 0
    with trial_cluster(folder) as trial:
        for number, title in enumerate(titles):
            try:
                cells = row(trial, title, *SCENARIOS[title](trial, f"run{number}"))
            except Exception as error:
                cells, failed = [title, f"FAILED: {type(error).__name__}: {error}", "", "", "", ""], failed + 1
                _output("scancel", "--user=root")
                time.sleep(5)
            print("| " + " | ".join(cells).replace(str(folder), "RUNS") + " |", flush=True)
    return failed


if __name__ == "__main__":
    if reason := why_no_slurm():
        sys.exit(f"no SLURM here: {reason}")
    sys.exit(run_all(sys.argv[1:] or list(SCENARIOS)))
