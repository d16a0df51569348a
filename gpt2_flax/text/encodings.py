"""Bytes to text: pieces of a file, decoded strictly, with line ends made LF, in memory that long lines do not fill.

Only LF and CRLF end a line. Everything here works for encodings in which the byte 0x0A is LF and nothing else, so that
lines can be found before they are decoded, and each decoded alone; `charset.AsUtf8` makes UTF-8 of two others.
"""

import codecs
from collections.abc import Callable, Iterator
from typing import NamedTuple

from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.text.compression import Damaged

BLOCK_BYTES = 2**19  # read at once
AUTO = "auto"  # stands for an encoding that is to be found out
WIDE = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")

# In an encoding that changes its meaning half-way (ISO-2022, HZ, UTF-7) or is no ASCII at all, this is another text.
_PROBE = (
    b"\x0e!!\x0f \x1b$B!!\x1b(B ~{!!~} +AGE- \\u4e2d "
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz 0123456789 \r\n"
)


class Bad(NamedTuple):
    """Something that cannot be decoded."""

    line: int
    """How many lines stand before it."""
    reason: str


def text_encoding(name: str) -> str:
    """Returns the canonical name of an encoding, or `AUTO`.

    Raises `UserError` (USAGE) for one that is unknown, or that can be read neither line by line nor as `WIDE`.
    """
    if name == AUTO:
        return name
    try:
        canonical = codecs.lookup(name).name
    except (LookupError, ValueError):
        fix = "give one that Python knows, as utf-8, gb18030 or big5"
        raise UserError(ExitCode.USAGE, "unknown text encoding", quote(name), fix) from None
    canonical = "utf-8" if canonical == "utf-8-sig" else canonical  # a byte order mark is always taken off
    if canonical in WIDE:
        return canonical
    try:
        plain = _PROBE.decode("ascii")
        usable = _PROBE.decode(canonical) == plain and plain.encode(canonical) == _PROBE
    except (UnicodeError, LookupError):  # the latter for what is no encoding of text
        usable = False
    if not usable:
        what = "encoding that cannot be read line by line"
        raise UserError(ExitCode.USAGE, what, quote(name), "convert the files with: iconv -t UTF-8")
    return canonical


def line_blocks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Cuts what `read` returns into blocks of whole lines or, where a line is longer, pieces of one line.

    A piece has no LF, and the whole lines after it begin with the end of its line. The last block may lack its LF.
    """
    rest = b""
    while block := read(BLOCK_BYTES):
        end = block.rfind(b"\n") + 1
        if end:
            yield rest + block[:end]
            rest = block[end:]
        elif len(rest) + len(block) < BLOCK_BYTES:
            rest += block
        else:
            yield rest + block
            rest = b""
    if rest:
        yield rest


class TextPieces:
    """The text of `blocks` in pieces: many whole lines, or a part of one line. Joined, they are the text.

    Where a line cannot be decoded there is a `Bad` instead of its rest; with `mend`, a function that is told of the
    first such place of each line, there is U+FFFD. A stream that turns out to be `Damaged` ends with a `Bad`.
    `original` is the encoding that the blocks had before they were made UTF-8, if they were.
    """

    def __init__(
        self,
        blocks: Iterator[bytes],
        encoding: str,
        at_start: bool,
        mend: Callable[[Bad], None] | None = None,
        original: str | None = None,
    ):
        self._blocks, self._encoding, self._at_start, self._mend = blocks, encoding, at_start, mend
        self._original = original
        self._new_decoder = codecs.getincrementaldecoder(encoding)
        self._lines = 0  # that have ended
        self._decoder: codecs.IncrementalDecoder | None = None  # of a line that has not ended
        self._line_bytes = 0  # of that line, already decoded
        self._bad = False  # the rest of that line is left out
        self._carriage = ""  # "\r" at the end of the last piece, perhaps one half of CRLF

    def __iter__(self) -> Iterator[str | Bad]:
        try:
            for block in self._blocks:
                yield from self._block(block)
            if self._decoder is not None:
                yield from self._of_line(b"", last=True)
        except Damaged as damage:
            yield Bad(self._lines, damage.reason)

    def _block(self, block: bytes) -> Iterator[str | Bad]:
        if self._decoder is not None:
            end = block.find(b"\n") + 1 or len(block)
            yield from self._of_line(block[:end])
            block = block[end:]
        if not block.endswith(b"\n"):
            yield from self._of_line(block)
            return
        try:
            text = block.decode(self._encoding)
        except UnicodeDecodeError:
            yield from self._line_by_line(block)
        else:
            self._lines += block.count(b"\n")
            yield from self._text(text.replace("\r\n", "\n") if b"\r" in block else text)

    def _line_by_line(self, block: bytes) -> Iterator[str | Bad]:
        good: list[str] = []
        for line in block.removesuffix(b"\n").split(b"\n"):
            try:
                text = line.decode(self._encoding)
            except UnicodeDecodeError:
                yield from self._text("".join(good))
                good.clear()
                yield from self._of_line(line + b"\n")
            else:
                self._lines += 1
                good.append(text.removesuffix("\r") + "\n")
        yield from self._text("".join(good))

    def _of_line(self, data: bytes, last: bool = False) -> Iterator[str | Bad]:
        """Decodes bytes of one line, which ends with them when they end with LF or are the `last` of the file."""
        if not data and not last:
            return
        if self._decoder is None:
            self._decoder = self._new_decoder("strict")
        ended = data.endswith(b"\n")
        text, bad = self._decoded(data.removesuffix(b"\n"), ended or last)
        text, self._carriage = self._carriage + text, ""
        if bad is not None:
            yield from self._text(text)
            yield bad
            text = ""
        elif not last and text.endswith("\r"):
            text, self._carriage = text[:-1], "" if ended else "\r"
        if ended or last:
            self._decoder, self._line_bytes, self._bad = None, 0, False
            self._lines += ended
        yield from self._text(text + "\n" if ended else text)

    def _decoded(self, data: bytes, final: bool) -> tuple[str, Bad | None]:
        """Returns the text of a part of the line, up to what cannot be decoded."""
        decoder = self._decoder
        if self._bad or decoder is None:
            return "", None
        before = decoder.getstate()
        start = self._line_bytes - len(before[0])  # of the bytes that the decoder has not turned to text yet
        self._line_bytes += len(data)
        try:
            return decoder.decode(data, final), None
        except UnicodeDecodeError as error:
            place = f" (byte {start + error.start + 1} of the line is 0x{error.object[error.start]:02X})"
            reason = f"not {self._original.upper()}" if self._original else f"not {self._encoding.upper()}{place}"
            bad = Bad(self._lines, reason)
            if self._mend is None:
                self._bad = True
                return error.object[: error.start].decode(self._encoding), bad
        self._mend(bad)
        decoder.setstate(before)  # some forget it in the error
        decoder.errors = "replace"
        return decoder.decode(data, final), None

    def _text(self, text: str) -> Iterator[str]:
        if text and self._at_start:
            self._at_start = False
            text = text.removeprefix("\ufeff")
        if text:
            yield text
