"""The examples run as their first lines say."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_example_trains_and_continues_a_prompt(tmp_path):
    overrides = (
        "--train.steps=12", "--train.global-batch-sequences=8", "--schedule.warmup-steps=2", "--validation.interval-steps=0",
        "--checkpoint.interval-steps=6", "--monitor.log-interval-steps=6", "--monitor.sample-interval-steps=0",
        "--data.sequence-length-tokens=64",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "train_from_python.py"), str(tmp_path), *overrides],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "done").exists()
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-00000006", "step-00000012"}
    assert done.stdout.splitlines()[-1].strip(), "a continuation of the prompt"
