"""The files of the inputs: each once, under a name of its own. What is left out is named before any work begins."""

import itertools
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from based_megatron.data_prep.formats.base import Format
from based_megatron.errors import DataError

logger = logging.getLogger(__name__)

ENDINGS_NAMED = 20


@dataclass(frozen=True)
class InputFile:
    """One file to read."""

    name: str
    """Its place below the input folder that it was found in, with the folder's name; with names above where two files would share it."""
    path: Path
    size_bytes: int
    mtime_ns: int
    kind: Format


@dataclass(frozen=True)
class _Place:
    above: Path
    """The folder that the name begins below, without links."""
    name: str
    path: Path


def find_files(inputs: Sequence[str], formats: Sequence[Format], left_out: Collection[Path] = ()) -> list[InputFile]:
    """All files of the inputs, in order of their names. Links are followed; hidden files and folders below an input are left out.

    left_out: folders that are not searched. Raises DataError for an input that is missing or of an unknown format.
    """
    places: dict[Path, _Place] = {}
    passed_over: list[str] = []
    repeated = 0
    for entry in inputs:
        for place in _places(Path(entry), formats, left_out):
            real = place.path.resolve()
            if not real.is_file() or not any(kind.holds(place.name) for kind in formats):
                passed_over.append(place.name)
            elif real in places:
                repeated += 1
            else:
                places[real] = place
    if repeated:
        logger.warning("%d files were found more than once, below several inputs or links: each is read once", repeated)
    if passed_over:
        logger.warning("left out %s; --suffixes +.ENDING reads more endings as plain text", _by_ending(passed_over))
    named = zip(_own_names(list(places.values())), places.values(), strict=True)
    return sorted((_input_file(name, place, formats) for name, place in named), key=lambda file: file.name)


def _input_file(name: str, place: _Place, formats: Sequence[Format]) -> InputFile:
    stat = place.path.stat()
    return InputFile(name, place.path, stat.st_size, stat.st_mtime_ns, format_of(place.name, formats))


def format_of(name: str, formats: Sequence[Format]) -> Format:
    """The first format that holds a file of this name. Raises DataError if there is none."""
    for known in formats:
        if known.holds(name):
            return known
    endings = " ".join(suffix for known in formats for suffix in known.suffixes)
    raise DataError(
        f"{name} has none of the known endings ({endings}): add its own with --suffixes +.ENDING to read it as plain text"
    )


def _places(root: Path, formats: Sequence[Format], left_out: Collection[Path]) -> Iterator[_Place]:
    if root.is_file():
        format_of(root.name, formats)
        yield _Place(root.parent.resolve(), root.name, root)
    elif root.is_dir():
        top = root.resolve()
        for path in _walk(root, set(left_out)):
            yield _Place(top.parent, (Path(top.name) / path.relative_to(root)).as_posix(), path)
    else:
        raise DataError(f"input {root} does not exist; give files or folders of text")


def _walk(root: Path, entered: set[Path]) -> Iterator[Path]:
    """Every file below a folder that is not hidden. Folders that were entered are not entered again, whatever links lead there."""
    for folder, subfolders, names in os.walk(root, onerror=_unreadable_folder, followlinks=True):
        real = Path(folder).resolve()
        if real in entered:
            subfolders.clear()
            continue
        entered.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder) / name for name in sorted(names) if not name.startswith("."))


def _own_names(places: Sequence[_Place]) -> list[str]:
    """The names of the places; those that are not unique begin as many folders above as it takes."""
    names = [place.name for place in places]
    for depth in itertools.count(1):
        counts = Counter(names)
        if len(counts) == len(names):
            break
        names = [
            "/".join((*place.above.parts[-depth:], place.name)) if counts[name] > 1 else name
            for place, name in zip(places, names, strict=True)
        ]
    return names


def _by_ending(names: Sequence[str]) -> str:
    counts = Counter(Path(name).suffix.lower() or Path(name).name for name in names).most_common()
    more = f" and {len(counts) - ENDINGS_NAMED} other endings" if len(counts) > ENDINGS_NAMED else ""
    return f"{len(names)} files: " + ", ".join(f"{n} {ending}" for ending, n in counts[:ENDINGS_NAMED]) + more


def _unreadable_folder(error: OSError) -> None:
    raise DataError(
        f"cannot read the folder {error.filename}: {error.strerror}; leave it out or change its permissions"
    ) from error
