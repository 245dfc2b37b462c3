"""The batch script and the trainer on a real SLURM of four nodes, disturbed in every way we know.

    python tests/launchers/slurm_trial.py [SCENARIO ...]

Each scenario disturbs a run of two ranks on two nodes and says what became of it. The table goes into docs/launching.md. Name
scenarios to run these only. Needs root, and what support/slurm_cluster.py names; takes about a minute for each scenario.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from slurm_runs import STEPS, Run, Trial, output_of

from support.machines import wait
from support.slurm_cluster import Cluster, why_no_slurm

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
    return disturbed(trial, name, lambda run: output_of("scancel", "--batch", "--signal=USR1", trial.job(run)))


@scenario("time limit is near while ranks start")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    run = trial.launch(name)
    wait(lambda: run.starts > 0, 120)
    time.sleep(1.5)
    output_of("scancel", "--batch", "--signal=USR1", trial.job(run))
    when = time.time()
    trial.wait_end(run)
    return run, when


@scenario("scancel, then submitted again")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    run, _when = disturbed(trial, name, lambda run: output_of("scancel", trial.job(run)))
    assert run.starts == 1, "a cancelled job came back"
    return resubmitted(trial, name, run)


@scenario("scontrol requeue")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    return disturbed(trial, name, lambda run: output_of("scontrol", "requeue", trial.job(run)))


@scenario("preemption")
def _(trial: Trial, name: str) -> tuple[Run, float]:
    urgent = ["sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    return disturbed(trial, name, lambda run: output_of(*urgent))


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
        with contextlib.suppress(ProcessLookupError):  # a command of its own that ended meanwhile
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
    output_of("scancel", trial.job(run))
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
    job = output_of("sbatch", "--parsable", "--output=/dev/null", "--wrap=true").strip()
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
    output_of("sbatch", "--job-name=other", "--dependency=", str(run.folder / "pretrain.sbatch"))
    wait(lambda: not output_of("squeue", "-h", "--name=other"), 240)
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
    blocker = output_of(
        "sbatch", "--parsable", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 60"
    ).strip()
    time.sleep(3)
    run, when = trial.launch(name), time.time()
    assert run.jobs() == ["PENDING"]
    (run.folder / "stop").touch()
    output_of("scancel", blocker)
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
                output_of("scancel", "--user=root")
                time.sleep(5)
            print("| " + " | ".join(cells).replace(str(folder), "RUNS") + " |", flush=True)
    return failed


if __name__ == "__main__":
    if reason := why_no_slurm():
        sys.exit(f"no SLURM here: {reason}")
    sys.exit(run_all(sys.argv[1:] or list(SCENARIOS)))
