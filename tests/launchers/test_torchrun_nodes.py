"""torchrun over two machines without SLURM, as docs/launching.md says: two namespaces, each with a network and a host name of its own."""

import shlex
import sys

import pytest

from support.machines import Machines, why_no_machines
from support.runs import TINY, losses, prepare_corpus

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_no_machines()), reason=why_no_machines() or "it can")]


def test_two_machines_train_as_one(tmp_path):
    data = prepare_corpus(tmp_path, documents=60)
    names = ["first", "second"]
    logs = [tmp_path / f"{name}.log" for name in names]
    curves = []
    with Machines(tmp_path, names, "10.80.0") as machines:
        for nodes, ranks in ((2, 1), (1, 2)):
            run_dir = tmp_path / f"run{nodes}"
            processes = []
            for node, (name, log) in enumerate(zip(names[:nodes], logs, strict=False)):
                rendezvous = ["--nnodes", nodes, "--node-rank", node, "--master-addr", "first", "--master-port", 29511]
                line = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", ranks]
                train = ["train", *TINY, "--run-dir", run_dir, "--data.path", data, "--train.steps", 3]
                program = shlex.join(map(str, [*line, "-m", "based_megatron", *train]))
                with open(log, "w") as output:
                    processes.append(machines.start(name, program, output))
            assert [process.wait(240) for process in processes] == [0] * nodes, logs[0].read_text()
            curves.append(losses(run_dir))
    assert len(curves[0]) == 3 and curves[0] == curves[1]
