"""One action in a thread of its own, whose result is asked for later."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Runs an action. It does not outlive the process: an exit leaves it where it is, as a kill would."""

    def __init__(self, action: Callable[[], T], name: str) -> None:
        self._future: Future[T] = Future()
        Thread(target=self._run, args=(action,), name=name, daemon=True).start()

    @property
    def finished(self) -> bool:
        """Whether `result` has its answer."""
        return self._future.done()

    def result(self) -> T:
        """Wait for the end; returns what the action did, or raises its error."""
        return self._future.result()

    def _run(self, action: Callable[[], T]) -> None:
        try:
            self._future.set_result(action())
        except BaseException as error:
            self._future.set_exception(error)
