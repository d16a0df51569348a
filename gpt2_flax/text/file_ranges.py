"""The files of a corpus, cut into parts between documents, and the documents of each part."""

import codecs
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO, Literal

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.folders import is_address
from gpt2_flax.text import compression, encodings, parquet
from gpt2_flax.text.compression import Damaged, Decompressed
from gpt2_flax.text.detect_encoding import AsUtf8, read_sample
from gpt2_flax.text.documents import CorpusOptions, Faults, Report, Separator, Texts, text_documents
from gpt2_flax.text.encodings import AUTO, WIDE, TextPieces, line_blocks
from gpt2_flax.text.files import File, PassOver, input_error, open_file
from gpt2_flax.text.json_lines import holds_lines, json_documents
from gpt2_flax.text.json_values import json_values

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
class FilePart:
    """A file from `start` up to `stop`, between documents: bytes, or row groups of Parquet."""

    file: File
    format: Format
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
                pieces = self._pieces(source.read, faults)
                if self.format == "jsonl":
                    documents = json_documents(pieces, options.field, faults)
                elif self.format == "json":
                    documents = json_values(pieces, options.field, faults)
                else:
                    documents = text_documents(pieces, options.separator, faults)
                for texts in documents:
                    yield texts, min(source.consumed, self.size)
        except OSError as error:
            raise input_error(error, self.file.path) from None

    def _pieces(self, read: Callable[[int], bytes], faults: Faults) -> TextPieces:
        encoding, mend = self.file.encoding, faults.mend if faults.mending else None
        if encoding in WIDE:
            blocks = line_blocks(AsUtf8(read, encoding).read)
            return TextPieces(blocks, "utf-8", at_start=True, mend=mend, original=encoding)
        return TextPieces(line_blocks(read), encoding, self.start == 0, mend)

    def _lines_before(self) -> int:
        """How many lines, or rows of Parquet, stand before this part."""
        if self.format == "parquet":
            return sum(parquet.row_groups(self.file.path)[: self.start]) if self.start else 0
        newlines, left = 0, self.start
        with open_file(self.file.path) as file:
            while left > 0 and (block := file.read(min(left, encodings.BLOCK_BYTES))):
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


def is_corpus_file(options: CorpusOptions, name: str) -> bool:
    """Returns whether a file of that name in a folder is one of the corpus."""
    suffix, packed = _suffixes(name)
    return options.format != "auto" or (suffix in _FORMATS and not (packed and suffix == ".parquet"))


def cut(file: File, options: CorpusOptions, unit_bytes: int, pass_over: PassOver) -> Iterator[FilePart]:
    """Yields parts of a file of about `unit_bytes`, none when it is empty; raises as `corpus_units`."""
    suffix, packed = _suffixes(file.path)
    form = _FORMATS.get(suffix) if options.format == "auto" else options.format
    if form is None or (packed and form == "parquet"):
        fix = "give .txt, .jsonl or .parquet files (the first two also .gz .zst .xz .bz2), or say --format"
        raise UserError(ExitCode.DATA, "not a corpus of a known kind", file.path, fix)
    try:
        if form == "parquet":
            parquet.check_parquet_installed()
            yield from _cut_row_groups(FilePart(file, form, packed, 0, file.size, file.size), options, unit_bytes)
            return
        if not file.size and not packed:
            pass_over(file.path, "empty")
            return
        if packed:
            compression.check_installed(packed)
        file, form = _looked_into(file, form, packed, options)
        whole = FilePart(file, form, packed, 0, file.size, file.size)
        one_document = form == "json" or (form == "text" and options.separator == "file")
        if packed or one_document or file.encoding in WIDE:
            yield whole
        else:
            yield from _cut_bytes(whole, options, unit_bytes)
    except OSError as error:
        raise input_error(error, file.path) from None


def _suffixes(path: str) -> tuple[str, str]:
    """Returns the suffix of the format and the suffix of the compression."""
    name = PurePosixPath(path.partition("?")[0] if is_address(path) else path).name.lower()
    packed = next((suffix for suffix in _COMPRESSED if name.endswith(suffix)), "")
    return PurePosixPath(name.removesuffix(packed)).suffix, packed


def _looked_into(file: File, form: Format, packed: str, options: CorpusOptions) -> tuple[File, Format]:
    """Returns the file with its encoding, and its format as its beginning shows it."""
    if form == "text" and options.encoding != AUTO:
        return file._replace(encoding=options.encoding), form
    sample = read_sample(file, packed)
    encoding = sample.encoding if options.encoding == AUTO else options.encoding
    if form == "jsonl" and not holds_lines(sample.first_lines(encoding)):
        form = "json"
    return file._replace(encoding=encoding), form


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
                    stop = min(_next_document(file, target, separator, whole.file.encoding), size)
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
    while fragment := file.readline(encodings.BLOCK_BYTES):
        blank = blank and not decoder.decode(fragment).strip()
        if fragment.endswith(b"\n"):
            break
    return blank
