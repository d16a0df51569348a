"""Decode the bytes of a file strictly, piece by piece, so that a long line does not fill the memory.

Only LF and CRLF end a line; both become LF. In the encodings decoded here, the byte 0x0A is always LF: lines are found
before they are decoded, and each line is decoded alone. `detect_encoding.AsUtf8` converts UTF-16 and UTF-32 to UTF-8.
"""

import codecs
from collections.abc import Callable, Iterator
from typing import NamedTuple

from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.text.compression import DamagedStream

BLOCK_BYTES = 2**19  # read at once
AUTO = "auto"  # the encoding is detected
WIDE = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")

# These bytes decode to other text in an encoding with shift states (ISO-2022, HZ, UTF-7) or without ASCII.
_PROBE = (
    b"\x0e!!\x0f \x1b$B!!\x1b(B ~{!!~} +AGE- \\u4e2d "
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz 0123456789 \r\n"
)


class Bad(NamedTuple):
    """A place in a text that cannot be decoded or parsed."""

    line: int
    """Number of lines before it."""
    reason: str


def text_encoding(name: str) -> str:
    """Return the canonical name of an encoding, or `AUTO`.

    Raises:
        UserError: USAGE if the encoding is unknown, or neither `WIDE` nor decodable line by line.
    """
    if name == AUTO:
        return name
    try:
        canonical = codecs.lookup(name).name
    except (LookupError, ValueError):
        fix = "give one that Python knows, as utf-8, gb18030 or big5"
        raise UserError(ExitCode.USAGE, "unknown text encoding", quote(name), fix) from None
    canonical = "utf-8" if canonical == "utf-8-sig" else canonical  # a byte order mark is always removed
    if canonical in WIDE:
        return canonical
    try:
        plain = _PROBE.decode("ascii")
        usable = _PROBE.decode(canonical) == plain and plain.encode(canonical) == _PROBE
    except (UnicodeError, LookupError):  # LookupError: it encodes no text, as "hex"
        usable = False
    if not usable:
        what = "encoding that cannot be read line by line"
        raise UserError(ExitCode.USAGE, what, quote(name), "convert the files with: iconv -t UTF-8")
    return canonical


def line_blocks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Yield blocks of whole lines or, if a line is longer than a block, fragments of it.

    A fragment has no LF. The block after it begins with the end of its line. The last block may lack its LF.
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
    """Iterates over the decoded text: pieces of whole lines, and fragments of one line. Joined, they are the text.

    A `Bad` replaces the rest of a line that cannot be decoded, and the rest of a damaged stream.

    Args:
        blocks: what `line_blocks` yields.
        at_start: whether the blocks begin the file, where a byte order mark is not text.
        on_replace: if given, U+FFFD replaces what cannot be decoded, and this is called for the first place in a line.
        original: the encoding of the file, if it was converted to `encoding`.
    """

    def __init__(
        self,
        blocks: Iterator[bytes],
        encoding: str,
        at_start: bool,
        on_replace: Callable[[Bad], None] | None = None,
        original: str | None = None,
    ):
        self._blocks, self._encoding, self._at_start, self._on_replace = blocks, encoding, at_start, on_replace
        self._original = original
        self._new_decoder = codecs.getincrementaldecoder(encoding)
        self._lines = 0  # lines that have ended
        # The current line:
        self._decoder: codecs.IncrementalDecoder | None = None  # None if the line has not begun
        self._line_bytes = 0  # decoded so far
        self._bad = False  # its rest is left out
        self._carriage = ""  # "\r" at the end of the last fragment, perhaps one half of CRLF

    def __iter__(self) -> Iterator[str | Bad]:
        try:
            for block in self._blocks:
                yield from self._block(block)
            if self._decoder is not None:
                yield from self._of_line(b"", last=True)
        except DamagedStream as damage:
            yield Bad(self._lines, str(damage))

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
        """Decode bytes of one line; LF ends the line, and so does the end of the file (`last`)."""
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
        """Return the text of a fragment of the line, up to the bytes that cannot be decoded."""
        decoder = self._decoder
        if self._bad or decoder is None:
            return "", None
        before = decoder.getstate()
        start = self._line_bytes - len(before[0])  # the decoder still holds some bytes
        self._line_bytes += len(data)
        try:
            return decoder.decode(data, final), None
        except UnicodeDecodeError as error:
            place = f" (byte {start + error.start + 1} of the line is 0x{error.object[error.start]:02X})"
            reason = f"not {self._original.upper()}" if self._original else f"not {self._encoding.upper()}{place}"
            bad = Bad(self._lines, reason)
            if self._on_replace is None:
                self._bad = True
                return error.object[: error.start].decode(self._encoding), bad
        self._on_replace(bad)
        decoder.setstate(before)  # some decoders lose their state in the error
        decoder.errors = "replace"
        return decoder.decode(data, final), None

    def _text(self, text: str) -> Iterator[str]:
        if text and self._at_start:
            self._at_start = False
            text = text.removeprefix("\ufeff")
        if text:
            yield text
