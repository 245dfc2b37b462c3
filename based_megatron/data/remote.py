"""Corpora behind URLs: parts of remote files, read through a folder of this node that all of its ranks share.

    CACHE/<hash of the URL>/manifest.json, train.blocks.npy, ..., tokenizer.json      what a start reads, kept as it is
    CACHE/<hash of the URL>/<fingerprint>/<shard>/<number>.part                       PART_BYTES of a shard, and their hash

A part is fetched by one process of the node at a time, appears whole, and is given up when the folder is full, those first that were
not read for longest. What it is a part of is checked again by the reader, by the hashes that the manifest knows.
"""

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from based_megatron.config.schema import DataConfig
from based_megatron.data.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    blocks_name,
    fingerprint_at,
    load_manifest,
)
from based_megatron.errors import BasedError, ConfigError, DataError

T = TypeVar("T")
PART_BYTES, SUFFIX = 1 << 18, ".part"
DIGEST_BYTES = 16
TRIES = 6
FIRST_WAIT_SECONDS = 0.5
"""Before the second try; each later wait is twice as long."""
LOCKS = 1024
LOOKS_PER_CACHE = 50
"""A process looks at how full the folder is each time that it has written this part of its limit."""


def is_url(path: str) -> bool:
    """Whether a path leads to a file system that fsspec knows."""
    return "://" in path


@dataclass(frozen=True)
class RemoteFolder:
    """A folder behind a URL."""

    url: str

    def read(self, name: str, begin: int | None = None, end: int | None = None) -> bytes:
        """A file, or a part of it. Raises DataError in one line, at once if it is not there, else after TRIES."""
        return self._tried(name, lambda fs, path: fs.cat_file(path, start=begin, end=end))

    def size(self, name: str) -> int:
        """Bytes of a file. Raises DataError as `read` does."""
        return int(self._tried(name, lambda fs, path: fs.size(path)))

    def has(self, name: str) -> bool:
        """Whether there is such a file. Raises DataError as `read` does."""
        return bool(self._tried(name, lambda fs, path: fs.exists(path)))

    def _tried(self, name: str, action: Callable[[Any, str], T]) -> T:
        # Imported here: it takes a while, and most corpora are in folders.
        from fsspec.core import url_to_fs

        url = f"{self.url.rstrip('/')}/{name}"
        for left in reversed(range(TRIES)):
            try:
                return action(*url_to_fs(url))
            except (ImportError, ValueError) as error:
                raise ConfigError(
                    f"cannot read {url}: {_line(error)}; install what it needs, or change the path"
                ) from error
            except FileNotFoundError as error:
                raise DataError(
                    f"there is no {url}: restore it, or change the path to a folder written by `based prep`"
                ) from error
            except PermissionError as error:
                raise DataError(f"{url} may not be read: {_line(error)}; see that this host has the rights") from error
            except Exception as error:  # of whatever library the file system is of
                if not left:
                    raise DataError(
                        f"cannot read {url} in {TRIES} tries: {_line(error)}; see that this host reaches it"
                    ) from error
            time.sleep(FIRST_WAIT_SECONDS * 2 ** (TRIES - 1 - left))
        raise AssertionError


class Cache:
    """Parts of remote files in a folder of this node. Any number of threads and processes may read."""

    def __init__(self, folder: Path, limit_bytes: int):
        """limit_bytes: of all parts; processes that write at the same time may exceed it by a fiftieth each.

        Raises DataError if the folder cannot be made.
        """
        self.folder, self._limit_bytes = folder, limit_bytes
        self._written_bytes, self._counting = 0, threading.Lock()
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot make data.cache_dir {folder}: {error.strerror}; change data.cache_dir") from error

    def part(self, place: Path, fetch: Callable[[], bytes]) -> bytes:
        """The part that is kept at a place within the folder, fetched if it is not, or not as it was written."""
        path = self.folder / place
        if (data := _read(path)) is not None:
            return data
        with self.alone(str(place)):
            if (data := _read(path)) is None:
                data = fetch()
                self.write(path, data + xxhash.xxh3_128_digest(data))
        self.trim_if_due()
        return data

    def write(self, path: Path, data: bytes) -> None:
        """Write a file in the folder, whole or not at all. Raises DataError."""
        new = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(data)
            new.replace(path)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise DataError(
                f"cannot write to data.cache_dir {self.folder}: {error.strerror}; make room, or change it"
            ) from error
        with self._counting:
            self._written_bytes += len(data)

    def trim_if_due(self) -> None:
        """Look at how full the folder is, if this process has written enough since it last did; holds no lock of a part."""
        with self._counting:
            if self._written_bytes < self._limit_bytes // LOOKS_PER_CACHE:
                return
            self._written_bytes = 0
        with self.alone("trim"):
            self._trim()

    def _trim(self) -> None:
        """Remove the parts that were not read for longest, until a tenth of the limit is free."""
        found = []
        for path in self.folder.glob(f"*/*/**/*{SUFFIX}"):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        kept = sum(size for _, size, _ in found)
        if kept <= self._limit_bytes:
            return
        for _, size, path in sorted(found):
            if kept <= 0.9 * self._limit_bytes:
                return
            path.unlink(missing_ok=True)
            kept -= size

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """One thread of all processes at a time for a name; the lock of a process that dies is free."""
        number = name if name == "trim" else str(xxhash.xxh3_64_intdigest(name.encode()) % LOCKS)
        with (self.folder / "locks" / number).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class RemoteShards:
    """The shards of a corpus behind a URL, by parts of PART_BYTES: ShardFiles of a manifest."""

    def __init__(self, remote: RemoteFolder, cache: Cache, fingerprint: str):
        """fingerprint: of the manifest; parts of another corpus of the same URL are others."""
        self._remote, self._cache = remote, cache
        self._place = Path(xxhash.xxh3_64_hexdigest(remote.url.encode()), fingerprint)

    @property
    def url(self) -> str:
        return self._remote.url.rstrip("/")

    def size(self, file: str) -> int:
        return self._remote.size(file)

    def read(self, file: str, begin: int, end: int) -> bytes:
        parts = _parts(begin, end)
        data = b"".join(self._cache.part(self._path(file, number), self._fetch(file, number)) for number in parts)
        first = parts.start * PART_BYTES
        return data[begin - first : end - first]

    def forget(self, file: str, begin: int, end: int) -> None:
        for number in _parts(begin, end):
            (self._cache.folder / self._path(file, number)).unlink(missing_ok=True)

    def fingerprint_now(self) -> str | None:
        try:
            return json.loads(self._remote.read(MANIFEST_NAME))["fingerprint"]
        except (BasedError, ValueError, KeyError, TypeError):
            return None

    def _path(self, file: str, number: int) -> Path:
        return self._place / file / f"{number}{SUFFIX}"

    def _fetch(self, file: str, number: int) -> Callable[[], bytes]:
        return lambda: self._remote.read(file, number * PART_BYTES, (number + 1) * PART_BYTES)


def open_corpus(path: str, data: DataConfig, share: tuple[int, int] = (0, 1)) -> Manifest:
    """The manifest of a corpus in a folder or behind a URL. share: of its shards that are looked at, as `load_manifest` has it.

    Raises BasedError in one line.
    """
    if not is_url(path):
        return load_manifest(path, share=share)
    if not data.cache_dir:
        raise ConfigError(
            f"{path} is a URL: set data.cache_dir to a folder on a disk of the node, for parts of its shards"
        )
    remote, cache = RemoteFolder(path), Cache(Path(data.cache_dir), data.cache_bytes)
    folder = _copied_head(remote, cache)
    return load_manifest(folder, share=share, remote=RemoteShards(remote, cache, fingerprint_at(folder) or "unknown"))


def _copied_head(remote: RemoteFolder, cache: Cache) -> Path:
    """A folder of this node with the manifest of a remote corpus, its tables and its tokenizer, as they are now."""
    folder = cache.folder / xxhash.xxh3_64_hexdigest(remote.url.encode())
    with cache.alone(remote.url):
        manifest, path = remote.read(MANIFEST_NAME), folder / MANIFEST_NAME
        if path.is_file() and path.read_bytes() == manifest:
            return folder
        folder.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        for name in [TOKENIZER_NAME, *map(blocks_name, ("train", "validation"))]:
            # Manifests before version 4 have no tables.
            if name == TOKENIZER_NAME or remote.has(name):
                cache.write(folder / name, remote.read(name))
        # Last: where it is, all else is.
        cache.write(path, manifest)
    return folder


def _parts(begin: int, end: int) -> range:
    return range(begin // PART_BYTES, -(-end // PART_BYTES))


def _read(path: Path) -> bytes | None:
    """A part as it was written; None if it is not there, or not whole."""
    try:
        data = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    part, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    return part if xxhash.xxh3_128_digest(part) == digest else None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
