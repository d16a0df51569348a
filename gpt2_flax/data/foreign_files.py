"""Token files of other programs, opened: their ids and the documents in them.

* Megatron-LM: `NAME.bin` with `NAME.idx`, which records where documents start.
* llm.c, modded-nanogpt: `.bin` with a header of 256 int32 (magic number, version, number of tokens), then ids.
* nanoGPT: `.bin` with ids and nothing else.

In files without an index, a special token stands before every document, or after it.

A Megatron-LM index:

    9 bytes    MMIDIDX, then two zeros
    uint64     version, 1
    uint8      code of the type of ids
    uint64     S, the number of sequences
    uint64     B, the number of entries in the list of documents
    int32 S    number of tokens of each sequence
    int64 S    byte in the .bin at which each sequence starts
    int64 B    number of the first sequence of each document, and S at the end

All numbers are little-endian. Big-endian machines write the arrays and the .bin, and some programs also the head, in
their own byte order.
Dimension key: B documents and one more, N numbers, S sequences, T tokens.
"""

import struct
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_flax.data.dataset_info import TokenType
from gpt2_flax.errors import ExitCode, UserError, io_error

_MEGATRON = b"MMIDIDX\0\0"
_MEGATRON_HEAD = "9sQBQQ"
_MEGATRON_HEAD_BYTES = struct.calcsize(f"<{_MEGATRON_HEAD}")
_MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}
_MEGATRON_FLOATS = (6, 7)
_LLM_C = {(20240520, 1): "u2", (20240801, 7): "u4"}
"""Types of ids by magic number and version."""
_LLM_C_EVALUATION = 20240522
_LLM_C_HEADER = 1024  # bytes

CHUNK = 2**20  # numbers read at once
_SAMPLE = 2**16  # numbers that are looked at to detect 32-bit ids


class Mark(NamedTuple):
    """The special token that begins documents, or ends them."""

    token: int
    begins: bool


@dataclass(frozen=True)
class Numbers:
    """`count` numbers of a file from byte `place` on, read when they are needed."""

    path: Path
    dtype: np.dtype
    count: int
    place: int = 0

    def at(self, index: int) -> int:
        return int(self.read(index, index + 1)[0])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return numbers [start, stop); raises `UserError` if the file has become shorter or cannot be read."""
        start, stop = min(start, self.count), min(stop, self.count)
        try:
            numbers_N = np.fromfile(
                self.path, self.dtype, stop - start, offset=self.place + start * self.dtype.itemsize
            )
        except OSError as error:
            raise io_error(error, self.path) from None
        if len(numbers_N) < stop - start:
            what = "file became shorter while it was in use"
            raise UserError(ExitCode.DATA, what, self.path, "bring the file back and import it again")
        return numbers_N


@dataclass(frozen=True)
class TokenFile:
    """A file of tokens: its ids, and its index if it has one."""

    ids: Numbers
    index: "MegatronIndex | None" = None
    has_header: bool = False

    def pieces(self, start: int, stop: int, mark: Mark) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield tokens [start, stop) in pieces: ids_T and the int64 positions in it at which documents start.

        The token at `start` starts a document in any case.
        """
        starts_before = True  # a document starts at the first token of the next piece
        for position in range(start, stop, CHUNK):
            ids_T = self.ids.read(position, min(position + CHUNK, stop))
            if self.index is not None:
                starts_B = self.index.starts(position, position + len(ids_T)) - position
            else:
                starts_B = np.flatnonzero(ids_T == mark.token) + int(not mark.begins)
            if starts_before and (not len(starts_B) or starts_B[0] != 0):
                starts_B = np.concatenate(([0], starts_B))
            starts_before = starts_B[-1:].tolist() == [len(ids_T)]
            yield ids_T, starts_B[:-1] if starts_before else starts_B

    def next_start(self, position: int, mark: Mark) -> int | None:
        """Return the first token at or after `position` that starts a document, None if there is none.

        `position` must not be 0.
        """
        done = position - 1  # the token before `position` may end a document
        for ids_T, starts_B in self.pieces(done, self.ids.count, mark):
            starts_B = starts_B + done
            if len(later_B := starts_B[starts_B >= position]):
                return int(later_B[0])
            done += len(ids_T)
        return None


def open_token_file(name: str, dtype: TokenType | None) -> TokenFile:
    """Open a file that is named by its `.bin`, its `.idx` or their common stem.

    Args:
        name: The path as the user gave it.
        dtype: The type of ids in a file without header and index; None means uint16.

    Raises:
        UserError: NO_INPUT if a file is missing, DATA if it is damaged or of another kind.
    """
    stem = name[:-4] if name.endswith((".bin", ".idx")) else name
    has_index = name.endswith(".idx") or Path(stem + ".idx").is_file()
    path, index = Path(stem + ".bin" if has_index else name), Path(stem + ".idx")
    for needed in (path, index) if has_index else (path,):
        if not needed.exists():
            raise UserError(ExitCode.NO_INPUT, "token file not found", needed, "check the name")
        if not needed.is_file():
            raise UserError(ExitCode.DATA, "not a file", needed, "name a file of tokens")
    try:
        if has_index:
            opened = MegatronIndex(index, path)
            file = TokenFile(Numbers(path, opened.dtype, opened.count), opened)
        else:
            file = _without_index(path, dtype)
    except OSError as error:
        raise io_error(error, path) from None
    if not file.ids.count:
        raise UserError(ExitCode.DATA, "token file without tokens", path, "leave it out")
    return file


def _without_index(path: Path, dtype: TokenType | None) -> TokenFile:
    if path.suffix == ".npy":
        raise UserError(ExitCode.DATA, "not a plain file of ids", path, "write its array with numpy's tofile")
    size = path.stat().st_size
    magics = {_LLM_C_EVALUATION, *(magic for magic, _ in _LLM_C)}
    for order in "<>":
        head = np.fromfile(path, f"{order}i4", 3).tolist()
        if len(head) < 3 or head[0] not in magics:
            continue
        magic, version, count = head
        if (magic, version) not in _LLM_C:
            what = f"llm.c file of another kind: magic number {magic}, version {version}"
            raise UserError(ExitCode.DATA, what, path, "give a file of training or validation tokens")
        kind = np.dtype(order + _LLM_C[magic, version])
        if size != (expected := _LLM_C_HEADER + count * kind.itemsize):
            what = f"token file has {size} bytes where its header says {expected}"
            raise UserError(ExitCode.DATA, what, path, "bring the file whole")
        return TokenFile(Numbers(path, kind, count, _LLM_C_HEADER), has_header=True)
    kind = np.dtype(dtype or "uint16").newbyteorder("<")
    if size % kind.itemsize:
        raise UserError(ExitCode.DATA, f"{size} bytes are not ids of type {kind.name}", path, "check --dtype")
    sample = np.fromfile(path, "<u2", _SAMPLE)
    if dtype is None and len(sample) >= 8 and sample.any() and not sample[1::2].any():
        raise UserError(ExitCode.DATA, "token file looks like 32-bit ids, not uint16", path, "add --dtype uint32")
    return TokenFile(Numbers(path, kind, size // kind.itemsize))


class MegatronIndex:
    """The index of a `.bin` with `count` tokens of type `dtype`; it is checked whole and read in bounded memory.

    The constructor raises `UserError` (DATA) if the index is damaged, of another kind, or does not fit the `.bin`.
    """

    def __init__(self, path: Path, bin_path: Path):
        self.path = path
        try:
            size, bin_size = path.stat().st_size, bin_path.stat().st_size
            with open(path, "rb") as file:
                head, first = file.read(_MEGATRON_HEAD_BYTES), file.read(4)
        except OSError as error:
            raise io_error(error, path) from None
        if len(head) < _MEGATRON_HEAD_BYTES or not head.startswith(_MEGATRON):
            raise self._damage("not a Megatron-LM index", "give the .idx that was written with the .bin")
        order = ">" if head[len(_MEGATRON) : len(_MEGATRON) + 8] == bytes(7) + b"\x01" else "<"
        _, version, code, sequences, documents = struct.unpack(order + _MEGATRON_HEAD, head)
        if version != 1:
            raise self._damage(f"index has version {version}, not 1", "write it again with a current Megatron-LM")
        if code in _MEGATRON_FLOATS:
            raise self._damage("file of floating-point numbers, not of token ids", "give a file of token ids")
        if code not in _MEGATRON_TYPES:
            raise self._damage(f"index has an unknown type of ids, code {code}")
        expected = _MEGATRON_HEAD_BYTES + 12 * sequences + 8 * documents
        if size != expected:
            what = f"index has {size} bytes where its head says {expected}"
            raise self._damage(what, "bring it whole; an index with modes, for images, cannot be read")
        if not sequences or documents < 2:
            raise self._damage("index without documents")
        id_bytes = np.dtype(_MEGATRON_TYPES[code]).itemsize
        if int.from_bytes(first, "little") * id_bytes > bin_size >= int.from_bytes(first, "big") * id_bytes:
            order = ">"
        self.dtype = np.dtype(order + _MEGATRON_TYPES[code])
        self._lengths_S = Numbers(path, np.dtype(f"{order}i4"), sequences, _MEGATRON_HEAD_BYTES)
        self._pointers_S = Numbers(path, np.dtype(f"{order}i8"), sequences, _MEGATRON_HEAD_BYTES + 4 * sequences)
        self._documents_B = Numbers(path, np.dtype(f"{order}i8"), documents, _MEGATRON_HEAD_BYTES + 12 * sequences)
        self._check_sequences(bin_path, bin_size)
        self._check_documents()
        self.count = bin_size // self.dtype.itemsize

    def starts(self, start: int, stop: int) -> np.ndarray:
        """Return the int64 positions in [start, stop), in tokens, at which documents with tokens start."""
        sequences, entries = range(self._pointers_S.count), range(self._documents_B.count)
        size = self.dtype.itemsize
        bounds = [bisect_left(sequences, token * size, key=self._pointers_S.at) for token in (start, stop)]
        first, last = (bisect_left(entries, sequence, key=self._documents_B.at) for sequence in bounds)
        if first == last:
            return np.zeros(0, np.int64)
        sequences_B = self._documents_B.read(first, last)
        pointers_S = self._pointers_S.read(int(sequences_B[0]), int(sequences_B[-1]) + 1)
        # A document without tokens starts where the next one does.
        return np.unique(pointers_S[sequences_B - sequences_B[0]]).astype(np.int64) // size

    def _check_sequences(self, bin_path: Path, bin_size: int) -> None:
        end = 0
        for first in range(0, self._lengths_S.count, CHUNK):
            lengths_S = self._lengths_S.read(first, first + CHUNK).astype(np.int64)
            ends_S = end + np.cumsum(lengths_S) * self.dtype.itemsize
            starts_S = ends_S - lengths_S * self.dtype.itemsize
            wrong_S = (lengths_S < 0) | (starts_S != self._pointers_S.read(first, first + CHUNK))
            if wrong_S.any():
                raise self._damage(f"sequence {first + int(wrong_S.argmax())} does not follow the one before it")
            end = int(ends_S[-1])
        if end != bin_size:
            what = f"token file has {bin_size} bytes where its index says {end}"
            raise UserError(ExitCode.DATA, what, bin_path, "bring both files whole, from the same call of Megatron-LM")

    def _check_documents(self) -> None:
        numbers_B = self._documents_B
        chunks = (numbers_B.read(first, first + CHUNK + 1) for first in range(0, numbers_B.count, CHUNK))
        ascend = all((np.diff(chunk_B) >= 0).all() for chunk_B in chunks)
        if not ascend or numbers_B.at(0) != 0 or numbers_B.at(numbers_B.count - 1) != self._lengths_S.count:
            raise self._damage("documents do not ascend from the first sequence to the last")

    def _damage(self, what: str, fix: str = "bring the file again, or write it again with Megatron-LM") -> UserError:
        return UserError(ExitCode.DATA, what, self.path, fix)
