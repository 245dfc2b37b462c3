"""A batch script with stubs in the place of SLURM's programs."""

import dataclasses
import os
import re
import subprocess
from pathlib import Path

from based_megatron.config import load_config
from based_megatron.launchers.script import SlurmOptions, render_sbatch

CONFIG = load_config("tiny")
STUBS = {
    "scontrol": 'case "$1 $2" in *hostnames) printf "node1\\nnode2\\n";; *job) cat ended-$3;; '
    'requeue*) [ -z "$NO_REQUEUE" ] && echo requeue >>calls;; esac',
    "squeue": 'case "$*" in *--steps*) printf "7.batch\\n7.1\\n";; *) cat state;; esac',
    "scancel": 'echo scancel "$@" >>calls',
    "sinfo": 'cat sinfo 2>/dev/null',
    "sbatch": 'echo sbatch "$@" of $BASED_FORMER_JOB${BASED_KILLED_JOB:+, killed}${SLURM_RESTART_COUNT:+, restarted} >>calls; '
    'echo "8;cluster"',
    "getent": "true",
    "sleep": "/bin/sleep 0.05",
    "hook": 'echo "$BASED_RUN_DIR $1: $2" >>hooks',
    "srun": 'echo "$*" >words; shift 3; [ ! -e ranks ] || . ./ranks',
}  # fmt: skip
CHECKPOINT = "mkdir -p run/checkpoints/step-%08d && touch run/checkpoints/step-%08d/manifest.json"
"""Shell of ranks that save a checkpoint."""


class Job:
    """A batch script in a folder of its own. `run` is one start of it."""

    def __init__(self, folder: Path, **options) -> None:
        self.folder = folder
        config = dataclasses.replace(CONFIG, run_dir=str(folder / "run"))
        usual = dict(nodes=2, tasks_per_node=1, gpus_per_node=0, max_failures=2, hook="hook", successor=False)
        settings = SlurmOptions(**{**usual, **options})
        (folder / "script").write_text(render_sbatch(settings, ["train"], config))
        (folder / "state").write_text("RUNNING\n")
        (folder / "bin").mkdir()
        for name, text in STUBS.items():
            program = folder / "bin" / name
            program.write_text(f"#!/bin/bash\n{text}\n")
            program.chmod(0o755)

    def run(self, ranks: str, **environment: str) -> int:
        """Exit code of the script, where the ranks are a piece of shell; what it calls is new in `calls` and `hooks`."""
        (self.folder / "ranks").write_text(ranks)
        for name in ("calls", "hooks"):
            (self.folder / name).unlink(missing_ok=True)
        slurm = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_JOB_NUM_NODES": "2",
        }
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        result = subprocess.run(
            ["bash", "script"],
            cwd=self.folder,
            env={"PATH": path, **slurm, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.log, self.errors = result.stdout, result.stderr
        # The shell reports what it or we have killed; anything else is a fault of the script.
        assert not re.search(r"script: line \d+: (?!.*(Killed|User defined signal))", self.errors), self.errors
        return result.returncode

    def read(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


def cause(rank: int, order: int, status: int, text: str) -> str:
    """Shell of a rank that leaves a cause, and a traceback."""
    line = f"{order} 1.5 {status} rank {rank} on node{rank + 1}: {text}"
    return f"mkdir -p $BASED_CAUSES; printf '%s\\n\\n0 0.1 2 trace' '{line}' >$BASED_CAUSES/rank-{rank:05d}.txt; "
