"""Two scenarios of slurm_trial.py on a real SLURM, where there is one."""

import tempfile
from pathlib import Path

import pytest
import slurm_trial

from support.slurm_cluster import why_no_slurm

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm() or "it can")]


@pytest.fixture(scope="module")
def trial():
    # Not a folder of pytest's: its parents are closed to other users, and munge then takes no socket in it.
    with tempfile.TemporaryDirectory(prefix="slurm-trial-") as name:
        Path(name).chmod(0o755)
        with slurm_trial.trial_cluster(Path(name)) as trial:
            yield trial


@pytest.mark.parametrize("title", ["scontrol requeue", "a rank is stopped (SIGSTOP)"])
def test_a_disturbed_run_goes_on_bit_for_bit(trial, title):
    run, when = slurm_trial.SCENARIOS[title](trial, "run-" + title.split()[-1].strip("()").lower())
    _, last_words, starts, _, again, equal = slurm_trial.row(trial, title, run, when)
    assert (last_words, starts, equal) == ("done", "2", "bit for bit")
    assert int(again) <= 10
