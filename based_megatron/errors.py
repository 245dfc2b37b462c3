"""Errors that a user can act on: one line that says what was wrong, the values seen and the key to change."""


class BasedError(Exception):
    """Base of all errors that are the user's to fix; the command line prints them in one line, without a traceback."""


class ConfigError(BasedError):
    """A configuration that cannot run."""


class DataError(BasedError):
    """A corpus, shard, manifest or tokenizer that cannot be used."""


class CheckpointError(BasedError):
    """A checkpoint that cannot be written or read."""


class TrainingError(BasedError):
    """A run that cannot go on."""
