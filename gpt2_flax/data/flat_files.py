"""Numbers in files, one after the other: read at any place or in order, and written with a checksum.

Dimension key: N numbers, P pieces.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_flax.errors import ExitCode, UserError, io_error
from gpt2_flax.folders import sync_folder

KEPT_BYTES = 2**27  # of a file or a split that are held in memory, because that is quicker than to read them often

_CHUNK = 2**20  # numbers read at once


class FlatFile(NamedTuple):
    """`count` numbers of a file, from number `first` on; unless `shared`, the file holds nothing else."""

    path: Path
    dtype: np.dtype
    count: int
    first: int = 0
    shared: bool = False
    sha256: str = ""
    """Of the numbers, hexadecimal; empty: not known."""

    def check(self) -> None:
        """Raises `UserError` (DATA) when the file is missing or has another size."""
        with self._naming():
            found = self.path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise self.damage("shard is not a file")
        expected = (self.first + self.count) * self.dtype.itemsize
        if found.st_size < expected or (found.st_size > expected and not self.shared):
            raise self.damage(f"shard has {found.st_size} bytes where dataset.json says {expected}")

    def opened(self) -> "OpenFile":
        """Returns the file for reading at any place; raises as `check`."""
        self.check()
        with self._naming():
            return OpenFile(self)

    def chunks(self, read: Callable[[int], None] = lambda n_bytes: None) -> Iterator[np.ndarray]:
        """Opens the file and yields its numbers in pieces, as `OpenFile.chunks`; raises as `check` too."""
        yield from self.opened().chunks(read)

    def verify(self) -> None:
        """Raises `UserError` (DATA) when the file is not what it was; reads all of it."""
        self.opened().verify()

    @property
    def n_bytes(self) -> int:
        return self.count * self.dtype.itemsize

    def damage(self, what: str) -> UserError:
        return UserError(ExitCode.DATA, what, self.path, self._fix)

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise self.damage("shard missing") from None
        except OSError as error:
            raise io_error(error, self.path) from None

    @property
    def _fix(self) -> str:
        return f"bring the file back, or {'import' if self.shared else 'prepare'} the dataset again"


class OpenFile:
    """Reads numbers at any place of a file; any number of threads may share it.

    A file that becomes shorter is an error with a sentence here; where a file is mapped it ends the process (SIGBUS).
    Linux reads ahead of reads that follow one another, and not of others: no advice is needed for either.
    """

    def __init__(self, file: FlatFile):
        self.file, self.base = file, file.first * file.dtype.itemsize
        self.descriptor = os.open(file.path, os.O_RDONLY)
        self._kept: np.ndarray | None = None

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns numbers [start, stop), read-only; raises as `gather`."""
        return self.pieces(np.array([start]), np.array([stop]))

    def pieces(self, starts_P: np.ndarray, stops_P: np.ndarray) -> np.ndarray:
        """Returns numbers [start, stop) of P pieces one after another, read-only; raises as `gather`."""
        if self._kept is not None:
            return self._kept[ranges(starts_P, stops_P - starts_P)]
        return gather({0: self}, np.zeros_like(starts_P), starts_P, stops_P, self.file.dtype)

    def keep(self) -> None:
        """Reads all of a file that is not above `KEPT_BYTES` into memory; raises as `chunks`."""
        if self.file.n_bytes <= KEPT_BYTES:
            self._kept = np.concatenate([np.zeros(0, self.file.dtype), *self.chunks()])

    def chunks(self, read: Callable[[int], None] = lambda n_bytes: None) -> Iterator[np.ndarray]:
        """Yields all numbers in pieces, read-only, and tells `read` of their bytes.

        Raises `UserError`: as `gather`, and DATA at the end when the checksum is known and differs.
        """
        found, count = hashlib.sha256(), self.file.count
        for start in range(0, count, _CHUNK):
            numbers_N = self.read(start, min(start + _CHUNK, count))
            if self.file.sha256:
                found.update(numbers_N)
            read(numbers_N.nbytes)
            yield numbers_N
        if self.file.sha256 and found.hexdigest() != self.file.sha256:
            raise self.file.damage("sha256 differs")

    def verify(self) -> None:
        """Raises `UserError` (DATA) when the file is not what it was; reads all of it."""
        for _ in self.chunks():
            pass

    def bytes(self, place: int, n_bytes: int) -> bytes:
        """Returns bytes of the file in as many reads as it takes; raises as `gather`."""
        parts = []
        try:
            while n_bytes and (part := os.pread(self.descriptor, n_bytes, place)):
                parts.append(part)
                place, n_bytes = place + len(part), n_bytes - len(part)
        except OSError as error:
            raise io_error(error, self.file.path) from None
        if n_bytes:
            raise self.file.damage("file became shorter while it was in use")
        return b"".join(parts)


def gather(
    files: Mapping[int, OpenFile], files_P: np.ndarray, starts_P: np.ndarray, stops_P: np.ndarray, dtype: np.dtype
) -> np.ndarray:
    """Returns numbers [start, stop) of P files one after another, read-only; 0 for those of a file not in `files`.

    Raises `UserError`: DATA when a file has become shorter, IO when it cannot be read.
    """
    sizes_P = (stops_P - starts_P) * dtype.itemsize
    pieces = [files_P.tolist(), (starts_P * dtype.itemsize).tolist(), sizes_P.tolist()]
    flat = b""
    with contextlib.suppress(OSError):
        flat = b"".join(
            [
                os.pread(file.descriptor, size, file.base + place) if (file := files.get(number)) else bytes(size)
                for number, place, size in zip(*pieces, strict=True)
            ]
        )
    if len(flat) != sizes_P.sum():  # once more with care, to name what is wrong
        flat = b"".join(
            file.bytes(file.base + place, size) if (file := files.get(number)) else bytes(size)
            for number, place, size in zip(*pieces, strict=True)
        )
    return np.frombuffer(flat, dtype)


def ranges(starts_P: np.ndarray, counts_P: np.ndarray) -> np.ndarray:
    """Returns the numbers from each of `starts_P` on, as many as `counts_P` says, one after another."""
    shifts_P = starts_P - (np.cumsum(counts_P) - counts_P)
    return np.repeat(shifts_P, counts_P) + np.arange(counts_P.sum())


class NewFile:
    """A file that has a temporary name until `publish`; without a path, numbers are hashed and not written."""

    def __init__(self, path: Path | None):
        self._path, self._sha256 = path, hashlib.sha256()
        self._file = path and _temporary(path).open("wb", buffering=2**20)

    def write(self, numbers_N: np.ndarray) -> None:
        """Appends the bytes of a contiguous array."""
        self._sha256.update(numbers_N)
        if self._file:
            self._file.write(numbers_N)

    def publish(self) -> str:
        """Flushes to disk, gives the file its name and returns the hexadecimal sha256 of what it holds."""
        if self._path and self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            _temporary(self._path).rename(self._path)
            sync_folder(self._path.parent)
        return self._sha256.hexdigest()

    def __enter__(self) -> "NewFile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file:
            self._file.close()


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")
