"""Text to documents: lines or paragraphs, handed on in batches; what is too long to be held comes in parts."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.text.encodings import Bad

PART_CHARACTERS = 2**18  # the longest text handed to a tokenizer at once
BATCH_CHARACTERS = 2**18  # at least, but for the last batch and before the rest of a long document

CorpusFormat = Literal["auto", "text", "jsonl", "parquet"]
Separator = Literal["line", "blank-line", "file"]
OnError = Literal["stop", "skip", "replace"]
Texts = tuple[list[str], bool]  # some texts, and whether the last goes on in the next ones

_NEAR = 2**14  # characters before the longest part's end in which a good place to cut is looked for first
# Patterns of a text read backwards from the character after the longest part, and how many of the match belong to it.
_CUTS = (
    (re.compile(r"\n(?=\S)"), 0),
    (re.compile(r"[ \t\u3000](?=\S)"), 0),
    (re.compile("[、。，．：；？！…—”’」』）》】]"), 1),
    (re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df]"), 1),
    (re.compile(r"[ \t\n\u3000!-/:-@\[-`{-~]"), 1),
)
_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*+\n)++")


class Problem(NamedTuple):
    """Something in a file that could not be read."""

    file: str
    line: int
    """From 1; of Parquet, the row."""
    reason: str
    skipped: bool
    """Whether the document, or its rest, was left out; else it was mended with U+FFFD."""


class Documents(NamedTuple):
    """A batch of documents, none of them blank (parts of long ones may be)."""

    texts: list[str]
    n_bytes: int
    """Of the source, consumed for this batch; those of a unit sum up to its size."""
    unfinished: bool = False
    """Whether the last text goes on as the first text of the next batch."""


Report = Callable[[Problem], None]


@dataclass(frozen=True)
class CorpusOptions:
    """How the files of a corpus are to be understood."""

    format: CorpusFormat = "auto"
    """`auto` goes by the name of each file."""
    separator: Separator = "line"
    """What stands between two documents of a text file."""
    field: str = "text"
    """Where a JSON record or Parquet row has its text; dots go into nested ones."""
    encoding: str = "auto"
    """Of text and JSON files; `auto` decides for each file."""
    on_error: OnError = "stop"
    """Whether what cannot be read is an error, is left out, or has its undecodable bytes replaced by U+FFFD."""


DEFAULT_OPTIONS = CorpusOptions()


class Faults:
    """What becomes of the faults of one file; `lines_before` counts the lines before the part of it that is read."""

    def __init__(self, file: str, options: CorpusOptions, report: Report, lines_before: Callable[[], int]):
        self._file, self._options, self._report, self._lines_before = file, options, report, lines_before

    @property
    def mending(self) -> bool:
        return self._options.on_error == "replace"

    def leave_out(self, bad: Bad, rest: str = "") -> None:
        """Reports, or raises `UserError` (DATA) when the corpus is to be without fault; `rest` is left out with it."""
        line = self._lines_before() + bad.line + 1
        if self._options.on_error == "stop":
            fix = "mend it, say how to read it with --encoding or --field, or choose --on-error skip or replace"
            raise UserError(ExitCode.DATA, bad.reason, f"{self._file}:{line}", fix)
        reason = f"{bad.reason}; the rest of this {rest} is left out" if rest else bad.reason
        self._report(Problem(self._file, line, reason, skipped=True))

    def mend(self, bad: Bad) -> None:
        self._report(Problem(self._file, self._lines_before() + bad.line + 1, bad.reason, skipped=False))


def in_parts(texts: list[str]) -> Iterator[Texts]:
    """Cuts those of the texts that are too long."""
    if max(map(len, texts), default=0) <= PART_CHARACTERS:
        yield texts, False
        return
    batch: list[str] = []
    for text in texts:
        *ready, last = _parts(text)
        for part in ready:
            batch.append(part)
            yield batch, True
            batch = []
        batch.append(last)
    yield batch, False


def text_documents(pieces: Iterable[str | Bad], separator: Separator, faults: Faults) -> Iterator[Texts]:
    """Yields the documents of a text; see `decoding.TextPieces` for the pieces."""
    kinds = {"line": _Lines, "blank-line": _Paragraphs, "file": _WholeFile}
    reader = kinds[separator](_Document(faults))
    for piece in pieces:
        if isinstance(piece, Bad):
            yield from reader.leave_out(piece)
        elif reader.inside_line or not piece.endswith("\n"):
            yield from reader.fragments(piece)
        else:
            yield from reader.whole_lines(piece)
    yield from reader.end()


def in_batches(texts: Iterable[tuple[Texts, int]], size: int) -> Iterator[Documents]:
    """Puts texts together; beside them stands how many of the source's `size` bytes have been consumed by then."""
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


class _Document:
    """A document that is being read. Its beginning may have been handed on already."""

    def __init__(self, faults: Faults):
        self._faults = faults
        self._clear()

    def _clear(self) -> None:
        self._pieces: list[str] = []
        self._length = 0
        self._handed_on = self._left_out = False

    @property
    def begun(self) -> bool:
        return self._length > 0 or self._left_out

    def add(self, text: str) -> Iterator[Texts]:
        if self._left_out:
            return
        self._pieces.append(text)
        self._length += len(text)
        if self._length > PART_CHARACTERS:
            *ready, rest = _parts("".join(self._pieces))
            self._pieces, self._length, self._handed_on = [rest], len(rest), True
            for part in ready:
                yield [part], True

    def leave_out(self, bad: Bad) -> Iterator[Texts]:
        """Ends the document where it is; without a trace when nothing of it was handed on."""
        if not self._left_out:
            if self._handed_on:
                yield ["".join(self._pieces)], False
            self._faults.leave_out(bad, "long document" if self._handed_on else "")
            self._left_out = True

    def end(self) -> Iterator[Texts]:
        if self._length and not self._left_out:
            yield ["".join(self._pieces)], False
        self._clear()


class _Lines:
    """Each line is a document, unless it is blank."""

    def __init__(self, document: _Document):
        self._document = document
        self._blank = True  # the line so far
        self._held: list[str] = []  # its pieces, as long as it is blank
        self._known: dict[str, str] = {}  # equal ones of them are held once: a file may be nothing but blanks
        self.inside_line = False

    def whole_lines(self, text: str) -> Iterator[Texts]:
        return in_parts(list(filter(str.strip, text.split("\n"))))

    def fragments(self, text: str) -> Iterator[Texts]:
        """Takes any part of the text."""
        for index, fragment in enumerate(text.split("\n")):
            if index:
                yield from self._end_line()
            if fragment:
                yield from self._fragment(fragment)

    def leave_out(self, bad: Bad) -> Iterator[Texts]:
        self.inside_line, self._blank = True, False
        yield from self._document.leave_out(bad)

    def end(self) -> Iterator[Texts]:
        yield from self._end_line()
        yield from self._document.end()

    def _fragment(self, text: str) -> Iterator[Texts]:
        self.inside_line = True
        if self._blank and text.isspace():
            self._held.append(self._known.setdefault(text, text))
            return
        if self._blank:
            self._blank = False
            yield from self._begin_line()
            held, self._held = self._held, []
            for blank in held:
                yield from self._document.add(blank)
        yield from self._document.add(text)

    def _begin_line(self) -> Iterator[Texts]:
        yield from ()

    def _end_line(self) -> Iterator[Texts]:
        self.inside_line, self._blank = False, True
        self._held.clear()
        self._known.clear()
        yield from self._document.end()


class _Paragraphs(_Lines):
    """Lines up to the next blank one are a document."""

    def whole_lines(self, text: str) -> Iterator[Texts]:
        # With an LF before it, the first paragraph begins with LF unless the first line is blank.
        first, *others = _BLANK_LINES.split("\n" + text)
        if first:
            first = first.removesuffix("\n")
            yield from self._document.add(first if self._document.begun else first[1:])
        if others:
            yield from self._document.end()
            *complete, last = others
            yield from in_parts(complete)
            if last:
                yield from self._document.add(last.removesuffix("\n"))

    def _begin_line(self) -> Iterator[Texts]:
        if self._document.begun:
            yield from self._document.add("\n")

    def _end_line(self) -> Iterator[Texts]:
        if self._blank:
            yield from super()._end_line()  # which ends the document
        else:
            self.inside_line, self._blank = False, True
            self._held.clear()
            self._known.clear()


class _WholeFile(_Lines):
    """All lines are one document, without the blank ones at both ends."""

    def __init__(self, document: _Document):
        super().__init__(document)
        self._gap: list[str] = []  # what follows the last line that is not blank

    def whole_lines(self, text: str) -> Iterator[Texts]:
        filled = text.strip()
        if not filled:
            self._gap.append(self._known.setdefault(text, text))
            return
        yield from self._begin_line()
        start = 0 if self._document.begun else text.rfind("\n", 0, text.index(filled)) + 1
        stop = text.index("\n", len(text.rstrip()))
        self._gap = [text[stop:]]
        yield from self._document.add(text[start:stop])

    def _begin_line(self) -> Iterator[Texts]:
        gap, self._gap = self._gap, []
        if self._document.begun:
            for blank in gap:
                yield from self._document.add(blank)

    def _end_line(self) -> Iterator[Texts]:
        if not self._blank:
            self._gap.clear()
        self._gap += [*self._held, "\n"]
        self.inside_line, self._blank = False, True
        self._held.clear()
        self._known.clear()
        yield from ()


def _parts(text: str) -> Iterator[str]:
    """Cuts a text so that no part is too long; where depends on the text alone, however it was read."""
    start = 0
    while len(text) - start > PART_CHARACTERS:
        stop = _cut(text, start + PART_CHARACTERS)
        yield text[start:stop]
        start = stop
    yield text[start:]


def _cut(text: str, stop: int) -> int:
    """Returns the best place up to `stop` at which a part of the greatest length could end.

    BERT's tokens of the two sides are those of the whole, unless a word is longer than a part.
    """
    for width in (min(_NEAR, PART_CHARACTERS), PART_CHARACTERS):
        backwards = text[stop - width : stop + 1][::-1]
        for pattern, own in _CUTS:
            if match := pattern.search(backwards, own):
                return stop - match.start() + own
    return stop
