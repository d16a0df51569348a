"""The index of a Megatron-LM token file: `NAME.idx` says where the sequences and documents of `NAME.bin` are.

    9 bytes    MMIDIDX, then two zeros
    uint64     version, 1
    uint8      code of the type of ids
    uint64     S, how many sequences
    uint64     B, how many entries the list of documents has
    int32 S    tokens of each sequence
    int64 S    where each sequence starts in the .bin, in bytes
    int64 B    the first sequence of each document, and S at the end

All little-endian. Big-endian machines write the arrays and the .bin in their own order, some programs the head too.
Dimension key: S sequences, B documents and one more.
"""

import struct
from bisect import bisect_left
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_flax.data.flat_files import FlatFile, OpenFile
from gpt2_flax.errors import ExitCode, UserError, io_error

MAGIC = b"MMIDIDX\0\0"
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
FLOATS = (6, 7)

_HEAD = "9sQBQQ"
_HEAD_BYTES = struct.calcsize(f"<{_HEAD}")
_CHUNK = 2**20  # entries checked at once


class MegatronIndex:
    """Where documents start in a `.bin` of `count` tokens of type `dtype`.

    Raises `UserError` (DATA) for an index that is damaged, of another kind, or not of that `.bin`.
    """

    def __init__(self, path: Path, bin_path: Path):
        self.path = path
        try:
            size, bin_size = path.stat().st_size, bin_path.stat().st_size
            with open(path, "rb") as file:
                head, first = file.read(_HEAD_BYTES), file.read(4)
        except OSError as error:
            raise io_error(error, path) from None
        if len(head) < _HEAD_BYTES or not head.startswith(MAGIC):
            raise self._damage("not a Megatron-LM index", "give the .idx that was written with the .bin")
        order = ">" if head[len(MAGIC) : len(MAGIC) + 8] == bytes(7) + b"\x01" else "<"
        _, version, code, sequences, documents = struct.unpack(order + _HEAD, head)
        if version != 1:
            raise self._damage(f"index has version {version}, not 1", "write it again with a current Megatron-LM")
        if code in FLOATS:
            raise self._damage("file of floating-point numbers, not of token ids", "give a file of token ids")
        if code not in TYPES:
            raise self._damage(f"index has an unknown type of ids, code {code}")
        expected = _HEAD_BYTES + 12 * sequences + 8 * documents
        if size != expected:
            what = f"index has {size} bytes where its head says {expected}"
            raise self._damage(what, "bring it whole; an index with modes, for images, cannot be read")
        if not sequences or documents < 2:
            raise self._damage("index without documents")
        size_of = np.dtype(TYPES[code]).itemsize
        if int.from_bytes(first, "little") * size_of > bin_size >= int.from_bytes(first, "big") * size_of:
            order = ">"
        self.dtype = np.dtype(TYPES[code]).newbyteorder(order)
        file = FlatFile(path, np.dtype("u1"), size, shared=True).opened()
        self._lengths_S = _Numbers(file, f"{order}i4", _HEAD_BYTES, sequences)
        self._pointers_S = _Numbers(file, f"{order}i8", _HEAD_BYTES + 4 * sequences, sequences)
        self._documents_B = _Numbers(file, f"{order}i8", _HEAD_BYTES + 12 * sequences, documents)
        self._check_sequences(bin_path, bin_size)
        self._check_documents()
        self.count = bin_size // self.dtype.itemsize

    def starts(self, start: int, stop: int) -> np.ndarray:
        """Returns the int64 positions in [start, stop), in tokens, where a document with tokens starts."""
        sequences = (bisect_left(self._pointers_S, place * self.dtype.itemsize) for place in (start, stop))
        first, last = (bisect_left(self._documents_B, sequence) for sequence in sequences)
        if first == last:
            return np.zeros(0, np.int64)
        sequences_B = self._documents_B[first:last]
        pointers_S = self._pointers_S[int(sequences_B[0]) : int(sequences_B[-1]) + 1]
        # Documents without tokens start where the next one does.
        return np.unique(pointers_S[sequences_B - sequences_B[0]]).astype(np.int64) // self.dtype.itemsize

    def _check_sequences(self, bin_path: Path, bin_size: int) -> None:
        end = 0
        for first in range(0, len(self._lengths_S), _CHUNK):
            lengths_S = self._lengths_S[first : first + _CHUNK].astype(np.int64)
            ends_S = end + np.cumsum(lengths_S) * self.dtype.itemsize
            starts_S = ends_S - lengths_S * self.dtype.itemsize
            wrong_S = (lengths_S < 0) | (starts_S != self._pointers_S[first : first + _CHUNK])
            if wrong_S.any():
                raise self._damage(f"sequence {first + int(wrong_S.argmax())} does not follow the one before it")
            end = int(ends_S[-1])
        if end != bin_size:
            what = f"token file has {bin_size} bytes where its index says {end}"
            raise UserError(ExitCode.DATA, what, bin_path, "bring both files whole, from the same call of Megatron-LM")

    def _check_documents(self) -> None:
        documents_B = self._documents_B
        ascend = all((np.diff(documents_B[i : i + _CHUNK + 1]) >= 0).all() for i in range(0, len(documents_B), _CHUNK))
        if not ascend or documents_B[0] != 0 or documents_B[-1] != len(self._lengths_S):
            raise self._damage("documents do not ascend from the first sequence to the last")

    def _damage(self, what: str, fix: str = "bring the file again, or write it again with Megatron-LM") -> UserError:
        return UserError(ExitCode.DATA, what, self.path, fix)


class _Numbers:
    """An array of the file that is read where it is asked for."""

    def __init__(self, file: OpenFile, dtype: str, place: int, count: int):
        self._file, self._dtype, self._place, self._count = file, np.dtype(dtype), place, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, int):
            return int(self[index % self._count : index % self._count + 1][0])
        start, stop, _ = index.indices(self._count)
        size = self._dtype.itemsize
        return self._file.read(self._place + start * size, self._place + max(start, stop) * size).view(self._dtype)
