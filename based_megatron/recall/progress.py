"""Runs of a sweep that are not finished: what every rate has learned, so that one which is stopped or killed loses an epoch at most."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from based_megatron.recall.train import EpochResult, Run
from based_megatron.run_folder.whole_file import whole_file


class Progress:
    """The files of one run, one for each rate."""

    def __init__(self, folder: Path, key: str) -> None:
        """folder: of all runs; key: of the run in the results."""
        self._folder, self._key = folder, key
        self.seconds, self.cpu_seconds = 0.0, 0.0
        """What the epochs took that have been restored."""

    def _files(self) -> Iterator[Path]:
        return self._folder.glob(f"{self._key}-*.pt")

    def _file(self, run: Run) -> Path:
        return self._folder / f"{self._key}-{run.rate:.4g}.pt"

    @property
    def is_begun(self) -> bool:
        """Whether anything is saved."""
        return any(self._files())

    def save(self, run: Run) -> None:
        """Write the state of a rate after an epoch."""
        self._folder.mkdir(exist_ok=True)
        with whole_file(self._file(run), binary=True) as file:
            torch.save({**run.state(), "history": [asdict(epoch) for epoch in run.history]}, file)

    def restore(self, run: Run) -> None:
        """Go on where the rate was saved last, if it was."""
        path = self._file(run)
        if not path.is_file():
            return
        state = torch.load(path, map_location=run.device, weights_only=True)
        run.load_state([EpochResult(**epoch) for epoch in state.pop("history")], **state)
        self.seconds += sum(epoch.seconds for epoch in run.history)
        self.cpu_seconds += sum(epoch.cpu_seconds for epoch in run.history)

    def remove(self) -> None:
        """Remove what is saved: the run is in the results."""
        for path in self._files():
            path.unlink()
