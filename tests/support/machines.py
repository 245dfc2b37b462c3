"""Machines of their own network and host name, as namespaces of this one. They see all of its files. Needs root and `iproute2`."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from based_megatron.process import end_with

SPACES = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child"]
BOOT = """
hostname {name}
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
mount --bind {folder}/hosts /etc/hosts
ip link set lo up
ip addr add {address}/24 dev eth0
ip link set eth0 up
{program}
"""


def why_no_machines() -> str:
    """Why none can be made here, or an empty string."""
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if subprocess.run([*SPACES, "true"], capture_output=True).returncode:
        return "no right to make namespaces"
    probe = subprocess.run(["ip", "link", "add", "basedprobe", "type", "bridge"], capture_output=True)
    run("ip", "link", "del", "basedprobe", check=False)
    return "" if probe.returncode == 0 else "no right to make a bridge"


class Machines:
    """Machines at addresses NET.11, NET.12, ... on one bridge; this one is NET.1. A context manager: on leaving, they are gone."""

    def __init__(self, folder: Path, names: Sequence[str], net: str) -> None:
        self.folder, self.net, self.bridge = folder, net, f"based{net.split('.')[1]}"
        self._addresses = {name: f"{net}.{11 + i}" for i, name in enumerate(names)}
        self.processes: dict[str, subprocess.Popen] = {}
        """The first process of each machine that is on."""

    def __enter__(self) -> "Machines":
        lines = ["127.0.0.1 localhost", f"{self.net}.1 {socket.gethostname()}"]
        lines += [f"{address} {name}" for name, address in self._addresses.items()]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "addr", "add", f"{self.net}.1/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        for link in (*map(self._cable, self._addresses), self.bridge):
            run("ip", "link", "del", link, check=False)

    def start(self, name: str, program: str, output: IO | int = subprocess.DEVNULL) -> subprocess.Popen:
        """Switch a machine on. It is off when the program, a piece of shell, ends."""
        boot = BOOT.format(name=name, address=self._addresses[name], folder=self.folder, program=program)
        box = self.processes[name] = child([*SPACES, "bash", "-c", boot], output)
        ours = os.readlink("/proc/self/ns/net")
        wait(lambda: os.readlink(f"/proc/{box.pid}/ns/net") != ours, 10)
        cable = self._cable(name)
        run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(box.pid))
        run("ip", "link", "set", cable, "master", self.bridge, "up")
        return box

    def kill(self, name: str) -> None:
        """Cut a machine's power: the network first, so that nobody hears a last word of it."""
        run("ip", "link", "del", self._cable(name))
        self.processes[name].kill()
        self.processes[name].wait()

    def cut(self, name: str) -> None:
        """Unplug a machine from the network; its processes go on."""
        run("ip", "link", "set", self._cable(name), "down")

    def heal(self, name: str) -> None:
        """Plug a machine in again."""
        run("ip", "link", "set", self._cable(name), "up")

    def slow(self, name: str) -> None:
        """Make the network of a machine slow, until it is switched off."""
        run(
            "tc",
            "qdisc",
            "add",
            "dev",
            self._cable(name),
            "root",
            "tbf",
            "rate",
            "4mbit",
            "burst",
            "16kb",
            "latency",
            "200ms",
        )

    def pids(self, name: str, words: str) -> list[int]:
        """Processes of a machine whose command line has these words, oldest first."""
        found, space = [], os.readlink(f"/proc/{self.processes[name].pid}/ns/net")
        for entry in Path("/proc").iterdir():
            try:
                same = entry.name.isdigit() and os.readlink(entry / "ns/net") == space
                if same and words in (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return sorted(found)

    def _cable(self, name: str) -> str:
        return f"{self.bridge}-{list(self._addresses).index(name) + 1}"


def child(words: Sequence[str], output: IO | int) -> subprocess.Popen:
    """A process that ends with this one, however this one ends."""
    end = partial(end_with, os.getpid())
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=end)


def run(*words: str, check: bool = True) -> str:
    """Output of a command."""
    return subprocess.run(words, check=check, capture_output=True, text=True).stdout


def wait(condition: Callable[[], bool], seconds: float, pause: float = 0.1) -> None:
    """Until a condition holds. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so after {seconds:.0f} s")
        time.sleep(pause)
