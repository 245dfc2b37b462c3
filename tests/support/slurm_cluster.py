"""A SLURM cluster of several nodes on this machine, with real daemons. Needs root and the Debian packages `munge slurmctld slurmd
slurm-client iproute2`."""

import os
import secrets
import shutil
import socket
import subprocess
from pathlib import Path

from support.machines import Machines, child, run, wait, why_no_machines

CONF = """
ClusterName=based
SlurmctldHost={host}({net}.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job may not start before its old credential expires: 120 seconds where nobody sets it.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# As production clusters have it: a signal to a step reaches only what srun has started.
ProctrackType=proctrack/{track}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PropagateResourceLimits=NONE
SchedulerParameters=sched_interval=2,batch_sched_delay=1,bf_interval=2
SlurmctldTimeout=10
SlurmdTimeout=15
ReturnToService=1
KillWait=10
MinJobAge=86400
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node[1-{nodes}] NodeAddr={net}.[11-{last}] Port={node_port} CPUs=4 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=15 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def why_no_slurm() -> str:
    """Why no cluster can be made here, or an empty string."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else why_no_machines()


class Cluster:
    """Nodes node1 to nodeN, which see all files of this machine. A context manager: on leaving, all of its processes are gone."""

    def __init__(self, folder: Path, nodes: int, net: str = "10.79.0", port: int = 17800) -> None:
        self.folder, self.nodes, self.port = folder, [f"node{i}" for i in range(1, nodes + 1)], port
        self.machines = Machines(folder, self.nodes, net)
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._bring_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _bring_up(self) -> None:
        folder, net = self.folder, self.machines.net
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        track = "cgroup" if Path("/sys/fs/cgroup/freezer").is_dir() else "linuxproc"
        sizes = {"nodes": len(self.nodes), "last": 10 + len(self.nodes), "port": self.port, "node_port": self.port + 1}
        conf = CONF.format(host=socket.gethostname(), net=net, folder=folder, track=track, **sizes)
        (folder / "slurm.conf").write_text(conf)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        self.machines.__enter__()
        files = {name: f"--{name}-file={folder}/munged.{name}" for name in ("pid", "seed", "log")}
        self._start("munged", "--foreground", f"--key-file={key}", f"--socket={folder}/munge.socket", *files.values())
        wait(lambda: (folder / "munge.socket").exists(), 10)
        self.start_controller()
        for node in self.nodes:
            self.start(node)
        wait(self.is_idle, 60)

    def __exit__(self, *error: object) -> None:
        self.machines.__exit__()
        for process in self._daemons.values():
            process.kill()
            process.wait()
        os.environ.pop("SLURM_CONF", None)

    def start_controller(self) -> None:
        """Start slurmctld, again with the jobs it knew."""
        self._start("slurmctld", "-D")

    def kill_controller(self) -> None:
        """End slurmctld at once."""
        self._daemons["slurmctld"].kill()
        self._daemons["slurmctld"].wait()

    def start(self, node: str) -> None:
        """Switch a node on, again if it lost its power."""
        self.machines.start(node, f"slurmd -N {node}; while :; do sleep 3600 & wait $!; done")

    def answers(self) -> bool:
        """Whether slurmctld does."""
        return bool(self._states())

    def is_idle(self) -> bool:
        """Whether all nodes are there and do nothing."""
        return self._states().count("idle") == len(self.nodes)

    @staticmethod
    def _states() -> list[str]:
        return run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split()

    def _start(self, program: str, *arguments: str) -> None:
        with open(self.folder / f"{program}.out", "a") as log:
            self._daemons[program] = child([program, *arguments], log)
