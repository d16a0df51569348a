"""The encoding of a file whose owner does not name it, decided once from a bounded sample.

A byte order mark decides, then strict UTF-8, then a detector that must be sure. Text in UTF-16 and UTF-32, where the
byte 0x0A is no line end, is made UTF-8 before it is cut into lines.
"""

import codecs
import re
from collections.abc import Callable
from typing import NamedTuple

import charset_normalizer

from gpt2_flax.text.compression import Damaged, Decompressed
from gpt2_flax.text.encodings import BLOCK_BYTES
from gpt2_flax.text.files import File, open_file

_PIECES, _PIECE_BYTES = 16, 2**16  # of a longer file; a shorter one is looked at as a whole
_DETECTED_BYTES = 2**18  # shown to the detector, which takes milliseconds for them
_SURE_FROM = 100  # characters beyond ASCII; of fewer the detector confuses Japanese, Korean and Chinese
# It errs for one short text in 500. A right decoding has a fifth and more of these, a wrong one next to none.
_FREQUENT = set(
    "的一是不了在人有我他中上大和地到以要就出可也你生能而子那得下自之年"
    "这个们来为国说时会对于着过发后里這個們來為國說時會對於著過發後裡"
    "いうかがきけこさしすせたっつてとどなにのはまもられりるれをん이다는의에을를가은고하도로지한기사"
)
_LEAST_FREQUENT = 0.1  # of the characters beyond ASCII

# UTF-32 comes first: the mark of UTF-16 is the beginning of its own.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# What the detector calls them, and which codecs read them: the plain one first, which maps some signs in another way
# than its extension. Windows' Korean maps all that EUC-KR has in the same way.
_CODECS = {
    "gb18030": ("gb18030",),
    "gbk": ("gb18030",),
    "gb2312": ("gb18030",),
    "big5": ("big5", "cp950", "big5hkscs"),
    "cp950": ("big5", "cp950", "big5hkscs"),
    "big5hkscs": ("big5", "cp950", "big5hkscs"),
    "shift_jis": ("shift_jis", "cp932"),
    "cp932": ("shift_jis", "cp932"),
    "euc_kr": ("cp949",),
    "cp949": ("cp949",),
}


class Sample(NamedTuple):
    """Whole lines of a file in their order, the first from its beginning; `whole`: they are all there is."""

    pieces: list[bytes]
    whole: bool

    @property
    def encoding(self) -> str:
        """UTF-8 unless a byte order mark or the detector is sure of another; strict reading finds what is not."""
        head = self.pieces[0]
        for mark, name in _MARKS:
            if head.startswith(mark):
                return name
        if self._is("utf-8") or self._is_damaged_utf8():
            return "utf-8"
        if not any(map(self._is, {codec for names in _CODECS.values() for codec in names})):
            return "utf-8"  # Latin, say: no need to ask
        found = charset_normalizer.from_bytes(_whole_lines(b"".join(self.pieces)[:_DETECTED_BYTES])).best()
        for codec in _CODECS.get(found.encoding, ()) if found else ():
            if self._is(codec) and self._is_plausible(codec):
                return codec
        return "utf-8"

    def first_lines(self, encoding: str) -> str:
        """Returns the text at the beginning of the file; what cannot be decoded is U+FFFD."""
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
        """Whether most of what is not ASCII is UTF-8: other multi-byte texts have few such sequences, by chance."""
        text = self._beyond_ascii("utf-8")
        return text.count("\ufffd") < len(text) / 2

    def _is_plausible(self, encoding: str) -> bool:
        text = self._beyond_ascii(encoding)
        return len(text) >= _SURE_FROM and sum(map(_FREQUENT.__contains__, text)) >= _LEAST_FREQUENT * len(text)

    def _beyond_ascii(self, encoding: str) -> str:
        return re.sub(r"[\x00-\x7f]+", "", b"".join(self.pieces).decode(encoding, "replace"))


def read_sample(file: File, packed: str) -> Sample:
    """Returns up to 1 MiB of a file, or of what it decompresses to. Raises `OSError`, or `UserError` as `open_file`."""
    with open_file(file.path) as stream:
        if packed:
            content = _start(Decompressed(stream, packed).read, _PIECES * _PIECE_BYTES)
            whole = len(content) < _PIECES * _PIECE_BYTES
            return Sample([content if whole else _whole_lines(content)], whole)
        if file.size <= _PIECES * _PIECE_BYTES:
            return Sample([_start(stream.read, _PIECES * _PIECE_BYTES)], True)
        pieces = [_whole_lines(_start(stream.read, _PIECE_BYTES))]
        for number in range(1, _PIECES):
            stream.seek(number * (file.size - _PIECE_BYTES) // (_PIECES - 1))
            pieces.append(_whole_lines(_start(stream.read, _PIECE_BYTES).partition(b"\n")[2]))
        return Sample(pieces, False)


class AsUtf8:
    """Reads what `read` returns, in UTF-16 or UTF-32, as UTF-8; 0xFF stands for what cannot be decoded."""

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
    """Leaves out the line that was cut, unless it is the only one."""
    return content[: content.rfind(b"\n") + 1] or content


def _start(read: Callable[[int], bytes], size: int) -> bytes:
    """Returns the first `size` bytes, fewer when that is all or what follows is damaged."""
    content = bytearray()
    try:
        while len(content) < size and (data := read(min(BLOCK_BYTES, size - len(content)))):
            content += data
    except Damaged:
        pass  # the reader of the whole file says where
    return bytes(content)


def _mark(error: UnicodeError) -> tuple[str, int]:
    return "\udcff", error.end  # the byte 0xFF for "surrogateescape", which no UTF-8 has


_MARKED = "gpt2_flax.marked"
codecs.register_error(_MARKED, _mark)
