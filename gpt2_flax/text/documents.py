"""Split text into documents, one block of a file at a time; a long document comes in slices.

A slice is a run of at most `SLICE_CHARACTERS` characters of one document: what a tokenizer encodes at once.
"""

import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.text.encodings import Bad

SLICE_CHARACTERS = 2**18
BATCH_CHARACTERS = 2**18  # least in a batch; the last batch, and a batch that ends in a slice, may have fewer

CorpusFormat = Literal["auto", "text", "jsonl", "parquet"]
Separator = Literal["line", "blank-line", "file"]
OnError = Literal["stop", "skip", "replace"]
Texts = tuple[list[str], bool]  # texts, and whether the last text continues in the next `Texts`

_NEAR = 2**14  # characters before the end of the longest slice, where a good place to cut is searched first
# Patterns of text that is read backwards from the character after the longest slice, best first. Beside each: how many
# characters of the match belong to the slice.
_CUTS = (
    (re.compile(r"\n(?=\S)"), 0),
    (re.compile(r"[ \t\u3000](?=\S)"), 0),
    (re.compile("[、。，．：；？！…—”’」』）》】]"), 1),
    (re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df]"), 1),
    (re.compile(r"[ \t\n\u3000!-/:-@\[-`{-~]"), 1),
)


class Problem(NamedTuple):
    """A fault in a corpus file that did not stop the reading."""

    file: str
    line: int
    """Number of the line, or of the row in Parquet, from 1."""
    reason: str
    skipped: bool
    """True if the document, or the rest of it, is left out; False if U+FFFD replaces the faulty bytes."""


class Documents(NamedTuple):
    """A batch of documents. No document is blank; a slice of a long document may be."""

    texts: list[str]
    n_bytes: int
    """Bytes of the source that were read for this batch; they add up to the size of the unit."""
    unfinished: bool = False
    """Whether the last text continues as the first text of the next batch."""


Report = Callable[[Problem], None]


@dataclass(frozen=True)
class CorpusOptions:
    """How to read the files of a corpus."""

    format: CorpusFormat = "auto"
    """`auto` decides by the name of each file."""
    separator: Separator = "line"
    """What separates two documents in a text file."""
    field: str = "text"
    """The JSON field or Parquet column that holds the text; dots lead into nested ones."""
    encoding: str = "auto"
    """Encoding of text and JSON files; `auto` decides for each file."""
    on_error: OnError = "stop"
    """Whether a fault is an error, its document is left out, or U+FFFD replaces its undecodable bytes."""


DEFAULT_OPTIONS = CorpusOptions()


class Faults:
    """Handles the faults found in one range of a file as `options.on_error` says.

    Args:
        lines_before: counts the lines of the file before the range; called only if there is a fault.
    """

    def __init__(self, file: str, options: CorpusOptions, report: Report, lines_before: Callable[[], int]):
        self._file, self._options, self._report, self._lines_before = file, options, report, lines_before

    @property
    def replacing(self) -> bool:
        return self._options.on_error == "replace"

    def leave_out(self, bad: Bad, rest: str = "") -> None:
        """Report that the document at `bad` is left out, and with it the rest of the `rest` ("file", say).

        Raises:
            UserError: DATA if faults are errors.
        """
        line = self._lines_before() + bad.line + 1
        if self._options.on_error == "stop":
            fix = "fix it, say how to read it with --encoding or --field, or choose --on-error skip or replace"
            raise UserError(ExitCode.DATA, bad.reason, f"{self._file}:{line}", fix)
        reason = f"{bad.reason}; the rest of this {rest} is left out" if rest else bad.reason
        self._report(Problem(self._file, line, reason, skipped=True))

    def replace(self, bad: Bad) -> None:
        """Report that U+FFFD replaces the bytes at `bad`."""
        self._report(Problem(self._file, self._lines_before() + bad.line + 1, bad.reason, skipped=False))


def in_slices(texts: list[str]) -> Iterator[Texts]:
    """Yield complete texts, those that are too long in slices."""
    if max(map(len, texts), default=0) <= SLICE_CHARACTERS:
        yield texts, False
        return
    batch: list[str] = []
    for text in texts:
        *slices, last = _slices(text)
        for one in slices:
            yield [*batch, one], True
            batch = []
        batch.append(last)
    yield batch, False


def text_documents(pieces: Iterable[str | Bad], separator: Separator, faults: Faults) -> Iterator[Texts]:
    """Yield the documents of a text whose `pieces` come from `encodings.TextPieces`."""
    splitter = _Splitter(separator, faults)
    for piece in pieces:
        yield from splitter.read(piece)
    yield from splitter.end()


def in_batches(texts: Iterable[tuple[Texts, int]], size: int) -> Iterator[Documents]:
    """Group texts into batches.

    Args:
        texts: texts, each with the number of bytes of the source that have been read by then.
        size: bytes of the whole source.
    """
    batch: list[str] = []
    characters = before = 0
    for (more, unfinished), consumed in texts:
        batch += more
        characters += sum(map(len, more))
        if unfinished or characters >= BATCH_CHARACTERS:
            yield Documents(batch, consumed - before, unfinished)
            batch, characters, before = [], 0, consumed
    if batch or before < size:
        yield Documents(batch, size - before)


class _Splitter:
    """Splits text into documents at the ends of lines.

    With "line", each line that is not blank is a document. With "blank-line", a document is a run of lines that are not
    blank. With "file", it is all lines from the first to the last that is not blank.
    """

    def __init__(self, separator: Separator, faults: Faults):
        self._separator, self._faults = separator, faults
        self._complete: list[str] = []  # documents to yield
        self._inside_line, self._blank = False, True  # the current line: whether it has begun, is blank so far
        self._gap: list[str] = []  # blank text that belongs to the document only if more text follows
        self._new_document()

    def _new_document(self) -> None:
        self._text: list[str] = []
        self._length = 0
        self._sliced = False  # slices of it have been yielded
        self._left_out = False  # the rest of it is left out

    def read(self, piece: str | Bad) -> Iterator[Texts]:
        """Yield the documents that end in `piece`."""
        if isinstance(piece, Bad):
            self._leave_out(piece)
        elif self._inside_line or not piece.endswith("\n"):
            yield from self._add_lines(piece.split("\n"))
        elif self._separator == "line":
            self._complete += filter(str.strip, piece.split("\n"))
        else:  # lines that belong together, as if they were one line
            runs = itertools.groupby(piece[:-1].split("\n"), key=lambda line: not line.strip())
            yield from self._add_lines([*("\n".join(run) for _, run in runs), ""])
        yield from self._take_complete()

    def end(self) -> Iterator[Texts]:
        """Yield the last document."""
        self._end_document()
        yield from self._take_complete()

    def _add_lines(self, lines: list[str]) -> Iterator[Texts]:
        """Add the end of the current line, lines, and the beginning of the next line."""
        *ended, begun = lines
        for line in ended:
            yield from self._add(line)
            self._end_line()
        yield from self._add(begun)

    def _add(self, text: str) -> Iterator[Texts]:
        if not text:
            return
        self._inside_line = True
        if self._blank and text.isspace():
            self._gap.append(sys.intern(text))  # held once: a file may be gigabytes of blanks
            return
        self._blank = False
        added = [] if self._left_out else [*self._gap, text]
        self._gap.clear()
        for one in added:
            self._text.append(one)
            self._length += len(one)
            if self._length > SLICE_CHARACTERS:
                yield from self._take_complete()
                *slices, rest = _slices("".join(self._text))
                self._text, self._length, self._sliced = [rest], len(rest), True
                yield from (([one], True) for one in slices)

    def _end_line(self) -> None:
        if self._separator == "line" or (self._separator == "blank-line" and self._blank):
            self._end_document()
        if self._length or self._left_out:
            self._gap.append("\n")
        else:
            self._gap.clear()
        self._inside_line, self._blank = False, True

    def _end_document(self) -> None:
        if self._length and not self._left_out:
            self._complete.append("".join(self._text))
        self._new_document()

    def _leave_out(self, bad: Bad) -> None:
        """Leave out the document, or what follows of it if slices of it have been yielded."""
        self._inside_line, self._blank = True, False
        if not self._left_out:
            self._faults.leave_out(bad, "long document" if self._sliced else "")
            if self._sliced:
                self._complete.append("".join(self._text))
            self._text, self._left_out = [], True

    def _take_complete(self) -> Iterator[Texts]:
        if self._complete:
            complete, self._complete = self._complete, []
            yield from in_slices(complete)


def _slices(text: str) -> Iterator[str]:
    """Cut a text into slices. The places depend on the text alone, not on how it was read."""
    start = 0
    while len(text) - start > SLICE_CHARACTERS:
        stop = _slice_end(text, start + SLICE_CHARACTERS)
        yield text[start:stop]
        start = stop
    yield text[start:]


def _slice_end(text: str, stop: int) -> int:
    """Return the best place, at most `stop`, to end a slice.

    The BERT tokens on both sides are the tokens of the whole text, unless a word is longer than a slice.
    """
    for width in (min(_NEAR, SLICE_CHARACTERS), SLICE_CHARACTERS):
        backwards = text[stop - width : stop + 1][::-1]
        for pattern, own in _CUTS:
            if match := pattern.search(backwards, own):
                return stop - match.start() + own
    return stop
