"""Examine a corpus before it is read: its files, and whether a vocabulary suits a sample of its documents."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gpt2_flax.errors import ExitCode, UserError, printable
from gpt2_flax.text.corpus import FileUnit, Unit
from gpt2_flax.text.documents import CorpusOptions
from gpt2_flax.tokenizers.tokenizer import Tokenizer
from gpt2_flax.tokenizers.train import measure

MOST_UNKNOWN = 0.2
"""Share of unknown tokens above which the vocabulary counts as the wrong one."""
MUCH_UNKNOWN = 0.01
"""Share of unknown tokens above which there is a warning."""

_UNITS, CHARACTERS = 16, 2**17  # most in the sample: encoding it takes a fraction of a second
_ASKED = 5000  # the most frequent characters of the sample, which are tested for being unknown
_SHOWN, _SHOWN_CHARACTERS = 10, 20
# With more files, more lines a file and shorter lines than these, lines look like paragraphs of documents.
_SEVERAL_FILES, _LINES_A_FILE, _SHORT_LINE = 3, 10, 200


class PassedOver:
    """A `files.PassOver` that counts the files that `corpus_units` leaves out, and keeps a few examples."""

    def __init__(self) -> None:
        self.count = 0
        self.examples: list[str] = []

    def __call__(self, path: str, why: str) -> None:
        self.count += 1
        if self.count <= _SHOWN:
            self.examples.append(printable(f"{path} ({why})"))


def other_encodings(units: Sequence[Unit]) -> dict[str, str]:
    """Return the encoding of each file, by path, that is not read as UTF-8."""
    return {file.path: file.encoding for unit in units for file in unit.files if file.encoding != "utf-8"}


def encoding_lines(found: dict[str, str]) -> Iterator[str]:
    """Yield one line with the number of files in each of the `other_encodings` found, if there are any."""
    if found:
        counts = Counter(found.values()).most_common()
        read = ", ".join(f"{count:,} file{'s' * (count > 1)} as {encoding.upper()}" for encoding, count in counts)
        yield f"read {read}; first {printable(next(iter(found)))}"


class CorpusSample(NamedTuple):
    """Documents of a corpus, or the beginnings of documents."""

    texts: list[str]
    n_all: float
    """Estimated number of documents in the corpus."""


def sample_corpus(units: Sequence[Unit]) -> CorpusSample:
    """Return documents from units spread over the corpus. The sample depends on the units alone."""
    step = -(-len(units) // _UNITS)
    chosen = units[::step]
    limit, texts, n_read, n_bytes = CHARACTERS // len(chosen), [], 0, 0
    for unit in chosen:
        room = limit
        try:
            for batch in unit.batches(lambda problem: None):
                n_bytes += batch.n_bytes
                n_read += len(batch.texts)
                every = max(1, -(-sum(map(len, batch.texts)) // room))  # from the whole batch, not only its beginning
                for text in batch.texts[::every]:
                    if room:
                        texts.append(text[:room])
                        room -= len(texts[-1])
                if not room:
                    break
        except UserError:
            pass  # reading the whole corpus reports it
    return CorpusSample(texts, n_read * sum(unit.size for unit in units) / max(1, n_bytes))


def survey_lines(
    units: Sequence[Unit],
    documents: CorpusSample,
    options: CorpusOptions,
    passed_over: PassedOver,
    tokenizer: Tokenizer,
    allow_unknown: bool,
    where: str,
) -> Iterator[str]:
    """Yield the lines to print before the corpus is read. Faults in the corpus are not reported here.

    Raises:
        UserError: DATA if the sample has too many unknown tokens, unless `allow_unknown`.
    """
    files = {file.path for unit in units for file in unit.files}
    yield f"reading {len(files):,} file{'s' * (len(files) != 1)}"
    if passed_over.count:
        more = ", ..." if passed_over.count > len(passed_over.examples) else ""
        yield f"passed over {passed_over.count:,}: {', '.join(passed_over.examples)}{more}"
    yield from encoding_lines(other_encodings(units))
    texts = documents.texts
    if options.separator == "line":
        yield from _paragraph_lines(units, documents)
    unknown = measure(tokenizer, texts).unknown_rate
    if unknown > MUCH_UNKNOWN:
        what = f"{unknown:.1%} of the tokens of a sample are unknown, most often {_unknown(tokenizer, texts)}"
        if unknown > MOST_UNKNOWN and not allow_unknown:
            raise too_much_unknown(what, where)
        yield f"warning: {what}"


def too_much_unknown(what: str, where: str) -> UserError:
    """Return the error for a vocabulary to which too much of the corpus is unknown."""
    fix = "give the --tokenizer that is meant for this text, or add --allow-unknown"
    return UserError(ExitCode.DATA, what, where, fix)


def _paragraph_lines(units: Sequence[Unit], documents: CorpusSample) -> Iterator[str]:
    ranges = [one for unit in units if isinstance(unit, FileUnit) for one in unit.ranges]
    files = {one.file.path for one in ranges if one.format == "text"}
    if len(files) < _SEVERAL_FILES or len(files) < len({one.file.path for one in ranges}):
        return
    length = sum(map(len, documents.texts)) / max(1, len(documents.texts))
    if documents.n_all >= _LINES_A_FILE * len(files) and length < _SHORT_LINE:
        yield (
            f"note: each line is a document, about {documents.n_all:,.0f} of {length:.0f} characters in "
            f"{len(files):,} files; if each file is one, add --separator file"
        )


def _unknown(tokenizer: Tokenizer, texts: Sequence[str]) -> str:
    """Return the most frequent unknown characters, or unknown words if the vocabulary has all characters."""
    unknown: list[str] = []
    for split in (list, str.split):  # into characters, into words
        counts = Counter(itertools.chain.from_iterable(map(split, texts)))
        asked = [one for one, _ in counts.most_common(_ASKED) if not one.isspace()]
        ids = tokenizer.encode_batch(asked)
        unknown = [one for one, ids_T in zip(asked, ids, strict=True) if (ids_T == tokenizer.unk_id).any()]
        if unknown:
            break
    return " ".join(printable(one[:_SHOWN_CHARACTERS]) for one in unknown[:_SHOWN])
