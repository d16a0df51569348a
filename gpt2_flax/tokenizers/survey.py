"""A look at a corpus before all of it is read: its files, and whether a sample of its documents suits a vocabulary."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gpt2_flax.errors import ExitCode, UserError, printable
from gpt2_flax.text.corpus import FileUnit, Unit
from gpt2_flax.text.documents import CorpusOptions
from gpt2_flax.tokenizers.tokenizer import Tokenizer
from gpt2_flax.tokenizers.train import measure

MOST_UNKNOWN = 0.2
"""Share of tokens above which a vocabulary is taken for the wrong one."""
MUCH_UNKNOWN = 0.01
"""Share of tokens above which there is a warning."""

_UNITS, _CHARACTERS = 16, 2**17  # of the sample, at most: encoding them takes a fraction of a second
_ASKED = 5000  # the most frequent characters of the sample, which may be unknown
_SHOWN, _SHOWN_CHARACTERS = 10, 20
# From these on, documents look like the paragraphs of files.
_SEVERAL_FILES, _LINES_A_FILE, _SHORT_LINE = 3, 10, 200


class PassedOver:
    """Counts what `corpus_units` leaves out; call it with a path and the reason."""

    def __init__(self) -> None:
        self.count, self.examples = 0, []

    def __call__(self, path: str, why: str) -> None:
        self.count += 1
        if self.count <= _SHOWN:
            self.examples.append(printable(f"{path} ({why})"))


def encodings(units: Sequence[Unit]) -> dict[str, str]:
    """Returns the encodings of the files that are not read as UTF-8."""
    return {file.path: file.encoding for unit in units for file in unit.files if file.encoding != "utf-8"}


def encoding_lines(found: dict[str, str]) -> Iterator[str]:
    """Yields one line with the number of files in each encoding, if there are any in another than UTF-8."""
    if found:
        counts = Counter(found.values()).most_common()
        read = ", ".join(f"{count:,} file{'s' * (count > 1)} as {encoding.upper()}" for encoding, count in counts)
        yield f"read {read}; first {printable(next(iter(found)))}"


class Sample(NamedTuple):
    """Documents of a corpus, or their beginnings."""

    texts: list[str]
    n_all: float
    """About how many documents the corpus has."""


def sample(units: Sequence[Unit]) -> Sample:
    """Returns documents of units spread over the corpus; equal for equal units."""
    step = -(-len(units) // _UNITS)
    chosen = units[::step]
    limit, texts, n_read, n_bytes = _CHARACTERS // len(chosen), [], 0, 0
    for unit in chosen:
        room = limit
        try:
            for batch in unit.batches(lambda problem: None):
                n_bytes += batch.n_bytes
                n_read += len(batch.texts)
                every = max(1, -(-sum(map(len, batch.texts)) // room))  # of the whole batch, not of its beginning
                for text in batch.texts[::every]:
                    if room:
                        texts.append(text[:room])
                        room -= len(texts[-1])
                if not room:
                    break
        except UserError:
            pass  # the pass over the whole corpus says it
    return Sample(texts, n_read * sum(unit.size for unit in units) / max(1, n_bytes))


def survey_lines(
    units: Sequence[Unit],
    documents: Sample,
    options: CorpusOptions,
    passed_over: PassedOver,
    tokenizer: Tokenizer,
    allow_unknown: bool,
    where: str,
) -> Iterator[str]:
    """Yields what there is to say before the work begins.

    Raises `UserError` (DATA) when the sample has too many unknown tokens, unless `allow_unknown`. Faults of the corpus
    are for its readers to report.
    """
    files = {file.path for unit in units for file in unit.files}
    yield f"reading {len(files):,} file{'s' * (len(files) != 1)}"
    if passed_over.count:
        more = ", ..." if passed_over.count > len(passed_over.examples) else ""
        yield f"passed over {passed_over.count:,}: {', '.join(passed_over.examples)}{more}"
    yield from encoding_lines(encodings(units))
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
    """The error of a vocabulary that lacks most of the corpus."""
    fix = "give the --tokenizer that is meant for this text, or add --allow-unknown"
    return UserError(ExitCode.DATA, what, where, fix)


def _paragraph_lines(units: Sequence[Unit], documents: Sample) -> Iterator[str]:
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
    """The most frequent characters that the vocabulary lacks; words, where it has all characters."""
    for pieces in (texts, map(str.split, texts)):
        counts: Counter[str] = Counter()
        for piece in pieces:
            counts.update(piece)
        asked = [piece for piece, _ in counts.most_common(_ASKED) if not piece.isspace()]
        ids = tokenizer.encode_batch(asked)
        unknown = [piece for piece, ids_T in zip(asked, ids, strict=True) if (ids_T == tokenizer.unk_id).any()]
        if unknown:
            break
    return " ".join(printable(piece[:_SHOWN_CHARACTERS]) for piece in unknown[:_SHOWN])
