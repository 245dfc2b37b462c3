"""The check of real processes that stand for nodes."""

import json
import os
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from based_megatron.cli import main
from based_megatron.nodes import measure
from support.pool import fork_context, free_port


def run_rank(
    rank: int, world_size: int, port: int, folder: Path, wrong_rank: int, timeout_seconds: int, leader: int
) -> None:
    """`based nodes` on a rank, two of them on each node; one computes another product."""
    os.environ |= dict(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2", SLURMD_NODENAME=f"n{rank // 2}",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    measure.SIZES["cpu"] = measure.Sizes(matrix=64, memory_bytes=2**16, message_bytes=2**12)
    if rank == wrong_rank:
        measure.product_hash = lambda device: "wrong"
    files = ["--report", str(folder / "nodes.json"), "--bad-nodes", str(folder / "bad")]
    # Rates on a shared CPU vary: what is asked of them here is nothing.
    limits = ["--minimum-share", "1e-9", "--minimum-network-share", "1e-9", "--timeout-seconds", str(timeout_seconds)]
    limits += ["--names", "n0,n1", "--leader", str(leader)]
    raise SystemExit(main(["nodes", "--folder", str(folder), *files, *limits]))


def check(
    folder: Path, world_size: int, absent: Sequence[int] = (), wrong_rank: int = -1, leader: int = 0
) -> tuple[dict, list[str], list[int]]:
    """(report, bad nodes, exit codes) of a check over so many ranks, of which some may never come."""
    port, processes = free_port(), []
    for rank in range(world_size):
        if rank not in absent:
            # Those that wait for an absent one wait in full.
            arguments = (rank, world_size, port, folder, wrong_rank, 6 if absent else 60, leader)
            process: BaseProcess = fork_context().Process(target=run_rank, args=arguments)
            process.start()
            processes.append(process)
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    return json.loads((folder / "nodes.json").read_text()), (folder / "bad").read_text().split(), codes  # type: ignore[return-value]


def test_good_nodes_are_measured(tmp_path):
    report, bad, codes = check(tmp_path, 4)
    assert (bad, codes, report["bad"]) == ([], [0] * 4, {})
    assert [node["host"] for node in report["nodes"]] == ["n0", "n1"]
    for node, other in zip(report["nodes"], ["n1", "n0"], strict=True):
        assert [rank["product"] for rank in node["ranks"]] == [report["nodes"][0]["ranks"][0]["product"]] * 2
        assert list(node["neighbours"]) == [other] and node["neighbours"][other] > 0
        assert node["inside_bytes_per_second"] > 0 and node["file_bytes_per_second"] > 0
        assert abs(node["clock_seconds"]) < 1
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("fault", [dict(absent=[3]), dict(absent=[2, 3]), dict(wrong_rank=3)])
def test_a_dead_or_wrong_rank_is_named_and_the_others_go_on(tmp_path, fault):
    report, bad, codes = check(tmp_path, 4, **fault)
    assert bad == ["n1"] and codes == [1] + [0] * (len(codes) - 1)
    silent = f"no answer from rank {', '.join(map(str, fault.get('absent', [])))}"
    (line,) = report["bad"]["n1"]
    assert line == silent if "absent" in fault else line.startswith("rank 3 computes another product (wrong, others ")


def test_another_node_leads_where_the_first_is_dead(tmp_path):
    report, bad, codes = check(tmp_path, 4, absent=[0, 1], leader=2)
    assert bad == ["n0"] and codes == [1, 0] and report["bad"]["n0"] == ["no answer from rank 0, 1"]
