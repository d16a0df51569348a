"""Numbers in files, one after the other: read in place or in pieces, and written with a checksum.

Dimension key: N numbers.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_flax.errors import ExitCode, UserError, io_error
from gpt2_flax.folders import sync_folder

_CHUNK = 2**20  # numbers read at once


class FlatFile(NamedTuple):
    """`count` numbers of a file, from number `first` on; unless `shared`, the file holds nothing else."""

    path: Path
    dtype: np.dtype
    count: int
    first: int = 0
    shared: bool = False

    def check(self) -> None:
        """Raises `UserError` (DATA) when the file is missing or has another size."""
        try:
            found = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(ExitCode.DATA, "shard missing", self.path, self._fix) from None
        except OSError as error:
            raise io_error(error, self.path) from None
        if not stat.S_ISREG(found.st_mode):
            raise UserError(ExitCode.DATA, "shard is not a file", self.path, self._fix)
        expected = (self.first + self.count) * self.dtype.itemsize
        if found.st_size < expected or (found.st_size > expected and not self.shared):
            what = f"shard has {found.st_size} bytes where dataset.json says {expected}"
            raise UserError(ExitCode.DATA, what, self.path, self._fix)

    def map(self) -> np.ndarray:
        """Returns the numbers, memory-mapped; raises as `check`."""
        self.check()
        try:
            mapped = np.memmap(self.path, self.dtype, "r", self.first * self.dtype.itemsize, (self.count,))
            return mapped.view(np.ndarray)  # slices of a memmap are slow to make
        except OSError as error:
            raise io_error(error, self.path) from None

    def chunks(self) -> Iterator[np.ndarray]:
        """Yields the numbers in pieces, read rather than mapped; raises as `check`."""
        self.check()
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.first * self.dtype.itemsize)
                for start in range(0, self.count, _CHUNK):
                    numbers_N = np.fromfile(file, self.dtype, min(_CHUNK, self.count - start))
                    if len(numbers_N) < min(_CHUNK, self.count - start):
                        raise self.damage("file became shorter while it was read")
                    yield numbers_N
        except OSError as error:
            raise io_error(error, self.path) from None

    @property
    def n_bytes(self) -> int:
        return self.count * self.dtype.itemsize

    def damage(self, what: str) -> UserError:
        return UserError(ExitCode.DATA, what, self.path, self._fix)

    @property
    def _fix(self) -> str:
        return "bring the file back, or import it again" if self.shared else "prepare the dataset again"


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
