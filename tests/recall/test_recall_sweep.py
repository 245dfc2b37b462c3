"""Sweeps: killed and gone on with, a worker that dies, two in one folder, and what is refused before anything is trained."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from based_megatron.cli import main
from based_megatron.errors import ConfigError
from based_megatron.recall import sweep as module
from based_megatron.recall.cli import RecallConfig
from based_megatron.recall.presets import PRESETS, Preset
from based_megatron.recall.study import _preset
from based_megatron.recall.sweep import Sweep, finished, jobs_of, locked
from based_megatron.recall.systems import SYSTEMS
from based_megatron.recall.worker import Setup, Trainer

DYING = """
import os
import re
from based_megatron.model.mixers.attention import SlidingWindowAttention


class Dying(SlidingWindowAttention):
    letter, name, hf_name = "x", "dying", None

    def forward(self, *args, **kwargs):
        os._exit(7)
"""
TIMES = ("seconds", "cpu_seconds", "device")


def command(folder: Path, *options: str) -> list[str]:
    fixed = ("--preset", "tiny", "--epochs", "1", "--workers", "2", "--device", "cpu", "--output", str(folder))
    return [sys.executable, "-m", "based_megatron", "recall", *fixed, *options]


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in TIMES}


def one_epoch() -> Preset:
    return _preset("tiny", RecallConfig(epochs=1))


def trained_here(name: str) -> dict[str, Any]:
    """The result of a point of the tiny preset in this process."""
    preset = one_epoch()
    points = [make(preset.task.vocab_size) for make in SYSTEMS["window"].tiny]
    (job,) = (job for job in jobs_of(points, preset, 1) if job.point.name == name)
    return json.loads(json.dumps(Trainer(Setup(preset, ("cpu",), "auto", 1, None), "cpu").result(job)))


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_a_worker_that_dies_costs_one_run(tmp_path, worker_pool):
    """Killed after its first run. The next start runs the two others, and reports the one whose worker dies."""
    folder = tmp_path / "sweep"
    (tmp_path / "dying.py").write_text(DYING)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    words = command(folder, "--systems", "window,dying", "--mixers", "dying")
    first = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    while not finished(folder):
        assert first.poll() is None, "it ended before its first run was finished"
        time.sleep(0.02)
    with pytest.raises(ConfigError, match=r"is in use by process \d+.*--output"), locked(folder):
        pass
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = finished(folder)
    assert 1 <= len(before) < 3
    second = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert second.returncode == 1
    assert "dying-d32 seed 0: its worker died (exit code 7)" in second.stderr
    after = finished(folder)
    assert {line["point"] for line in after.values()} == {"window-d32-w4", "window-d32-w8", "window-d32-w16"}
    assert all(after[key] == line for key, line in before.items()), "what is there is not run again"
    (expected,) = worker_pool(1).run(trained_here, "window-d32-w16")
    found = next(line for line in after.values() if line["point"] == "window-d32-w16")
    assert {key: found[key] for key in expected if key not in TIMES} == untimed(expected)
    assert (folder / "recall.json").is_file() and "window-d32-w4" in (folder / "recall.md").read_text()


class FakeWorker:
    """Takes jobs and answers at once."""

    answers: ClassVar[dict[str, dict[str, Any] | None]] = {}
    given: ClassVar[list[str]] = []
    devices: ClassVar[list[str]] = []

    def __init__(self, context: Any, setup: Setup, device: str) -> None:
        self.job, self.alive, self.device = None, True, device
        self.devices.append(device)

    def give(self, job: Any) -> None:
        self.job = job
        self.given.append(job.point.name)

    @staticmethod
    def that_answered(workers: list[Any]) -> list[Any]:
        return list(workers)

    def answer(self) -> tuple[Any, dict[str, Any] | None]:
        job, self.job = self.job, None
        return job, self.answers.get(job.point.name, result())

    def end(self) -> None:
        pass


def result(seconds: float = 1.0) -> dict[str, Any]:
    rate = {"rate": 0.01, "epochs": 1, "loss": 1.0, "accuracy": {"32/2": 0.5, "32/8": 0.25}}
    sizes = {"recurrent": 1, "published": 2, "product": 3}
    return {
        "state_bytes": sizes,
        "parameters": 4,
        "rates": [rate],
        "seconds": seconds,
        "cpu_seconds": seconds,
        "device": "CPU",
    }


@pytest.fixture
def fake_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "answers", {})
    monkeypatch.setattr(FakeWorker, "given", [])
    monkeypatch.setattr(FakeWorker, "devices", [])
    preset = PRESETS["tiny"]
    points = [make(preset.task.vocab_size) for name in ("based", "window") for make in SYSTEMS[name].tiny]

    def make_sweep(deadline: float | None = None, workers: int = 2) -> Sweep:
        return Sweep(
            tmp_path, Setup(preset, ("cuda:0", "cuda:1"), "auto", 1, deadline), workers, jobs_of(points, preset, 2)
        )

    return make_sweep


def test_every_point_runs_once_with_each_seed_and_the_first_seeds_go_first(fake_sweep):
    sweep = fake_sweep()
    sweep.run()
    names = [job.point.name for job in sweep.jobs]
    assert FakeWorker.given == names and names[:6] == names[6:] and len(set(names)) == 6
    assert [job.seed for job in sweep.jobs] == [0] * 6 + [1] * 6
    again = fake_sweep()
    again.run()
    assert len(FakeWorker.given) == 12 and again.unfinished == 0 and not again.failures


def test_a_run_that_failed_is_tried_again_and_others_are_not(fake_sweep, tmp_path):
    FakeWorker.answers["based-d32-f2"] = {"failed": "no memory"}
    sweep = fake_sweep()
    sweep.run()
    assert sweep.failures == ["based-d32-f2 seed 0: no memory", "based-d32-f2 seed 1: no memory"]
    FakeWorker.answers.clear()
    FakeWorker.given.clear()
    fake_sweep().run()
    assert FakeWorker.given == ["based-d32-f2"] * 2 and len(finished(tmp_path)) == 12


def test_a_run_that_cannot_end_in_time_is_left_for_the_next_start(fake_sweep):
    """Based takes 900 s, of which 100 are left after the first run; one of a window is given up in the middle."""
    FakeWorker.answers |= {"based-d32-f8": result(900.0), "window-d32-w8": None}
    sweep = fake_sweep(deadline=time.time() + 100, workers=1)
    sweep.run()
    assert [name for name in FakeWorker.given if "based" in name] == ["based-d32-f8"]
    assert FakeWorker.given.count("window-d32-w8") == 2
    assert sweep.unfinished == 5 + 2 and not sweep.failures


def test_workers_are_shared_out_over_devices(fake_sweep):
    fake_sweep(workers=5).run()
    assert FakeWorker.devices == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]


def test_a_sweep_whose_time_is_over_starts_nothing(fake_sweep):
    sweep = fake_sweep(deadline=time.time() - 1)
    sweep.run()
    assert FakeWorker.given == [] and sweep.unfinished == 12


def test_another_task_recipe_or_size_is_another_run():
    tiny, figure = (
        jobs_of([make(64) for make in SYSTEMS["based"].tiny], PRESETS[name], 2) for name in ("tiny", "figure")
    )
    assert len({job.key for job in (*tiny, *figure)}) == 12


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--systems", "based,bassed"], r"--systems names 'bassed', which is none of based, rebased"),
        (["--systems", "based", "--only", "d999"], r"--only 'd999'.*based-d32-f8"),
        (["--pattern", "cQ"], r"cannot read 'Q' in layer pattern 'cQ'"),
        (["--mixers", "no.such"], r"cannot import the mixers of 'no\.such'"),
        (["--minutes", "-1"], r"--minutes"),
        (["--seeds", "0"], r"--seeds"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(options, expected, tmp_path, capsys):
    assert main(["recall", "--preset", "tiny", "--output", str(tmp_path / "x"), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "x").exists()
    assert re.search(expected, error), error
