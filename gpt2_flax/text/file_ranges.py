"""Cut corpus files into ranges between documents, and read the documents of a range."""

import codecs
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO, Literal

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.folders import is_address
from gpt2_flax.text import compression, encodings, parquet
from gpt2_flax.text.compression import DamagedStream, Decompressed
from gpt2_flax.text.detect_encoding import AsUtf8, read_sample
from gpt2_flax.text.documents import CorpusOptions, Faults, Report, Separator, Texts, text_documents
from gpt2_flax.text.encodings import AUTO, WIDE, TextPieces, line_blocks
from gpt2_flax.text.files import File, PassOver, input_error, open_file
from gpt2_flax.text.json_documents import holds_lines, json_lines, json_values

Format = Literal["text", "jsonl", "json", "parquet"]  # "json": a list, or values that span lines

_FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")


@dataclass(frozen=True)
class FileRange:
    """Whole documents of one file: the bytes, or the row groups of Parquet, from `start` up to `stop`."""

    file: File
    format: Format
    compression: str
    """The suffix of the compression, such as ".gz", or an empty string."""
    start: int
    stop: int
    size: int
    """In bytes."""

    def texts(self, options: CorpusOptions, report: Report) -> Iterator[tuple[Texts, int]]:
        """Yield the texts in order, each time with the number of bytes of this range that have been read."""
        faults = Faults(self.file.path, options, report, functools.cache(self._lines_before))
        try:
            if self.format == "parquet":
                rows = parquet.parquet_documents(self.file.path, self.start, self.stop, options.field, faults)
                for texts, share in rows:
                    yield texts, int(share * self.size)
                return
            with open_file(self.file.path, self.start) as file:
                source = Decompressed(file, self.compression) if self.compression else _RangeReader(file, self)
                pieces = self._pieces(source, faults)
                if self.format == "jsonl":
                    documents = json_lines(pieces, options.field, faults)
                elif self.format == "json":
                    documents = json_values(pieces, options.field, faults)
                else:
                    documents = text_documents(pieces, options.separator, faults)
                for texts in documents:
                    yield texts, min(source.consumed, self.size)
        except OSError as error:
            raise input_error(error, self.file.path) from None

    def _pieces(self, source: "Decompressed | _RangeReader", faults: Faults) -> TextPieces:
        encoding, on_replace = self.file.encoding, faults.replace if faults.replacing else None
        if encoding in WIDE:
            blocks = line_blocks(AsUtf8(source.read, encoding).read)
            return TextPieces(blocks, "utf-8", at_start=True, on_replace=on_replace, original=encoding)
        return TextPieces(line_blocks(source.read), encoding, self.start == 0, on_replace)

    def _lines_before(self) -> int:
        """Count the lines, or the rows of Parquet, before this range."""
        if self.format == "parquet":
            return sum(parquet.row_groups(self.file.path)[: self.start]) if self.start else 0
        newlines, left = 0, self.start
        with open_file(self.file.path) as file:
            while left > 0 and (block := file.read(min(left, encodings.BLOCK_BYTES))):
                newlines += block.count(b"\n")
                left -= len(block)
        return newlines


class _RangeReader:
    """Reads the bytes of a range; `consumed` counts them."""

    def __init__(self, file: BinaryIO, file_range: FileRange):
        self._file, self._range = file, file_range
        self.consumed = 0

    def read(self, size: int) -> bytes:
        size = min(size, self._range.size - self.consumed)
        data = self._file.read(size)
        if size and not data:
            path = self._range.file.path
            raise UserError(ExitCode.DATA, "file became shorter while it was read", path, "start again")
        self.consumed += len(data)
        return data


def is_corpus_file(options: CorpusOptions, name: str) -> bool:
    """Return whether a file with this name belongs to the corpus if its folder does."""
    suffix, packed = _suffixes(name)
    return options.format != "auto" or (suffix in _FORMATS and not (packed and suffix == ".parquet"))


def file_ranges(file: File, options: CorpusOptions, unit_bytes: int, pass_over: PassOver) -> Iterator[FileRange]:
    """Yield ranges of about `unit_bytes` bytes that make up the file; no range if it is empty.

    Raises:
        UserError: as `corpus_units`.
    """
    suffix, packed = _suffixes(file.path)
    form = _FORMATS.get(suffix) if options.format == "auto" else options.format
    if form is None or (packed and form == "parquet"):
        fix = "give .txt, .jsonl or .parquet files (the first two also .gz .zst .xz .bz2), or say --format"
        raise UserError(ExitCode.DATA, "not a corpus of a known kind", file.path, fix)
    try:
        if form == "parquet":
            parquet.check_parquet_installed()
            yield from _row_group_ranges(FileRange(file, form, packed, 0, file.size, file.size), options, unit_bytes)
            return
        if not file.size and not packed:
            pass_over(file.path, "empty")
            return
        if packed:
            compression.check_installed(packed)
        file, form = _examined(file, form, packed, options)
        whole = FileRange(file, form, packed, 0, file.size, file.size)
        one_document = form == "json" or (form == "text" and options.separator == "file")
        if packed or one_document or file.encoding in WIDE:
            yield whole
        else:
            yield from _byte_ranges(whole, options, unit_bytes)
    except OSError as error:
        raise input_error(error, file.path) from None


def _suffixes(path: str) -> tuple[str, str]:
    """Return the suffix of the format and the suffix of the compression."""
    name = PurePosixPath(path.partition("?")[0] if is_address(path) else path).name.lower()
    packed = next((suffix for suffix in _COMPRESSED if name.endswith(suffix)), "")
    return PurePosixPath(name.removesuffix(packed)).suffix, packed


def _examined(file: File, form: Format, packed: str, options: CorpusOptions) -> tuple[File, Format]:
    """Return the file with its encoding, and the format that its beginning shows."""
    if form == "text" and options.encoding != AUTO:
        return file._replace(encoding=options.encoding), form
    sample = read_sample(file, packed)
    encoding = sample.encoding if options.encoding == AUTO else options.encoding
    if form == "jsonl" and not holds_lines(sample.first_lines(encoding)):
        form = "json"
    return file._replace(encoding=encoding), form


def _row_group_ranges(whole: FileRange, options: CorpusOptions, unit_bytes: int) -> Iterator[FileRange]:
    """Cut at the first row group at or after each multiple of `unit_bytes`, as if all rows had the same size."""
    try:
        rows = parquet.row_groups(whole.file.path)
    except DamagedStream as damage:
        if options.on_error == "stop":
            raise UserError(ExitCode.DATA, str(damage), whole.file.path, "restore it, or leave it out") from None
        yield whole  # reading it reports the damage
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


def _byte_ranges(whole: FileRange, options: CorpusOptions, unit_bytes: int) -> Iterator[FileRange]:
    """Cut at the first end of a document at or after each multiple of `unit_bytes`."""
    size, start = whole.size, 0
    separator = options.separator if whole.format == "text" else "line"
    if size > unit_bytes:
        with open_file(whole.file.path) as file:
            for target in range(unit_bytes, size, unit_bytes):
                if target > start:  # else a document longer than a unit reaches beyond it
                    stop = min(_next_document(file, target, separator, whole.file.encoding), size)
                    yield dataclasses.replace(whole, start=start, stop=stop, size=stop - start)
                    start = stop
    if start < size:
        yield dataclasses.replace(whole, start=start, stop=size, size=size - start)


def _next_document(file: BinaryIO, position: int, separator: Separator, encoding: str) -> int:
    """Return the first place at or after `position` where a document has ended, or the end of the file."""
    file.seek(position - 1)  # so that a line that begins right at `position` is read whole
    _skip_line(file, encoding)
    if separator == "blank-line":
        while not _skip_line(file, encoding):
            pass
    return file.tell()


def _skip_line(file: BinaryIO, encoding: str) -> bool:
    """Read up to the end of the line, and return whether the line is blank."""
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    blank = True
    while fragment := file.readline(encodings.BLOCK_BYTES):
        blank = blank and not decoder.decode(fragment).strip()
        if fragment.endswith(b"\n"):
            break
    return blank
