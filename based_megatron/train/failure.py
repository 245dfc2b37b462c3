"""The last words of a rank: one line, and the traceback in a file of the run folder."""

import contextlib
import sys
from pathlib import Path

from based_megatron.errors import BasedError
from based_megatron.run_folder.failures import failure_path, write_failure
from based_megatron.run_folder.files import ERRORS


class RankError(BasedError):
    """A failure of a rank that is no user's error: its traceback is in a file."""

    exit_code = 1
    may_pass = True


def as_line(error: Exception, run_dir: Path, rank: int) -> Exception:
    """The error to raise instead: one line that names the file with the traceback. The error itself where that cannot be written."""
    if isinstance(error, BasedError) or not run_dir.is_dir():
        return error
    with contextlib.suppress(OSError):
        failure = write_failure(run_dir / ERRORS, rank, error)
        if failure.is_aftermath:
            return RankError(f"lost other ranks ({failure.type}: {failure.message:.160})")
        return RankError(f"{failure.type}: {failure.message:.500}; traceback in {failure_path(run_dir / ERRORS, rank)}")
    print(f"the traceback could not be written to {run_dir / ERRORS}", file=sys.stderr, flush=True)
    return error
