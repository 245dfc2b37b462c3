"""What faults cost a run with and without guards: with them, its loss is that of a run that never met them, within noise.

`pytest -s tests/train/test_guarded_runs.py -m slow` prints the table of docs/guards.md.
"""

from pathlib import Path

import pytest

from support.faults import Faults, train_with_faults
from support.runs import events

STEPS = 150
JOB = (
    "--train.steps", str(STEPS), "--validation.interval-steps", str(STEPS), "--validation.sequences", "64",
    "--checkpoint.interval-steps", "10", "--checkpoint.keep-last", "3", "--monitor.log-interval-steps", "50",
    "--schedule.warmup-steps", "20", "--train.max-skipped-steps", "5",
)  # fmt: skip
SEEDS = (42, 44, 45)
"""Orders of the data without a spike of their own: with 43, documents of one number alone come late, and their gradients are four times
the median."""
GUARDS = ("--guards.window-steps", "32", "--guards.warmup-steps", "16", "--guards.max-rollbacks", "10")
NO_GUARDS = ("--guards.spike", "off", "--guards.no-rollback")
FAULTS = {
    "a poisoned document: 4 steps of noise": Faults(data=range(90, 94)),
    "a corrupted gradient in 6 steps: x 100,000": Faults(gradients=dict.fromkeys(range(80, 140, 10), 1e5)),
    "an absurd rate for 20 steps: x 1,000": Faults(rates=dict.fromkeys(range(85, 105), 1e3)),
}


def final_loss(worker_pool, run_dir: Path, corpus: Path, faults: Faults, *overrides: str) -> float:
    """Loss of held-out sequences after the last step."""
    worker_pool(1).run(train_with_faults, run_dir, corpus, faults, *JOB, *overrides)
    return events(run_dir, "validation")[-1]["loss"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_with_guards_faults_cost_no_more_than_another_order_of_the_data(worker_pool, corpus, tmp_path):
    clean = [
        final_loss(worker_pool, tmp_path / f"clean {seed}", corpus, Faults(), *GUARDS, "--data.seed", str(seed))
        for seed in SEEDS
    ]
    assert all(events(tmp_path / f"clean {seed}", "skip") == [] for seed in SEEDS), "nothing is skipped for no reason"
    noise = max(clean) - min(clean)
    print(f"\nno fault: {clean[0]:.3f}; other orders of the data: {', '.join(f'{loss:.3f}' for loss in clean[1:])}")
    for number, (name, faults) in enumerate(FAULTS.items()):
        run_dir = tmp_path / f"guarded {number}"
        guarded = final_loss(worker_pool, run_dir, corpus, faults, *GUARDS)
        skips, rollbacks = (len(events(run_dir, kind)) for kind in ("skip", "rollback"))
        unguarded = final_loss(worker_pool, tmp_path / f"bare {number}", corpus, faults, *NO_GUARDS)
        print(f"{name}: {guarded:.3f} with guards ({skips} skips, {rollbacks} rollbacks), {unguarded:.3f} without")
        # Some steps are lost: a run of fewer steps is a little worse, and less so than one of another order.
        assert skips and abs(guarded - clean[0]) < min(noise, 0.1)
        # Clipping has bounded what one parameter's gradient can do.
        assert "gradient" in name or unguarded > guarded + 0.02
