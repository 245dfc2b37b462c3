"""The processes that do the work of prep: their deaths and errors are those of the run."""

import os
import signal

import pytest

from based_megatron.data_prep.tasks import Tasks
from based_megatron.errors import DataError


class Killed:
    """A job that the system ends."""

    def __call__(self, job, tell):
        os.kill(os.getpid(), signal.SIGKILL)


class Raises:
    """A job that fails as a full disk makes it fail, or as a user's error does."""

    def __call__(self, job, tell):
        raise job


def test_the_death_of_a_task_is_one_line():
    with Tasks(2) as tasks, pytest.raises(DataError, match=r"a task has died \(exit code -9; .*--tasks"):
        list(tasks.run(Killed(), [1, 2, 3], lambda *_: None))
    assert not any(process._process.is_alive() for process in tasks._processes)


@pytest.mark.parametrize("error", [DataError("a line"), OSError(28, "No space left on device")])
def test_an_error_of_a_task_is_that_of_the_run(error):
    with Tasks(2) as tasks, pytest.raises(type(error)) as raised:
        list(tasks.run(Raises(), [error, error], lambda *_: None))
    assert raised.value.args == error.args
