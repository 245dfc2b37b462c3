"""The script that compares predictions with peaks runs on a CPU, where there are no peaks."""

import json

from based_megatron.config.validate import validate
from benchmarks.preflight_memory import CASES, config_of, main
from support.pool import fork_context


def test_every_case_can_run():
    for case in CASES:
        validate(config_of(case, quick=False), case.ranks)


def quick_run(folder) -> int:
    """In a process of its own: it joins and leaves process groups."""
    return main(["--quick", "--output", str(folder), "--only", "360m"])


def test_quick_run_writes_table_and_digits(tmp_path):
    process = fork_context().Process(target=quick_run, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    rows = json.loads((tmp_path / "preflight-memory-1.json").read_text())["rows"]
    assert len(rows) == sum(case.ranks == 1 and "360m" in case.name for case in CASES) > 2
    assert all(row["predicted"]["allocated"] > 0 and row["measured"] == {} for row in rows)
    assert (tmp_path / "preflight-memory-1.md").read_text().count("not measured") == len(rows)
