"""Detect the encoding of a file from a bounded sample of it.

A byte order mark decides, then strict UTF-8, then a detector that must be sure. UTF-16 and UTF-32, in which the byte
0x0A may be inside a character, are converted to UTF-8 before lines are split.
"""

import codecs
import re
from collections.abc import Callable
from typing import NamedTuple

import charset_normalizer

from gpt2_flax.text.compression import DamagedStream, Decompressed
from gpt2_flax.text.encodings import BLOCK_BYTES
from gpt2_flax.text.files import File, open_file

PIECES, PIECE_BYTES = 16, 2**16  # sampled from a file, unless the file is shorter
_DETECTED_BYTES = 2**18  # given to the detector, which takes milliseconds for them
_SURE_FROM = 100  # non-ASCII characters; with fewer, the detector confuses Japanese, Korean and Chinese
# The detector is wrong for one short text in 500. A fifth or more of the characters of correctly decoded text are among
# these, and almost none of wrongly decoded text.
_FREQUENT = set(
    "的一是不了在人有我他中上大和地到以要就出可也你生能而子那得下自之年"
    "这个们来为国说时会对于着过发后里這個們來為國說時會對於著過發後裡"
    "いうかがきけこさしすせたっつてとどなにのはまもられりるれをん이다는의에을를가은고하도로지한기사"
)
_LEAST_FREQUENT = 0.1  # share of the non-ASCII characters that must be in `_FREQUENT`

# UTF-32 comes before UTF-16, whose mark begins the mark of UTF-32.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# The detector's name for an encoding -> the codecs to try: the plain codec before its extension, which maps a few signs
# differently. cp949 maps everything in EUC-KR alike.
_CODECS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gb18030", "gbk", "gb2312"), ("gb18030",)),
    **dict.fromkeys(("big5", "cp950", "big5hkscs"), ("big5", "cp950", "big5hkscs")),
    **dict.fromkeys(("shift_jis", "cp932"), ("shift_jis", "cp932")),
    **dict.fromkeys(("euc_kr", "cp949"), ("cp949",)),
}


class FileSample(NamedTuple):
    """Whole lines from several places of a file."""

    pieces: list[bytes]
    """In the order of the file; the first piece begins the file."""
    whole: bool
    """Whether the only piece is the whole file."""

    @property
    def encoding(self) -> str:
        """UTF-8, unless a byte order mark or the detector is sure of another encoding.

        If the text is in neither, strict decoding as UTF-8 reports it.
        """
        head = self.pieces[0]
        for mark, name in _MARKS:
            if head.startswith(mark):
                return name
        if self._is("utf-8") or self._is_damaged_utf8():
            return "utf-8"
        if not any(map(self._is, {codec for names in _CODECS.values() for codec in names})):
            return "utf-8"  # Latin, say: the detector need not run
        found = charset_normalizer.from_bytes(_whole_lines(b"".join(self.pieces)[:_DETECTED_BYTES])).best()
        for codec in _CODECS.get(found.encoding, ()) if found else ():
            if self._is(codec) and self._is_plausible(codec):
                return codec
        return "utf-8"

    def first_lines(self, encoding: str) -> str:
        """Return the text at the beginning of the file, with U+FFFD for bytes that cannot be decoded."""
        return self.pieces[0].decode(encoding, "replace").removeprefix("\ufeff")

    def _is(self, encoding: str) -> bool:
        decoders = [codecs.getincrementaldecoder(encoding)("strict") for _ in self.pieces]
        try:
            for decoder, piece in zip(decoders, self.pieces, strict=True):
                decoder.decode(piece, final=self.whole)
        except UnicodeDecodeError:
            return False
        return True

    def _is_damaged_utf8(self) -> bool:
        """Return whether most of the non-ASCII text is UTF-8. In other encodings, few bytes are UTF-8 by chance."""
        text = self._beyond_ascii("utf-8")
        return text.count("\ufffd") < len(text) / 2

    def _is_plausible(self, encoding: str) -> bool:
        text = self._beyond_ascii(encoding)
        return len(text) >= _SURE_FROM and sum(map(_FREQUENT.__contains__, text)) >= _LEAST_FREQUENT * len(text)

    def _beyond_ascii(self, encoding: str) -> str:
        return re.sub(r"[\x00-\x7f]+", "", b"".join(self.pieces).decode(encoding, "replace"))


def read_sample(file: File, packed: str) -> FileSample:
    """Return up to 1 MiB of the content of a file, decompressed if `packed` names a compression.

    Raises:
        OSError: the file cannot be read.
        UserError: as `open_file`.
    """
    with open_file(file.path) as stream:
        if packed:
            content = _start(Decompressed(stream, packed).read, PIECES * PIECE_BYTES)
            whole = len(content) < PIECES * PIECE_BYTES
            return FileSample([content if whole else _whole_lines(content)], whole)
        if file.size <= PIECES * PIECE_BYTES:
            return FileSample([_start(stream.read, PIECES * PIECE_BYTES)], True)
        pieces = [_whole_lines(_start(stream.read, PIECE_BYTES))]
        for number in range(1, PIECES):
            stream.seek(number * (file.size - PIECE_BYTES) // (PIECES - 1))
            pieces.append(_whole_lines(_start(stream.read, PIECE_BYTES).partition(b"\n")[2]))
        return FileSample(pieces, False)


class AsUtf8:
    """Converts the bytes that `read` returns from UTF-16 or UTF-32 to UTF-8, with 0xFF for undecodable bytes."""

    def __init__(self, read: Callable[[int], bytes], encoding: str):
        self._read, self._decoder = read, codecs.getincrementaldecoder(encoding)(_MARKED)
        self._ready, self._ended = b"", False

    def read(self, size: int) -> bytes:
        while not self._ready and not self._ended:
            data = self._read(size)
            self._ended = not data
            self._ready = self._decoder.decode(data, self._ended).encode("utf-8", "surrogateescape")
        data, self._ready = self._ready[:size], self._ready[size:]
        return data


def _whole_lines(content: bytes) -> bytes:
    """Remove the last line, which was cut, unless it is the only line."""
    return content[: content.rfind(b"\n") + 1] or content


def _start(read: Callable[[int], bytes], size: int) -> bytes:
    """Return the first `size` bytes, or fewer at the end of the file or before damage."""
    content = bytearray()
    try:
        while len(content) < size and (data := read(min(BLOCK_BYTES, size - len(content)))):
            content += data
    except DamagedStream:
        pass  # the reader of the whole file reports the place
    return bytes(content)


def _mark(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff", error.end  # encoded with "surrogateescape", this is the byte 0xFF, which UTF-8 never has


_MARKED = "gpt2_flax.marked"
codecs.register_error(_MARKED, _mark)
