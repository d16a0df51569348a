"""Compressed files as streams of bytes: .gz, .zst, .xz and .bz2, of any number of members.

Python's own file objects pass over damage after the first member of a .bz2, .xz or .zst; these do not.
"""

import bz2
import lzma
import sys
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol

from gpt2_flax.errors import ExitCode, UserError, quote

READ_BYTES = 2**16  # compressed, at once


class Damaged(Exception):
    """A file's content is not what its format says."""

    @property
    def reason(self) -> str:
        return str(self.args[0])


class Decompressed:
    """The content of a compressed file; `consumed` counts the compressed bytes read so far."""

    def __init__(self, file: BinaryIO, suffix: str):
        self._file, self._suffix, self._new_member = file, suffix, _decompressor(suffix)
        self._member, self._rest = self._new_member(), b""
        self.consumed = 0

    def read(self, size: int) -> bytes:
        """Returns 1 to `size` bytes, or none at the end. Raises `Damaged`."""
        while True:
            if self._member.eof and not self._next_member():
                return b""
            data, self._rest = self._rest, b""
            ended = False
            if not data and self._member.needs_input:
                data = self._read_file()
                ended = not data
            try:
                content = self._member.decompress(data, size)
            except MemoryError:
                raise
            except Exception as error:  # every library has its own kind
                raise Damaged(f"damaged {self._suffix} data ({quote(str(error))})") from None
            if content:
                return content
            if ended:
                raise Damaged(f"truncated {self._suffix} data")

    def _next_member(self) -> bool:
        """Whether there is one; zeros after a member only fill up a block of a tape or disk."""
        rest = self._member.unused_data.lstrip(b"\0")
        while not rest:
            if not (rest := self._read_file()):
                return False
            rest = rest.lstrip(b"\0")
        self._member, self._rest = self._new_member(), rest
        return True

    def _read_file(self) -> bytes:
        data = self._file.read(READ_BYTES)
        self.consumed += len(data)
        return data


def check_installed(suffix: str) -> None:
    """Raises `UserError` (NO_INPUT) when this kind of file needs a package that is missing."""
    _decompressor(suffix)


class _Member(Protocol):
    eof: bool
    unused_data: bytes
    needs_input: bool

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _GzipMember:
    """zlib's object with the interface of the other three."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(zlib.MAX_WBITS | 16)  # 16: with gzip's header, length and checksum

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._stream.unconsumed_tail

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._stream.decompress(self._stream.unconsumed_tail + data, max_length)


def _decompressor(suffix: str) -> Callable[[], _Member]:
    if suffix == ".zst":
        return _zstd().ZstdDecompressor
    kinds: dict[str, Any] = {".gz": _GzipMember, ".bz2": bz2.BZ2Decompressor, ".xz": _xz_member}
    return kinds[suffix]


def _xz_member() -> _Member:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ)


def _zstd() -> Any:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        fix = "install it with: pip install 'gpt2_flax[corpora]'"
        raise UserError(ExitCode.NO_INPUT, "package missing for .zst files", "backports.zstd", fix) from None
    return zstd
