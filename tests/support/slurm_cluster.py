"""A SLURM cluster of several nodes on this machine: real daemons, each node in namespaces of its own. Needs root and the Debian packages
`munge slurmctld slurmd slurm-client iproute2`."""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from based_megatron.process import end_with

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare")
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
BOOT = """
hostname {node}
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
mount --bind {folder}/hosts /etc/hosts
ip link set lo up
ip addr add {address}/24 dev eth0
ip link set eth0 up
slurmd -N {node}
while :; do sleep 3600 & wait $!; done
"""


def why_not() -> str:
    """Why no cluster can be made here, or an empty string."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    spaces = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"]
    return "" if subprocess.run(spaces, capture_output=True).returncode == 0 else "no right to make namespaces"


class Cluster:
    """Nodes node1 to nodeN, which see all files of this machine. A context manager: on leaving, all of its processes are gone."""

    def __init__(self, folder: Path, nodes: int, net: str = "10.79.0", port: int = 17800) -> None:
        self.folder, self.nodes, self.net, self.port = folder, nodes, net, port
        self.bridge = f"based{port}"
        self._boxes: dict[str, subprocess.Popen] = {}
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._bring_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _bring_up(self) -> None:
        folder, host = self.folder, socket.gethostname()
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        addresses = {f"node{i}": f"{self.net}.{10 + i}" for i in range(1, self.nodes + 1)}
        track = "cgroup" if Path("/sys/fs/cgroup/freezer").is_dir() else "linuxproc"
        sizes = {"nodes": self.nodes, "last": 10 + self.nodes, "port": self.port, "node_port": self.port + 1}
        conf = CONF.format(host=host, net=self.net, folder=folder, track=track, **sizes)
        (folder / "slurm.conf").write_text(conf)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        lines = ["127.0.0.1 localhost", f"{self.net}.1 {host}", *(f"{a} {name}" for name, a in addresses.items())]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        _run("ip", "link", "add", self.bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{self.net}.1/24", "dev", self.bridge)
        _run("ip", "link", "set", self.bridge, "up")
        files = {name: f"--{name}-file={folder}/munged.{name}" for name in ("pid", "seed", "log")}
        self._start("munged", "--foreground", f"--key-file={key}", f"--socket={folder}/munge.socket", *files.values())
        _wait(lambda: (folder / "munge.socket").exists(), 10)
        self.start_controller()
        for node, address in addresses.items():
            self.start(node, address)
        _wait(lambda: self.states().count("idle") == self.nodes, 60)

    def __exit__(self, *error: object) -> None:
        for process in [*self._boxes.values(), *self._daemons.values()]:
            process.kill()
            process.wait()
        for link in (*map(self._cable, self._boxes), self.bridge):
            _run("ip", "link", "del", link, check=False)
        os.environ.pop("SLURM_CONF", None)

    def start_controller(self) -> None:
        """Start slurmctld, again with the jobs it knew."""
        self._start("slurmctld", "-D")

    def kill_controller(self) -> None:
        """End slurmctld at once."""
        self._daemons["slurmctld"].kill()
        self._daemons["slurmctld"].wait()

    def start(self, node: str, address: str = "") -> None:
        """Switch a node on."""
        address = address or f"{self.net}.{10 + int(node.removeprefix('node'))}"
        boot = BOOT.format(node=node, address=address, folder=self.folder)
        spaces = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", boot]
        box = self._boxes[node] = _child(spaces, subprocess.DEVNULL)
        ours = os.readlink("/proc/self/ns/net")
        _wait(lambda: os.readlink(f"/proc/{box.pid}/ns/net") != ours, 10)
        cable = self._cable(node)
        _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(box.pid))
        _run("ip", "link", "set", cable, "master", self.bridge, "up")

    def kill(self, node: str) -> None:
        """Cut a node's power: the network first, so that nobody hears a last word of it."""
        _run("ip", "link", "del", self._cable(node))
        self._boxes[node].kill()
        self._boxes[node].wait()

    def cut(self, node: str) -> None:
        """Unplug a node from the network; its processes go on."""
        _run("ip", "link", "set", self._cable(node), "down")

    def heal(self, node: str) -> None:
        """Plug a node in again."""
        _run("ip", "link", "set", self._cable(node), "up")

    def pids(self, node: str, words: str) -> list[int]:
        """Processes of a node whose command line has these words, oldest first."""
        found, space = [], os.readlink(f"/proc/{self._boxes[node].pid}/ns/net")
        for entry in Path("/proc").iterdir():
            try:
                same = entry.name.isdigit() and os.readlink(entry / "ns/net") == space
                if same and words in (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return sorted(found)

    def states(self) -> list[str]:
        """State of each node."""
        return _run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split()

    def _cable(self, node: str) -> str:
        return f"{self.bridge}-{node.removeprefix('node')}"

    def _start(self, program: str, *arguments: str) -> None:
        with open(self.folder / f"{program}.out", "a") as log:
            self._daemons[program] = _child([program, *arguments], log)


def _child(words: Sequence[str], output: IO | int) -> subprocess.Popen:
    """A process that ends with this one, however this one ends."""
    end = partial(end_with, os.getpid())
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=end)


def _run(*words: str, check: bool = True) -> str:
    return subprocess.run(words, check=check, capture_output=True, text=True).stdout


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the cluster does not come up")
        time.sleep(0.1)
