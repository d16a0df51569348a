"""Files that hold one array of numbers and nothing else, read at any place by any number of threads.

Dimension key: N numbers, P pieces.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2_flax.errors import ExitCode, UserError, io_error

KEPT_BYTES = 2**27  # largest array that is kept in memory because reading it again and again would be slower

CHUNK = 2**20  # numbers read at once

Advance = Callable[[int], None]
"""Called with the number of bytes that were just read."""


def ignore(n_bytes: int) -> None:
    """Report progress to nobody."""


@dataclass(frozen=True, eq=False)
class FlatFile:
    """A file of `count` numbers; an empty `sha256` means that no checksum is known."""

    path: Path
    dtype: np.dtype
    count: int
    sha256: str = ""

    @property
    def n_bytes(self) -> int:
        return self.count * self.dtype.itemsize

    def check(self) -> None:
        """Raise `UserError` (DATA) if the file is missing or has another size."""
        with self._naming():
            found = self.path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise self.damage("shard is not a file")
        if found.st_size != self.n_bytes:
            raise self.damage(f"shard has {found.st_size} bytes where dataset.json says {self.n_bytes}")

    def opened(self) -> "OpenFile":
        """Open the file for reading at any place; raises as `check`."""
        self.check()
        with self._naming():
            return OpenFile(self)

    def verify(self) -> None:
        """Read the whole file; raise `UserError` (DATA) if its size or its checksum differs."""
        self.opened().verify()

    def damage(self, what: str) -> UserError:
        return UserError(ExitCode.DATA, what, self.path, "bring the file back, or prepare the dataset again")

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise self.damage("shard missing") from None
        except OSError as error:
            raise io_error(error, self.path) from None


class OpenFile:
    """A `FlatFile` with an open descriptor, which is closed with the object.

    The file is read and not mapped. If a file becomes shorter, a read raises a `UserError`; access to a mapped file
    would end the process with SIGBUS. Linux detects sequential reads by itself and reads ahead.
    """

    def __init__(self, file: FlatFile):
        self.file = file
        self.descriptor = os.open(file.path, os.O_RDONLY)
        self._kept: np.ndarray | None = None

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return numbers [start, stop), read-only; raises as `gather`."""
        return self.pieces(np.array([start]), np.array([stop]))

    def pieces(self, starts_P: np.ndarray, stops_P: np.ndarray) -> np.ndarray:
        """Return numbers [start, stop) of P pieces, concatenated and read-only; raises as `gather`."""
        if self._kept is not None:
            return self._kept[ranges(starts_P, stops_P - starts_P)]
        return gather({0: self}, np.zeros_like(starts_P), starts_P, stops_P, self.file.dtype)

    def keep(self) -> None:
        """Read the whole file into memory unless it is larger than `KEPT_BYTES`; raises as `chunks`."""
        if self.file.n_bytes <= KEPT_BYTES:
            self._kept = np.concatenate([np.zeros(0, self.file.dtype), *self.chunks()])

    def chunks(self, advance: Advance = ignore) -> Iterator[np.ndarray]:
        """Yield all numbers in order, in read-only arrays of bounded size.

        Raises:
            UserError: As `gather`; DATA at the end if the checksum is known and differs.
        """
        found, count = hashlib.sha256(), self.file.count
        for start in range(0, count, CHUNK):
            numbers_N = self.read(start, min(start + CHUNK, count))
            if self.file.sha256:
                found.update(numbers_N.data)
            advance(numbers_N.nbytes)
            yield numbers_N
        if self.file.sha256 and found.hexdigest() != self.file.sha256:
            raise self.file.damage("sha256 differs")

    def verify(self) -> None:
        """Read the whole file; raise `UserError` (DATA) if its checksum differs."""
        for _ in self.chunks():
            pass

    def bytes(self, place: int, n_bytes: int) -> bytes:
        """Return `n_bytes` bytes from byte `place` on, however many reads that takes; raises as `gather`."""
        blocks = []
        try:
            while n_bytes and (block := os.pread(self.descriptor, n_bytes, place)):
                blocks.append(block)
                place, n_bytes = place + len(block), n_bytes - len(block)
        except OSError as error:
            raise io_error(error, self.file.path) from None
        if n_bytes:
            raise self.file.damage("file became shorter while it was in use")
        return b"".join(blocks)


def gather(
    files: Mapping[int, OpenFile], files_P: np.ndarray, starts_P: np.ndarray, stops_P: np.ndarray, dtype: np.dtype
) -> np.ndarray:
    """Read P pieces of several files and concatenate them.

    Args:
        files: The open files by number.
        files_P: The file number of each piece. A piece of a file that is not in `files` is zeros.
        starts_P: The first number of each piece.
        stops_P: The end of each piece, exclusive.
        dtype: The type of the numbers of all files.

    Returns:
        A read-only array of `dtype`.

    Raises:
        UserError: DATA if a file has become shorter, IO if it cannot be read.
    """
    sizes_P = (stops_P - starts_P) * dtype.itemsize
    pieces = [files_P.tolist(), (starts_P * dtype.itemsize).tolist(), sizes_P.tolist()]
    flat = b""
    with contextlib.suppress(OSError):
        flat = b"".join(
            [
                os.pread(file.descriptor, size, place) if (file := files.get(number)) else bytes(size)
                for number, place, size in zip(*pieces, strict=True)
            ]
        )
    if len(flat) != sizes_P.sum():  # a read was short or failed: read again with care, so that an error names the file
        flat = b"".join(
            file.bytes(place, size) if (file := files.get(number)) else bytes(size)
            for number, place, size in zip(*pieces, strict=True)
        )
    return np.frombuffer(flat, dtype)


def ranges(starts_P: np.ndarray, counts_P: np.ndarray) -> np.ndarray:
    """Return the concatenation of `arange(start, start + count)` for each start and count."""
    shifts_P = starts_P - (np.cumsum(counts_P) - counts_P)
    return np.repeat(shifts_P, counts_P) + np.arange(counts_P.sum())
