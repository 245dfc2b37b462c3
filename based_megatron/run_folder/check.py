"""What may lie in a run folder under the names that a run writes to."""

import os
from pathlib import Path

from based_megatron.errors import ConfigError
from based_megatron.run_folder.files import FILES, FOLDERS


def check_contents(run_dir: Path, stop_file: str) -> None:
    """Raise ConfigError for anything in the way of the files and folders of a run, and for what cannot be written. Changes nothing."""
    for name in (*FILES, stop_file, *FOLDERS):
        path = run_dir / name
        try:
            wrong = _problem(path, is_folder=name in FOLDERS)
        except OSError as error:
            wrong = f"cannot be looked at ({error.strerror})"
        if wrong:
            raise ConfigError(f"{path} {wrong}, but the run keeps its own there: move it away, or change run_dir")


def _problem(path: Path, is_folder: bool) -> str:
    if not os.path.lexists(path):
        return ""
    if not path.exists():
        return "is a link to nothing"
    if is_folder:
        rights = os.W_OK | os.X_OK
        return (
            "is no folder" if not path.is_dir() else "" if os.access(path, rights) else "is a folder without permission"
        )
    if not path.is_file():
        return "is a folder" if path.is_dir() else "is no file"
    return "" if os.access(path, os.R_OK | os.W_OK) else "is a file without permission"
