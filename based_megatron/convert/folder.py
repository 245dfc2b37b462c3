"""Output folders that appear whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from based_megatron.errors import CheckpointError


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder next to `output`, which takes that name when the block succeeds and is removed when it fails.

    Raises CheckpointError if `output` exists or cannot be written.
    """
    if output.exists():
        raise CheckpointError(f"{output} exists already: choose another --output, or remove it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
            folder = Path(temporary) / output.name
            folder.mkdir()
            yield folder
            folder.rename(output)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {output}: {error}; free some space or choose another --output") from error
