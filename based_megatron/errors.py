"""Errors that a user can act on: one line that says what was wrong, the values seen and the key to change."""


class BasedError(Exception):
    """Base of all errors that are the user's to fix; the command line prints them in one line, without a traceback."""

    exit_code = 2
    may_pass = False
    """Whether the same start may succeed later with nothing changed: a disk that failed may be back, a wrong setting stays wrong."""


class ConfigError(BasedError):
    """A configuration that cannot run."""


class DataError(BasedError):
    """A corpus, shard, manifest or tokenizer that cannot be used."""

    may_pass = True


class CheckpointError(BasedError):
    """A checkpoint that cannot be written or read."""

    may_pass = True


class TrainingError(BasedError):
    """A run that cannot go on."""
