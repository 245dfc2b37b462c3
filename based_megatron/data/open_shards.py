"""The shards that a run has open: a few at a time, however many it reads."""

import errno
import functools
import os
import resource
from pathlib import Path

from based_megatron.errors import DataError

OPEN_SHARDS = 64


class OpenShards:
    """Reads parts of shards and keeps those open that were read last. Any number of threads may read."""

    def __init__(self, limit: int = OPEN_SHARDS):
        """limit: shards that stay open; each thread may hold one more while it reads."""
        self._open = functools.lru_cache(limit)(_Shard)

    def read(self, path: str | Path, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end`, or to the end of the file. Raises DataError if they cannot be read."""
        # Not a memory map: a file that is truncated under it kills the process without a word.
        try:
            shard = self._shard(path)  # by a name, so that it is not closed before the bytes are there
            return os.pread(shard.descriptor, end - begin, begin)
        except OSError as error:
            raise DataError(f"cannot read shard {path}: {error.strerror}; {_advice(error)}") from error

    def _shard(self, path: str | Path) -> "_Shard":
        try:
            return self._open(path)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            # The rest of the process needs more files than it did: those that are kept for speed are given back.
            self._open.cache_clear()
            return self._open(path)


class _Shard:
    """An open file, closed when nobody has it any more: who reads from it keeps it until the bytes are there."""

    def __init__(self, path: str | Path):
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _advice(error: OSError) -> str:
    if error.errno == errno.EMFILE:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"all {limit} files that the process may open are in use: raise the limit with `ulimit -n`"
    if error.errno == errno.ENOENT:
        return "restore it or write the corpus again"
    return "see that this host can read it"
