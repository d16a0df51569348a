"""Read .gz, .zst, .xz and .bz2 files of any number of members as streams of bytes.

Python's own file objects ignore damage after the first member of a .bz2, .xz or .zst; `Decompressed` reports it.
"""

import bz2
import functools
import lzma
import sys
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from gpt2_flax.errors import ExitCode, UserError, quote

READ_BYTES = 2**16  # compressed, at once


class DamagedStream(Exception):
    """The content of a file does not follow its format; the message says how."""


class Decompressed:
    """Reads the content of a compressed file; `consumed` counts the compressed bytes read so far."""

    def __init__(self, file: BinaryIO, suffix: str):
        self._file, self._suffix, self._new_member = file, suffix, _decompressor(suffix)
        self._member, self._rest = self._new_member(), b""
        self.consumed = 0

    def read(self, size: int) -> bytes:
        """Return 1 to `size` bytes, or none at the end. Raises `DamagedStream`."""
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
            except Exception as error:  # each library raises its own
                raise DamagedStream(f"damaged {self._suffix} data ({quote(str(error))})") from None
            if content:
                return content
            if ended:
                raise DamagedStream(f"truncated {self._suffix} data")

    def _next_member(self) -> bool:
        """Start the next member, if there is one, after zeros that pad a block of a tape or disk."""
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
    """Raise `UserError` (NO_INPUT) if reading these files needs a package that is missing."""
    _decompressor(suffix)


class _GzipMember:
    """zlib's decompressor with the interface of `bz2.BZ2Decompressor`."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(zlib.MAX_WBITS | 16)  # 16: expect gzip's header and checksum

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


def _decompressor(suffix: str) -> Callable[[], Any]:
    """Return a class with the interface of `bz2.BZ2Decompressor`."""
    if suffix == ".zst":
        return zstd_module().ZstdDecompressor
    xz = functools.partial(lzma.LZMADecompressor, lzma.FORMAT_XZ)
    return {".gz": _GzipMember, ".bz2": bz2.BZ2Decompressor, ".xz": xz}[suffix]


def zstd_module() -> Any:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        fix = "install it with: pip install 'gpt2_flax[corpora]'"
        raise UserError(ExitCode.NO_INPUT, "package missing for .zst files", "backports.zstd", fix) from None
    return zstd
