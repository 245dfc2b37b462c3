import os

import pytest

from based_megatron.train.callbacks.heartbeat import Heartbeat


@pytest.mark.parametrize(
    "hook",
    [
        lambda beat, trainer, report: beat.on_start(trainer),
        lambda beat, trainer, report: beat.post_step(trainer, report(1)),
        lambda beat, trainer, report: beat.on_validation(trainer, 1.0),
        lambda beat, trainer, report: beat.on_event(trainer, "checkpoint", {}),
    ],
    ids=["start", "step", "validation", "event"],
)
def test_sign_of_life_renews_the_file(make_trainer, report, hook):
    trainer = make_trainer()
    file = trainer.run_dir / "heartbeat"
    file.touch()
    os.utime(file, (0, 0))
    hook(Heartbeat(), trainer, report)
    assert file.stat().st_mtime > 0


def test_other_ranks_leave_it_alone(make_trainer):
    trainer = make_trainer(is_logger=False)
    trainer.run([Heartbeat()], until=2)
    assert not (trainer.run_dir / "heartbeat").exists()
